"""`flash_attn_interface`, the top-level module of FlashAttention 3. See `flash_attn_mps.interface3`."""

import flash_attn_shim.needs_torch  # noqa: F401
from flash_attn_mps.interface3 import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
