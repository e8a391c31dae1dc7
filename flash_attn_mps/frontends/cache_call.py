"""`CacheCall`: the arguments of attention against a key-value cache, of FlashAttention 2 and 3 alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..describe import CallOptions


@dataclass(slots=True, eq=False)
class CacheCall:
    """The arguments of `flash_attn_with_kvcache`, as the caller gave them. Treat it as immutable.

    The operators of `graph/kvcache_op.py` have these fields as their arguments.
    """

    q: torch.Tensor  # (batch, seqlen_q, heads, head_dim), or packed with cu_seqlens_q
    k_cache: torch.Tensor  # (batch_cache, seqlen_cache, heads_k, head_dim), or pages with block_table
    v_cache: torch.Tensor
    options: CallOptions
    k: torch.Tensor | None = None  # new rows (batch, seqlen_new, heads_k, head_dim), or packed with cu_seqlens_k_new
    v: torch.Tensor | None = None
    qv: torch.Tensor | None = None  # of the shape of the output
    rotary_cos: torch.Tensor | None = None  # (seqlen_ro, rotary_dim / 2)
    rotary_sin: torch.Tensor | None = None
    rotary_interleaved: bool = True
    rotary_seqlens: torch.Tensor | None = None  # (batch,): where the rotation starts, if not at cache_seqlens
    cache_seqlens: int | torch.Tensor | None = None  # rows in the cache, for all or (batch,); None: it is full
    # (batch,): the entry of the cache that a sequence uses; of a paged one, the row of block_table
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None  # (batch,): the row at which a sequence starts
    block_table: torch.Tensor | None = None  # (batch, blocks per sequence); (entries, ...) with cache_batch_idx
    caller: str = "fa2"  # one of NAMES: whose names messages have
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,)
    cu_seqlens_k_new: torch.Tensor | None = None  # (batch + 1,)
    max_seqlen_q: int | torch.Tensor | None = None  # with cu_seqlens_q
    seqused_q: torch.Tensor | None = None  # (batch,): how many of a sequence's queries count
    k_descale: torch.Tensor | None = None  # (batch, heads_k), float32: of a quantised cache
    v_descale: torch.Tensor | None = None

    @property
    def names(self) -> dict[str, str]:
        """What the caller calls each field."""
        return NAMES[self.caller]

    @property
    def lengths_of_q(self) -> str:
        """The argument that says how many queries there are."""
        return "q" if self.cu_seqlens_q is None else "cu_seqlens_q"


_FA3_PRIVATE = {
    "k_cache": "k",
    "v_cache": "v",
    "k": "k_new",
    "v": "v_new",
    "rotary_seqlens": "seqlens_rotary",
    "cache_seqlens": "seqused_k",
    "cache_batch_idx": "kv_batch_idx",
    "cache_leftpad": "leftpad_k",
    "block_table": "page_table",
}
_RENAMED: dict[str, dict[str, str]] = {"fa2": {}, "fa3": {"block_table": "page_table"}, "fa3_private": _FA3_PRIVATE}
# Callers to what they call each field of a `CacheCall`.
NAMES = {
    caller: {field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(CacheCall)}
    for caller, renamed in _RENAMED.items()
}
