"""The trials of the kernels of the backward pass (`backward.py`): each gets what others would give, from PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...problem import AttentionProblem
from .. import reference
from ..tier import Gradients
from . import trial
from .launch import float_bits
from .specialization import Specialization
from .trial import Expected, Trial

_LOG2E = 1.4426950408889634
_LARGE_LSE = 100.0  # less than that of the last head: its queries are walked


class _Exact(NamedTuple):
    """A problem with its output and gradients, in float32 but for what the kernels read."""

    p: AttentionProblem
    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor  # of the shape of lse
    gradients: Gradients


def rows(s: Specialization) -> Trial:
    """*Rows*: with its terms, p is that of the log-sum-exp, whichever of the two ways they were found."""
    exact = _exact(s, s.variant.held * s.variant.simdgroups, 8)
    p, lse, seen = exact.p, exact.lse, exact.lse != -torch.inf
    dlse = _like(lse, 2) if "dlse" in s.buffers else None
    delta = exact.delta if dlse is None else exact.delta - dlse
    of_sink = torch.zeros_like(lse)
    if p.sinks is not None:
        of_sink = torch.exp(p.sinks[:, None] - lse.masked_fill(~seen, torch.inf)) * -delta
    unit = _LOG2E if trial.scores_are_scaled(p) else float(p.softmax_scale) * _LOG2E

    def compared(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        terms = tensors["terms"]
        return torch.stack([terms[..., 0] * unit + terms[..., 1], terms[..., 2], terms[..., 3]])

    zero = torch.zeros_like(lse)
    log2_l = torch.where(seen, lse * _LOG2E, torch.inf)
    kept = delta * (1.0 - p.dropout_p)  # what the gradients of probabilities are compared with before they are scaled
    value = torch.stack([log2_l, torch.where(seen, kept, zero), torch.where(seen, of_sink, zero)])
    size = torch.stack([2e-5 * (1 + (lse.masked_fill(~seen, 0.0)).abs()), *[_rounding(s, delta, lse)] * 2])
    tensors = {
        **_inputs(exact),
        "out": exact.out.to(p.q.dtype),
        "lse": lse,
        "dlse": dlse,
        "terms": trial.unwritten((*p.lse_shape, 4), torch.float32),
    }
    return Trial(p, tensors, {"terms": Expected(value, size, compared)}, {"large_lse": float_bits(_LARGE_LSE)})


def queries(s: Specialization) -> Trial:
    """*Queries*: dq."""
    exact = _exact(s, s.variant.held * s.variant.simdgroups, s.variant.passing)
    dq = trial.unwritten(tuple(exact.p.q.shape), exact.p.q.dtype)
    tensors = {**_inputs(exact), "terms": _terms(exact), "dq": dq}
    return Trial(exact.p, tensors, {"dq": _expected(s, exact.gradients.dq)})


def keys(s: Specialization) -> Trial:
    """*Keys*: dk and dv, of each KV head or, in float32, of each query head."""
    exact = _exact(s, s.variant.passing, s.variant.held * s.variant.simdgroups)
    p, gradients = exact.p, exact.gradients
    heads, dtype = p.heads_k, p.q.dtype
    if s.kernel.buffers["dk"].type == "float":
        heads, dtype = p.heads, torch.float32
        each = [x.repeat_interleave(heads // p.heads_k, -2) for x in (p.k, p.v)]
        gradients = _gradients(dataclasses.replace(p, k=each[0], v=each[1]), exact.out, exact.lse, exact.dout)
    expected, tensors = {}, {**_inputs(exact), "terms": _terms(exact), "dk": None, "dv": None}
    for name, like in (("dk", p.k), ("dv", p.v)):
        if name in s.buffers:
            tensors[name] = trial.unwritten((*like.shape[:-2], heads, like.shape[-1]), dtype)
            expected[name] = _expected(s, getattr(gradients, name))
    total = p.k.shape[1] if p.cu_seqlens_k is None else p.k.shape[0]
    return Trial(p, tensors, expected, {"total_k": total, "heads_together": p.heads // heads})


def mask(s: Specialization) -> Trial:
    """*Mask*: the gradient of the mask, in the mask's own shape: one for all along the axes where it is broadcast."""
    exact = _exact(s, s.variant.passing, s.variant.held * s.variant.simdgroups)
    p = exact.p
    assert p.mask is not None
    wanted = frozenset({"mask"})
    each = reference.backward(trial.in_fp32(p), exact.out.float(), exact.lse, exact.dout.float(), None, wanted).dmask
    assert each is not None
    axes = [axis for axis, stride in enumerate(p.mask.stride()) if stride == 0]
    p = dataclasses.replace(p, mask=p.mask[tuple(slice(0, 1 if axis in axes else None) for axis in range(4))])
    assert p.mask is not None
    total, magnitude = (x.sum(axes, keepdim=True) if axes else x for x in (each, each.abs()))
    names = ("mask_batches", "mask_heads", "mask_rows", "mask_columns")
    tensors = {**_inputs(exact), "terms": _terms(exact), "dmask": trial.unwritten(tuple(p.mask.shape), p.mask.dtype)}
    expected = Expected(total, _rounding(s, magnitude, total) + 1e-5)
    return Trial(p, tensors, {"dmask": expected}, dict(zip(names, p.mask.shape, strict=True)))


