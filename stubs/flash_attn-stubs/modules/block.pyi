# Written by stubs/make.py.
from flash_attn.modules.mha import MHA as MHA
from flash_attn.modules.mlp import Mlp as Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm as RMSNorm
from flash_attn.ops.triton.layer_norm import layer_norm_fn as layer_norm_fn
from flash_attn_shim.presents.flash_attn.modules.block import Block as Block
from flash_attn_shim.presents.flash_attn.modules.block import ParallelBlock as ParallelBlock
from flash_attn_shim.presents.flash_attn.modules.block import StochasticDepth as StochasticDepth
from flash_attn_shim.presents.flash_attn.modules.block import _add_norm as _add_norm
from flash_attn_shim.presents.flash_attn.modules.block import _check_fused as _check_fused
from flash_attn_shim.presents.flash_attn.modules.block import _mark as _mark
