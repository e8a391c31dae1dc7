"""`flash_attn.ops.triton.rotary`, without triton."""

from flash_attn_mps.rotary import apply_rotary

__all__ = ["apply_rotary"]
