"""FlashAttention 3's top-level module for Apple silicon: presented by mtlflashattn, served by
`flash_attn_mps.frontends.fa3` and `fa3_private`. `help(flash_attn_interface.flash_attn_func)` has the semantics.
"""

from __future__ import annotations

from typing import Any

import flash_attn_shim.needs_torch  # noqa: F401

# isort: split
from torch import Tensor

from flash_attn_mps.frontends.fa3 import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from flash_attn_mps.frontends.fa3_private import _flash_attn_backward, _flash_attn_forward  # noqa: F401
from flash_attn_shim.guests import dialects as _dialects
from flash_attn_shim.guests.presented import present as _present
from flash_attn_shim.rehome import rehome as _rehome

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_present(__name__)
_rehome(globals())
_dialects.add_early_dialect(globals())


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied if its last dimension is not contiguous; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of `m` that is not below `x`."""
    return (x + m - 1) // m * m


class FlashAttnFunc:
    """What upstream's autograd function is to a caller: `apply` with the arguments of `flash_attn_func`, in order."""

    apply = staticmethod(flash_attn_func)


class FlashAttnQKVPackedFunc:
    """What upstream's autograd function is to a caller: `apply` with the arguments of `flash_attn_qkvpacked_func`."""

    apply = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc:
    """What upstream's autograd function is to a caller."""

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqused_q: Tensor | None,
        seqused_k: Tensor | None,
        max_seqlen_q: int | Tensor,
        max_seqlen_k: int | Tensor,
        *scoring: Any,
    ) -> Tensor | Any:
        """`flash_attn_varlen_func` with `seqused` before `max_seqlen`, as upstream's class has them."""
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        return flash_attn_varlen_func(q, k, v, *lengths, *scoring)
