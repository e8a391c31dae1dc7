# Written by stubs/make.py.
from flash_attn.ops.triton.rotary import apply_rotary as apply_rotary
from flash_attn_shim.presents.flash_attn.layers.rotary import ApplyRotaryEmb as ApplyRotaryEmb
from flash_attn_shim.presents.flash_attn.layers.rotary import ApplyRotaryEmbKV_ as ApplyRotaryEmbKV_
from flash_attn_shim.presents.flash_attn.layers.rotary import ApplyRotaryEmbQKV_ as ApplyRotaryEmbQKV_
from flash_attn_shim.presents.flash_attn.layers.rotary import RotaryEmbedding as RotaryEmbedding
from flash_attn_shim.presents.flash_attn.layers.rotary import _apply_rotary_emb_qkv as _apply_rotary_emb_qkv
from flash_attn_shim.presents.flash_attn.layers.rotary import _check_kv as _check_kv
from flash_attn_shim.presents.flash_attn.layers.rotary import _save as _save
from flash_attn_shim.presents.flash_attn.layers.rotary import _saved as _saved
from flash_attn_shim.presents.flash_attn.layers.rotary import apply_rotary_emb as apply_rotary_emb
from flash_attn_shim.presents.flash_attn.layers.rotary import apply_rotary_emb_func as apply_rotary_emb_func
from flash_attn_shim.presents.flash_attn.layers.rotary import apply_rotary_emb_kv_ as apply_rotary_emb_kv_
from flash_attn_shim.presents.flash_attn.layers.rotary import apply_rotary_emb_qkv_ as apply_rotary_emb_qkv_
from flash_attn_shim.presents.flash_attn.layers.rotary import apply_rotary_emb_torch as apply_rotary_emb_torch
from flash_attn_shim.presents.flash_attn.layers.rotary import rotate_half as rotate_half
