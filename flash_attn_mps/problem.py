"""`AttentionProblem`: one validated description of any attention call.

Every public function builds one of these and hands it to `dispatch`. It holds views, never copies: a dense batch, a
slice of a packed qkv tensor, a packed batch of ragged sequences and a paged cache are the same problem with other
strides and indices. The semantics are FlashAttention's (version 2.1 and later):

* With `offset = seqlen_k - seqlen_q`, query i sees key j iff `i + offset - left <= j <= i + offset + right`; a side
  that is -1 is open. Causal is right = 0.
* With `attention_chunk` a query sees only the keys of its own chunk: `j // chunk == (i + offset) // chunk`.
* A score is scaled, soft-capped (`cap * tanh(s / cap)`), biased by ALiBi (`- slope * |i + offset - j|`) and masked.
* Query head h reads kv head `h // (heads // heads_k)`.
* A query that sees no key gives zeros, a log-sum-exp of -inf and no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .lengths import packed_lengths


@dataclass(slots=True, eq=False)
class AttentionProblem:
    """One attention call, validated. Treat it as immutable.

    Queries and outputs are dense, `(batch, seqlen_q, heads, head_dim)`, or packed, `(total_q, heads, head_dim)` with
    `cu_seqlens_q`. Keys and values are dense, packed with `cu_seqlens_k`, or paged, `(num_blocks, block, heads_k,
    head_dim)` with `block_table`. All lengths and indices are int32 tensors on the device of the queries.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float | torch.Tensor
    window_left: int = -1
    window_right: int = -1
    attention_chunk: int = 0  # 0: off
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None  # (heads,) or (batch, heads), float32
    dropout_p: float = 0.0
    seed: int | torch.Tensor = 0  # what dropout drops; a tensor in a graph alone, which draws it anew in each run
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,): rows of q of each sequence
    cu_seqlens_k: torch.Tensor | None = None  # (batch + 1,): rows of k and v, or lengths alone where they are paged
    seqused_q: torch.Tensor | None = None  # (batch,): how many of a sequence's queries count
    seqused_k: torch.Tensor | None = None  # (batch,): how many of a sequence's keys count
    # 0-d: max_seqlen_q and max_seqlen_k where only the device knows them; the ints above are then upper bounds.
    max_seqlen_q_tensor: torch.Tensor | None = None
    max_seqlen_k_tensor: torch.Tensor | None = None
    block_table: torch.Tensor | None = None  # (batch, blocks per sequence): pages of k and v
    kv_batch_idx: torch.Tensor | None = None  # (batch,): which batch entry of k and v a sequence reads
    leftpad_k: torch.Tensor | None = None  # (batch,): the row of k and v at which a sequence starts
    want_lse: bool = False  # is the log-sum-exp wanted too?
    want_probs: bool = False  # and the probabilities? Only under dropout
    mask: torch.Tensor | None = (
        None  # broadcast to (batch, heads, seqlen_q, seqlen_k): bool, False hides; float is added
    )
    sinks: torch.Tensor | None = None  # (heads,), float32: a score that every query of the head has besides its keys
    lengths_q: list[int] | None = None  # the lengths, where the host can read them for free; None where it cannot
    lengths_k: list[int] | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def heads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def window(self) -> tuple[int, int]:
        """`(window_left, window_right)`, where a side that hides nothing at these lengths is open too."""
        left, right = self.window_left, self.window_right
        return -1 if left >= self.max_seqlen_k - 1 else left, -1 if right >= self.max_seqlen_q - 1 else right

    @property
    def ragged_q(self) -> bool:
        """Do the sequences differ in their number of queries?"""
        return self.cu_seqlens_q is not None or self.seqused_q is not None

    @property
    def ragged_k(self) -> bool:
        """Do the sequences differ in their number of keys?"""
        return self.cu_seqlens_k is not None or self.seqused_k is not None or self.leftpad_k is not None

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """`(batch, heads, seqlen_q)`, or `(heads, total_q)` for packed queries."""
        if self.cu_seqlens_q is None:
            return (self.batch, self.heads, self.q.shape[1])
        return (self.heads, self.q.shape[0])

    @property
    def empty(self) -> bool:
        """Is there no score to compute?"""
        return self.q.numel() == 0 or self.k.numel() == 0 or self.max_seqlen_q == 0 or self.max_seqlen_k == 0

    def resolved(self) -> AttentionProblem:
        """The same problem with exact `max_seqlen_q` and `max_seqlen_k`; waits for the device if only it knows them."""
        device_q, device_k = self.max_seqlen_q_tensor, self.max_seqlen_k_tensor
        if device_q is None and device_k is None:
            return self
        return dataclasses.replace(
            self,
            max_seqlen_q=self.max_seqlen_q if device_q is None else min(self.max_seqlen_q, int(device_q)),
            max_seqlen_k=self.max_seqlen_k if device_k is None else min(self.max_seqlen_k, int(device_k)),
            max_seqlen_q_tensor=None,
            max_seqlen_k_tensor=None,
        )

    @property
    def requires_grad(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        sinks = self.sinks
        return (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or (sinks is not None and sinks.requires_grad)
        )


@dataclass(slots=True, eq=False)
class Result:
    """What a tier gives back.

    `out` of shape `AttentionProblem.out_shape`; `lse`, float32 `AttentionProblem.lse_shape`, if it was wanted; `probs`
    `(batch, heads, max_seqlen_q, max_seqlen_k)` if it was wanted and there is dropout: negative where dropped.
    """

    out: torch.Tensor
    lse: torch.Tensor | None = None
    probs: torch.Tensor | None = None


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
    want_probs: bool | None = None  # None: with the log-sum-exp; counts under dropout alone
    seed: int | torch.Tensor | None = None  # None: from torch's default generator, if there is dropout

    def checked(self, q: torch.Tensor, batch: int) -> dict[str, Any]:
        left, right = checks.window(self.window_size, self.causal)
        dropout_p = checks.dropout_p(self.dropout_p)
        fields = {
            "softmax_scale": checks.softmax_scale(self.softmax_scale, q.shape[-1], q),
            "window_left": left,
            "window_right": right,
            "softcap": checks.softcap(self.softcap),
            "alibi_slopes": checks.alibi_slopes(self.alibi_slopes, batch, q.shape[-2], q),
            "dropout_p": dropout_p,
            "want_lse": bool(self.want_lse),
            "attention_chunk": checks.attention_chunk(self.attention_chunk),
        }
        if dropout_p:
            fields["seed"] = _draw_seed() if self.seed is None else self.seed
            fields["want_probs"] = bool(self.want_lse if self.want_probs is None else self.want_probs)
        return fields


def _draw_seed() -> int | torch.Tensor:
    """From torch's default generator: `torch.manual_seed` makes it reproducible, and no device is waited for.

    `randint` because compilers know it for random: two of them in a graph are never taken for one.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if torch.compiler.is_compiling() else int(seed)


def dense(q: Any, k: Any, v: Any, options: CallOptions, names: Mapping[str, str] = checks.NO_NAMES) -> AttentionProblem:
    """q `(batch, seqlen_q, heads, head_dim)`; k, v `(batch, seqlen_k, heads_k, head_dim)`; v's head_dim may differ."""
    checks.qkv(q, k, v, ("batch, seqlen_q, heads, head_dim", "batch, seqlen_k, heads_k, head_dim"), names)
    batch, seqlen_q = q.shape[:2]
    if k.shape[0] != batch:
        raise checks.malformed(names.get("k", "k"), k, f"a batch of {batch}, that of {names.get('q', 'q')}")
    seqlen_k = k.shape[1]
    return AttentionProblem(q, k, v, batch, seqlen_q, seqlen_k, **options.checked(q, batch))


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
    paged = block_table is not None
    kv_dims = "num_blocks, block_size, heads_k, head_dim" if paged else "total_k, heads_k, head_dim"
    checks.qkv(q, k, v, ("total_q, heads, head_dim", kv_dims), names)
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
        **options.checked(q, batch),
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


def with_qv(p: AttentionProblem, qv: Any, softmax_scale: Any) -> AttentionProblem:
    """`p` with scores `q k^T + qv v^T`: one product over both head dims. qv has the shape of the output.

    The scale defaults to `1 / sqrt(head_dim + head_dim of v)`, as upstream's does.
    """
    checks.qv(qv, p.out_shape, p.q)
    q, k = torch.cat([p.q, qv], -1), torch.cat([p.k, p.v], -1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else p.softmax_scale
    return dataclasses.replace(p, q=q, k=k, softmax_scale=scale)


def with_mask(p: AttentionProblem, mask: Any, name: str = "attn_mask") -> AttentionProblem:
    """`p` with a mask on its scores: bool, where False hides, or of q's dtype or float32, where it is added.

    mask broadcasts to `(batch, heads, seqlen_q, seqlen_k)`; fewer dimensions are the last ones, and nothing is copied.
    It comes on top of the window, after scale, softcap and ALiBi; what is added to a score of base e. An added -inf
    hides a key; the least finite number does not: queries that see nothing else see such keys alike.

    Rows and columns are positions in a sequence: with `seqused_k` those past its end do not matter, with `leftpad_k`
    column 0 is its first key. A packed batch is refused, because nothing bounds its lengths by the shape of a mask.

    Raises ValueError for another dtype, device or shape, NotImplementedError for a packed batch or a mask that
    requires grad.
    """
    if p.cu_seqlens_q is not None or p.cu_seqlens_k is not None:
        raise checks.unsupported(name, "a mask for a packed batch", "a mask for queries (batch, seqlen_q, heads, ...)")
    shape = (p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k)
    return dataclasses.replace(p, mask=checks.mask(mask, name, shape, p.q))


def with_sinks(p: AttentionProblem, sinks: Any, name: str = "sinks") -> AttentionProblem:
    """`p` with attention sinks `(heads,)`: a score, not scaled, that every query of a head has besides its keys.

    Its value is zero, so it only takes part in the softmax's denominator and in the log-sum-exp. Any floating dtype;
    computed in float32. Gradients reach it. A query that sees no key gives zeros, and the sink as log-sum-exp.
    """
    return dataclasses.replace(p, sinks=checks.sinks(sinks, name, p.heads, p.q))
