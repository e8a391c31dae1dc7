# Written by stubs/make.py.
from flash_attn_mps.frontends.rotary import apply_rotary as apply_rotary
