"""From a function's arguments to an `AttentionProblem`: dense batches and packed ones, checked once.

Masks, sinks and `qv` are put on top by `problem.with_mask`, `with_sinks` and `with_qv`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .capture import capturing
from .lengths import packed_lengths
from .problem import AttentionProblem


@dataclass(slots=True, eq=False)
class CallOptions:
    """The arguments that every function shares, as the caller gave them."""

    softmax_scale: float | torch.Tensor | None = None
    causal: bool = False
    window_size: Sequence[int] | torch.Tensor = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    want_lse: bool = False
    attention_chunk: int = 0
    want_probs: bool | None = None  # None: if want_lse; only has an effect with dropout
    num_splits: int = 0
    seed: int | torch.Tensor | None = None  # None: from torch's default generator, if there is dropout

    def checked(self, q: torch.Tensor, batch: int, names: Mapping[str, str] = checks.NO_NAMES) -> dict[str, Any]:
        """The fields of an `AttentionProblem` that follow, each option checked."""
        left, right = checks.window(self.window_size, self.causal)
        dropout_p = checks.dropout_p(self.dropout_p, names)
        fields = {
            "softmax_scale": checks.softmax_scale(self.softmax_scale, q.shape[-1], q, names),
            "window_left": left,
            "window_right": right,
            "softcap": checks.softcap(self.softcap),
            "alibi_slopes": checks.alibi_slopes(self.alibi_slopes, batch, q.shape[-2], q),
            "dropout_p": dropout_p,
            "want_lse": checks.flag(self.want_lse, "return_attn_probs"),
            "attention_chunk": checks.attention_chunk(self.attention_chunk),
            "num_splits": max(0, checks.integer(self.num_splits, "num_splits", "an integer")),
        }
        if dropout_p:
            fields["seed"] = _draw_seed(q) if self.seed is None else self.seed
            fields["want_probs"] = fields["want_lse"] if self.want_probs is None else self.want_probs
        return fields


def _draw_seed(q: torch.Tensor) -> int | torch.Tensor:
    """From torch's default generator: `torch.manual_seed` makes it reproducible, and no device is waited for.

    `randint`, because compilers know that it is random and never merge two of them into one.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if capturing(q) else int(seed)


def dense(q: Any, k: Any, v: Any, options: CallOptions, names: Mapping[str, str] = checks.NO_NAMES) -> AttentionProblem:
    """q `(batch, seqlen_q, heads, head_dim)`; k, v `(batch, seqlen_k, heads_k, head_dim)`; v's head_dim may differ."""
    checks.qkv(q, k, v, ("batch, seqlen_q, heads, head_dim", "batch, seqlen_k, heads_k, head_dim"), names)
    batch, seqlen_q = q.shape[:2]
    if k.shape[0] != batch:
        raise checks.malformed(names.get("k", "k"), k, f"a batch of {batch}, that of {names.get('q', 'q')}")
    seqlen_k = k.shape[1]
    return AttentionProblem(q, k, v, batch, seqlen_q, seqlen_k, **options.checked(q, batch, names))


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    options: CallOptions,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    block_table: Any = None,
    names: Mapping[str, str] = checks.NO_NAMES,
) -> AttentionProblem:
    """q `(total_q, heads, head_dim)`; k, v `(total_k, heads_k, head_dim)`, or paged with `block_table`."""
    kv_dims = "total_k, heads_k, head_dim"
    if block_table is not None:
        name = names.get("block_table", "block_table")
        checks.tensor(block_table, name, "batch, blocks per sequence")  # before it is held against k that it is not
        kv_dims = f"num_blocks, block_size, heads_k, head_dim with {name}"
    checks.qkv(q, k, v, ("total_q, heads, head_dim with cu_seqlens_q", kv_dims), names)
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    queries, keys = packed_lengths((q, k), cu_seqlens, max_seqlens, (seqused_q, seqused_k), block_table, names)
    batch = cu_seqlens_q.shape[0] - 1
    return AttentionProblem(
        q,
        k,
        v,
        batch,
        queries.max_seqlen,
        keys.max_seqlen,
        **options.checked(q, batch, names),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        block_table=block_table,
        max_seqlen_q_tensor=queries.max_seqlen_tensor,
        max_seqlen_k_tensor=keys.max_seqlen_tensor,
        lengths_q=queries.lengths,
        lengths_k=keys.lengths,
    )


def with_lengths(p: AttentionProblem) -> AttentionProblem:
    """`p` with the lengths that the host can read for free, checked: what `varlen` leaves out of a graph."""
    if p.cu_seqlens_q is None:
        return p
    cu_seqlens, max_seqlens = (p.cu_seqlens_q, p.cu_seqlens_k), (p.max_seqlen_q, p.max_seqlen_k)
    queries, keys = packed_lengths((p.q, p.k), cu_seqlens, max_seqlens, (p.seqused_q, p.seqused_k), p.block_table)
    return dataclasses.replace(
        p,
        max_seqlen_q=queries.max_seqlen,
        max_seqlen_k=keys.max_seqlen,
        lengths_q=queries.lengths,
        lengths_k=keys.lengths,
    )
