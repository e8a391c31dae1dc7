"""`AttentionProblem`: one validated description of any attention call.

Every public function builds one of these (`describe`) and hands it to `dispatch`. It holds views, never copies: a dense
batch, a slice of a packed qkv tensor, a packed batch of ragged sequences and a paged cache are the same problem with
other strides and indices. The semantics are FlashAttention's (version 2.1 and later):

* With `offset = seqlen_k - seqlen_q`, query i sees key j iff `i + offset - left <= j <= i + offset + right`; a side
  that is -1 is open. Causal is right = 0.
* With `attention_chunk` a query sees only the keys of its own chunk: `j // chunk == (i + offset) // chunk`.
* A score is scaled, soft-capped (`cap * tanh(s / cap)`), biased by ALiBi (`- slope * |i + offset - j|`) and masked.
* Query head h reads kv head `h // (heads // heads_k)`. Quantised keys and values count as what they stand for.
* A query that sees no key gives zeros, a log-sum-exp of -inf and no gradient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from . import checks


@dataclass(slots=True, eq=False)
class AttentionProblem:
    """One attention call, validated. Treat it as immutable.

    Queries and outputs are dense, `(batch, seqlen_q, heads, head_dim)`, or packed, `(total_q, heads, head_dim)` with
    `cu_seqlens_q`. Keys and values are dense, packed with `cu_seqlens_k`, or paged, `(num_blocks, block, heads_k,
    head_dim)` with `block_table`. All lengths and indices are int32 tensors on the device of the queries.

    The basic fields are those that every tier must honour. Every other field belongs to a feature. A call goes only
    to tiers that declare all of its `features`, so no tier gets a call with something that it has never heard of.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float | torch.Tensor
    want_lse: bool = False  # is the log-sum-exp wanted too?
    lengths_q: list[int] | None = None  # the lengths, where the host can read them for free; None where it cannot
    lengths_k: list[int] | None = None
    # At most into how many parts keys may be split, to be computed apart: 0, as many as suit; 1, none, so that a
    # sequence's result does not depend on the batch around it.
    num_splits: int = 0
    # From here on each field belongs to a feature: see `_features_of`.
    window_left: int = -1
    window_right: int = -1
    attention_chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None  # (heads,) or (batch, heads), float32
    dropout_p: float = 0.0
    seed: int | torch.Tensor = 0  # in a graph a tensor, drawn anew in each run
    want_probs: bool = False  # are the probabilities wanted too?
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,): rows of q of each sequence
    cu_seqlens_k: torch.Tensor | None = None  # (batch + 1,): rows of k and v, or lengths where paged
    # 0-d: max_seqlen_q and max_seqlen_k where only the device knows them; the ints above are then upper bounds.
    max_seqlen_q_tensor: torch.Tensor | None = None
    max_seqlen_k_tensor: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None  # (batch,): how many of a sequence's queries count
    seqused_k: torch.Tensor | None = None  # (batch,): how many of a sequence's keys count
    block_table: torch.Tensor | None = None  # (batch or more, blocks per sequence): pages of k and v
    kv_batch_idx: torch.Tensor | None = (
        None  # (batch,): the entry of k and v that a sequence reads, or its row of block_table
    )
    leftpad_k: torch.Tensor | None = None  # (batch,): the row of k and v at which a sequence starts
    # (batch, heads_k), float32: what k and v are to be multiplied by, where their dtype is one of quantised.FORMATS.
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    # Four dimensions that broadcast to (batch, heads, seqlen_q, seqlen_k): bool, False hides; float is added.
    mask: torch.Tensor | None = None
    # (heads,), float32: an extra score for every query of the head, in addition to its keys.
    sinks: torch.Tensor | None = None
    # Will the output be differentiated? want_lse is set then: every backward pass needs the log-sum-exp.
    needs_grad: bool = False
    forward_mode: bool = False  # do tensors carry tangents, which the result must carry on?
    _features: frozenset[str] | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def features(self) -> frozenset[str]:
        """What of `FEATURES` this call needs besides plain attention. Computed once."""
        found = self._features
        if found is None:
            found = self._features = _features_of(self)
        return found

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
        return (
            self.batch == 0
            or self.q.numel() == 0
            or self.k.numel() == 0
            or self.max_seqlen_q == 0
            or self.max_seqlen_k == 0
        )

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
        """Does autograd want to know what is computed from this problem's tensors?"""
        if not torch.is_grad_enabled():
            return False
        sinks, mask = self.sinks, self.mask
        return (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or (sinks is not None and sinks.requires_grad)
            or (mask is not None and mask.requires_grad)
        )


