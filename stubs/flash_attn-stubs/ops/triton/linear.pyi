# Written by stubs/make.py.
from flash_attn.ops.triton import k_activations as k_activations
from flash_attn_shim.presents.flash_attn.ops.triton.linear import _ACTIVATIONS as _ACTIVATIONS
from flash_attn_shim.presents.flash_attn.ops.triton.linear import _check as _check
from flash_attn_shim.presents.flash_attn.ops.triton.linear import triton_dgrad_act as triton_dgrad_act
from flash_attn_shim.presents.flash_attn.ops.triton.linear import triton_linear_act as triton_linear_act
