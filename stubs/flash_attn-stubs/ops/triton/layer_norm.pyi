# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import LayerNormFn as LayerNormFn
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import LayerNormLinearFn as LayerNormLinearFn
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import RMSNorm as RMSNorm
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import _check_rowscale as _check_rowscale
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import _norm_ref as _norm_ref
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import _one_or_tuple as _one_or_tuple
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import dropout as dropout
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import layer_norm_fn as layer_norm_fn
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import layer_norm_linear_fn as layer_norm_linear_fn
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import layer_norm_ref as layer_norm_ref
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import normalize as normalize
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import residual_dtype as residual_dtype
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import rms_norm_fn as rms_norm_fn
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import rms_norm_ref as rms_norm_ref
from flash_attn_shim.presents.flash_attn.ops.triton.layer_norm import upcast as upcast
