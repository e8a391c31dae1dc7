# Written by stubs/make.py.
from flash_attn.ops.triton.layer_norm import dropout as dropout
from flash_attn.ops.triton.layer_norm import normalize as normalize
from flash_attn.ops.triton.layer_norm import residual_dtype as residual_dtype
from flash_attn.ops.triton.layer_norm import upcast as upcast
from flash_attn_shim.presents.flash_attn.ops.layer_norm import DropoutAddLayerNorm as DropoutAddLayerNorm
from flash_attn_shim.presents.flash_attn.ops.layer_norm import DropoutAddLayerNormFn as DropoutAddLayerNormFn
from flash_attn_shim.presents.flash_attn.ops.layer_norm import DropoutAddLayerNormParallelResidualFn as DropoutAddLayerNormParallelResidualFn
from flash_attn_shim.presents.flash_attn.ops.layer_norm import DropoutAddLayerNormSubsetFn as DropoutAddLayerNormSubsetFn
from flash_attn_shim.presents.flash_attn.ops.layer_norm import _branch as _branch
from flash_attn_shim.presents.flash_attn.ops.layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
from flash_attn_shim.presents.flash_attn.ops.layer_norm import dropout_add_layer_norm_parallel_residual as dropout_add_layer_norm_parallel_residual
from flash_attn_shim.presents.flash_attn.ops.layer_norm import dropout_add_layer_norm_subset as dropout_add_layer_norm_subset
from flash_attn_shim.presents.flash_attn.ops.layer_norm import layer_norm as layer_norm