# The tensors that may have a gradient: what a backward pass is asked for is a set of these names.
DIFFERENTIABLE = ("q", "k", "v", "sinks", "mask")


# Every feature, in the order in which people read them.
FEATURES = (
    "causal",
    "window",
    "attention_chunk",
    "softcap",
    "alibi",
    "dropout",
    "probabilities",
    "varlen",
    "seqused",
    "paged",
    "kv_batch_idx",
    "leftpad_k",
    "quantised",
    "mask",
    "sinks",
    "scale_tensor",
    "gradients",
    "forward_mode",
)


def _features_of(p: AttentionProblem) -> frozenset[str]:
    """Written out, as every call comes through here. tests/attention/test_features.py sees that no field is missed."""
    found = []
    if p.window_left >= 0 or p.window_right >= 0:
        left, right = p.window  # what it comes to at these lengths
        if left >= 0 or right > 0:
            found.append("window")
        elif right == 0:  # more tiers serve this alone
            found.append("causal")
    if p.attention_chunk:
        found.append("attention_chunk")
    if p.softcap:
        found.append("softcap")
    if p.alibi_slopes is not None:
        found.append("alibi")
    if p.dropout_p:
        found.append("dropout")
    if p.want_probs:
        found.append("probabilities")
    if p.cu_seqlens_q is not None or p.cu_seqlens_k is not None:
        found.append("varlen")
    if p.seqused_q is not None or p.seqused_k is not None:
        found.append("seqused")
    if p.block_table is not None:
        found.append("paged")
    if p.kv_batch_idx is not None:
        found.append("kv_batch_idx")
    if p.leftpad_k is not None:
        found.append("leftpad_k")
    if p.k.dtype is not p.q.dtype or p.k_descale is not None or p.v_descale is not None:
        found.append("quantised")
    if p.mask is not None:
        found.append("mask")
    if p.sinks is not None:
        found.append("sinks")
    if type(p.softmax_scale) is not float and isinstance(p.softmax_scale, torch.Tensor):
        found.append("scale_tensor")
    if p.needs_grad:
        found.append("gradients")
    if p.forward_mode:
        found.append("forward_mode")
    return frozenset(found)


@dataclass(slots=True, eq=False)
class Result:
    """What a tier gives back.

    `out` of shape `AttentionProblem.out_shape`; `lse`, float32 `AttentionProblem.lse_shape`, if it was wanted; `probs`
    `(batch, heads, max_seqlen_q, max_seqlen_k)` if it was wanted and there is dropout: negative where dropped.
    """

    out: torch.Tensor
    lse: torch.Tensor | None = None
    probs: torch.Tensor | None = None


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
    hides a key; an added finfo.min does not: a query whose keys all have it gives the average of their values.
    What is added is differentiable. Its gradient has its shape, so pass a bias that heads or queries share as it is: an
    expanded one has a gradient of the full shape.

    Rows and columns are positions in a sequence: with `seqused_k` those past its end do not matter, with `leftpad_k`
    column 0 is its first key. A packed batch is rejected: nothing ties its lengths to the shape of a mask.

    Raises ValueError for another dtype, device or shape, NotImplementedError for a packed batch.
    """
    if p.cu_seqlens_q is not None or p.cu_seqlens_k is not None:
        raise checks.unsupported(name, "a mask for a packed batch", "a mask for queries (batch, seqlen_q, heads, ...)")
    shape = (p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k)
    return dataclasses.replace(p, mask=checks.mask(mask, name, shape, p.q))


def with_sinks(p: AttentionProblem, sinks: Any, name: str = "sinks") -> AttentionProblem:
    """`p` with attention sinks `(heads,)`: an extra, unscaled score for every query of a head, in addition to its keys.

    Its value vector is zero, so it only adds to the softmax's denominator and to the log-sum-exp. Any floating dtype;
    computed in float32; differentiable. A query that sees no key gives zeros, and the sink as its log-sum-exp.
    """
    return dataclasses.replace(p, sinks=checks.sinks(sinks, name, p.heads, p.q))
