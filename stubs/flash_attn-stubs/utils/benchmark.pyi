# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.utils.benchmark import _autocast as _autocast
from flash_attn_shim.presents.flash_attn.utils.benchmark import _first_result as _first_result
from flash_attn_shim.presents.flash_attn.utils.benchmark import _forget_grads as _forget_grads
from flash_attn_shim.presents.flash_attn.utils.benchmark import _grad_like as _grad_like
from flash_attn_shim.presents.flash_attn.utils.benchmark import _measure as _measure
from flash_attn_shim.presents.flash_attn.utils.benchmark import _now as _now
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_all as benchmark_all
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_backward as benchmark_backward
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_combined as benchmark_combined
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_forward as benchmark_forward
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_fwd_bwd as benchmark_fwd_bwd
from flash_attn_shim.presents.flash_attn.utils.benchmark import benchmark_memory as benchmark_memory
from flash_attn_shim.presents.flash_attn.utils.benchmark import pytorch_profiler as pytorch_profiler
