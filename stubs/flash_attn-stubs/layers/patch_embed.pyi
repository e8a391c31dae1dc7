# Written by stubs/make.py.
from flash_attn.ops.fused_dense import FusedDense as FusedDense
from flash_attn_shim.presents.flash_attn.layers.patch_embed import PatchEmbed as PatchEmbed
