# Written by stubs/make.py.
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import _BLOCK_NUMEL as _BLOCK_NUMEL
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import _check as _check
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import _fp32 as _fp32
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import _row_blocks as _row_blocks
from flash_attn_shim.presents.flash_attn.ops.triton.cross_entropy import cross_entropy_loss as cross_entropy_loss
