"""`flash_attn.ops.triton.rotary`, without triton."""

import flash_attn_shim.needs_torch  # noqa: F401
from flash_attn_mps.frontends.rotary import apply_rotary
from flash_attn_shim.rehome import rehome as _rehome

__all__ = ["apply_rotary"]

_rehome(globals())
