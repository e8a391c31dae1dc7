"""FlashAttention for PyTorch on Apple silicon: the FlashAttention-2 functions, on MPS, CPU and CUDA tensors."""

import warnings as _warnings

from . import mha, project, sdpa
from .frontends.fa2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .frontends.heads_first import flash_attention

__version__ = "0.1.0"
__distribution__ = "mtlflashattn"  # flash_attn_shim/owners.py knows this package by this line
__all__ = [
    "flash_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "mha",
    "sdpa",
]

if _taken := project.name_taken():
    _warnings.warn(_taken, stacklevel=2)

if sdpa.wanted():
    sdpa.install()