def _exact(s: Specialization, queries: int, keys: int) -> _Exact:
    """queries, keys: that a threadgroup of a kernel takes together."""
    seqlen_q = max(queries + 19, 2 * keys + 18, keys + 24)
    # A query that sees NaN makes every gradient NaN. Of more keys than queries, a window hides the first from all.
    p = trial.problem(s, seqlen_q, seqlen_q - 5, seen=False)
    exact = trial.in_fp32(p)
    result = reference.run(exact)
    assert result.lse is not None
    out = result.out.to(p.q.dtype)
    dout = _like(out, 1)
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    return _Exact(p, dout, out, result.lse, delta, _gradients(p, out, result.lse, dout))


def _gradients(p: AttentionProblem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor) -> Gradients:
    needed = frozenset({"q", "k", "v"})
    return reference.backward(trial.in_fp32(p), out.float(), lse, dout.float(), None, needed)


def _inputs(exact: _Exact) -> dict[str, torch.Tensor | None]:
    """A query that sees nothing gives nothing, whatever the gradient of its output is."""
    p, nothing = exact.p, (exact.lse == -torch.inf).transpose(-1, -2)[..., None]
    return {"q": p.q, "k": p.k, "v": p.v, "dout": exact.dout.masked_fill(nothing, torch.nan)}


def _terms(exact: _Exact) -> torch.Tensor:
    """What *rows* gives, in its plain form."""
    seen = exact.lse != -torch.inf
    zero = torch.zeros_like(exact.lse)
    log2_l = torch.where(seen, exact.lse * _LOG2E, torch.inf)
    kept = exact.delta * (1.0 - exact.p.dropout_p)
    return torch.stack([zero, log2_l, torch.where(seen, kept, zero), zero], -1)


def _expected(s: Specialization, gradient: torch.Tensor | None) -> Expected:
    """A gradient is a sum of products that are rounded to the dtype one by one."""
    assert gradient is not None
    return Expected(gradient, _rounding(s, gradient, gradient) + 1e-5)


def _rounding(s: Specialization, largest: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    eps = torch.finfo(
        torch.float32 if s.dtype == "float" else torch.float16 if s.dtype == "half" else torch.bfloat16
    ).eps
    return torch.full_like(like, (4 * eps + 2e-4) * largest.nan_to_num(0.0, 0.0, 0.0).abs().max().item())


def _like(x: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float32, device=x.device).to(x.dtype)
