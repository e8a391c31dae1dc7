# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.utils.distributed import AllGatherFunc as AllGatherFunc
from flash_attn_shim.presents.flash_attn.utils.distributed import AllReduceFunc as AllReduceFunc
from flash_attn_shim.presents.flash_attn.utils.distributed import ReduceScatterFunc as ReduceScatterFunc
from flash_attn_shim.presents.flash_attn.utils.distributed import _marked as _marked
from flash_attn_shim.presents.flash_attn.utils.distributed import all_gather as all_gather
from flash_attn_shim.presents.flash_attn.utils.distributed import all_gather_raw as all_gather_raw
from flash_attn_shim.presents.flash_attn.utils.distributed import all_reduce as all_reduce
from flash_attn_shim.presents.flash_attn.utils.distributed import all_reduce_raw as all_reduce_raw
from flash_attn_shim.presents.flash_attn.utils.distributed import allreduce_sequence_parallel_grad as allreduce_sequence_parallel_grad
from flash_attn_shim.presents.flash_attn.utils.distributed import get_dim_for_local_rank as get_dim_for_local_rank
from flash_attn_shim.presents.flash_attn.utils.distributed import reduce_scatter as reduce_scatter
from flash_attn_shim.presents.flash_attn.utils.distributed import reduce_scatter_raw as reduce_scatter_raw
from flash_attn_shim.presents.flash_attn.utils.distributed import sync_shared_params as sync_shared_params
