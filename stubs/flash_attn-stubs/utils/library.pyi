# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.utils.library import triton_op as triton_op
