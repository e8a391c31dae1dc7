# Written by stubs/make.py.
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as cross_entropy_loss
from flash_attn_shim.presents.flash_attn.losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
