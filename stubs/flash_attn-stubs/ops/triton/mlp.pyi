# Written by stubs/make.py.
from flash_attn.ops.fused_dense import FusedMLPFunc as FusedMLPFunc
from flash_attn_shim.presents.flash_attn.ops.triton.mlp import FusedDenseSqreluDense as FusedDenseSqreluDense
from flash_attn_shim.presents.flash_attn.ops.triton.mlp import FusedDenseSqreluDenseFunc as FusedDenseSqreluDenseFunc
from flash_attn_shim.presents.flash_attn.ops.triton.mlp import fused_dense_sqrelu_dense_function as fused_dense_sqrelu_dense_function
