"""The backward pass of the `simdgroup` tier: gradients by kernels without atomics (`kernels/backward.metal`).

*Rows* finds out what the others must know of each query: 16 bytes for each, the only memory beside the gradients that
grows with the length. *Queries* makes dq, *keys* dk and dv, *mask* the gradient of a mask that is added; each
computes the probabilities anew (FlashAttention-2, algorithm 2: Dao, 2023, https://arxiv.org/abs/2307.08691). For dq, dk
and dv that is 7 products to the forward pass's 2, where one kernel with atomics would do 5; in exchange every sum has
one order: equal calls give equal bits, and dq needs no buffer in float32. docs/backward.md has shapes and costs.
"""

from __future__ import annotations

import itertools

import torch

from ...problem import AttentionProblem
from ..tier import LARGE_LSE, LSE_GRADIENT, MASK_GRADIENT, Gradients
from . import gpu, launch, variants
from .backward_kernels import KEYS, KEYS_OF_EACH_HEAD, MASK, QUERIES, ROWS, ROWS_VARIANT, Variant, mask_variant

# Keys in pages, in entries of a cache or behind padding are those of inference: the tier `torch` has their gradients.
SERVES_BACKWARD = frozenset(
    {
        "causal",
        "window",
        "softcap",
        "alibi",
        "dropout",
        "varlen",
        "seqused",
        "mask",
        "sinks",
        "scale_tensor",
        "gradients",
        LSE_GRADIENT,
        MASK_GRADIENT,
    }
)

_SIMDGROUPS_PER_CORE = 24  # that hide each other's loads


def run(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients | None:
    """The gradients, enqueued without waiting. None where a kernel does not compile on this machine."""
    queries, keys = variants.chosen(p, QUERIES), variants.chosen(p, KEYS)
    return compute(p, out, lse, dout, dlse, needed, queries, keys, each_head(p, keys))


def each_head(p: AttentionProblem, keys: Variant) -> bool:
    """Are KV heads so few that the GPU is only filled by a threadgroup of *keys* for each query head?"""
    return p.heads > p.heads_k and _simdgroups(p, keys) < _SIMDGROUPS_PER_CORE * gpu.cores()


def compute(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
    queries: Variant,
    keys: Variant,
    each_head: bool,
) -> Gradients | None:
    """`run` by these variants. `each_head`: is there a threadgroup of *keys* for each query head, not each KV head?"""
    q, k, v, out, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (p.q, p.k, p.v, out, dout))
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    terms = q.new_empty((*p.lse_shape, 4), dtype=torch.float32)
    rows = {"out": out, "lse": lse.contiguous(), "dlse": None if dlse is None else dlse.contiguous(), "terms": terms}
    # Where one is larger, *rows* computes the scores of the query once more.
    large = {"large_lse": launch.float_bits(LARGE_LSE[q.dtype])}
    if not launch.enqueue(ROWS, p, ROWS_VARIANT, {**inputs, **rows}, large):
        return None
    inputs["terms"] = terms
    dq = dk = dv = dmask = None
    if "q" in needed:
        dq = q.new_empty(q.shape)
        tried = itertools.chain((queries,), variants.instead(p, QUERIES, queries))
        if not any(launch.enqueue(QUERIES, p, variant, {**inputs, "dq": dq}) for variant in tried):
            return None
    if needed & {"k", "v"}:
        tried = itertools.chain((keys,), variants.instead(p, KEYS, keys))
        makes = (_gradients_of_keys(p, inputs, needed, variant, each_head) for variant in tried)
        made = next((made for made in makes if made is not None), None)
        if made is None:
            return None
        dk, dv = made
    if "mask" in needed and p.mask is not None:
        dmask = p.mask.new_empty(p.mask.shape)
        shape = dict(zip(("mask_batches", "mask_heads", "mask_rows", "mask_columns"), p.mask.shape, strict=True))
        variant = mask_variant(q.itemsize, q.shape[-1], v.shape[-1])
        if not launch.enqueue(MASK, p, variant, {**inputs, "dmask": dmask}, shape):
            return None
    dsinks = terms[..., 3].transpose(-1, -2).flatten(0, -2).sum(0) if "sinks" in needed else None
    return Gradients(dq, dk, dv, dsinks, dmask)


def _gradients_of_keys(
    p: AttentionProblem, inputs: dict[str, torch.Tensor], needed: frozenset[str], variant: Variant, each_head: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """dk and dv, those that are needed."""
    kernel, heads, dtype = (KEYS_OF_EACH_HEAD, p.heads, torch.float32) if each_head else (KEYS, p.heads_k, p.q.dtype)
    parameters = {
        "total_k": p.k.shape[1] if p.cu_seqlens_k is None else p.k.shape[0],
        "heads_together": p.heads // heads,
    }
    made: dict[str, torch.Tensor | None] = {"dk": None, "dv": None}
    for name in ("k", "v"):
        if name in needed:
            *rows, _, dim = inputs[name].shape
            made["d" + name] = inputs[name].new_empty((*rows, heads, dim), dtype=dtype)
    launches = [made]
    if variant.split and needed >= {"k", "v"}:
        launches = [{**made, "dv": None}, {**made, "dk": None}]
    for outputs in launches:
        if not launch.enqueue(kernel, p, variant, {**inputs, **outputs}, parameters):
            return None
    dk, dv = made.values()
    if each_head:
        dk, dv = (t if t is None else t.unflatten(-2, (p.heads_k, -1)).sum(-2).to(p.q.dtype) for t in (dk, dv))
    return dk, dv


def _simdgroups(p: AttentionProblem, variant: Variant) -> int:
    """How many of *keys* have work, at most."""
    keys = p.k.shape[0] if p.cu_seqlens_k is not None else p.k.shape[1] * p.batch
    return -(-keys // variant.held) * p.heads_k
