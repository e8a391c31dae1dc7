"""The trials of `decode` and of the kernel that puts its splits together (`decode.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ...problem import AttentionProblem
from .. import reference
from . import trial
from .specialization import Specialization
from .trial import Expected, Trial

_SPLITS = 3
_SPLITS_TO_COMBINE = 10  # more than the simdgroups that take them in turn


def decode(s: Specialization) -> Trial:
    """Two tiles and more, and keys for every unit of a threadgroup twice; the results are whole, or in splits."""
    a_round, queries = s.variant.units * s.variant.keys, s.variant.rows // s.variant.heads_in_tile + 3
    if "partial_o" not in s.buffers:
        made = trial.forward(s, queries, 2 * a_round + 13, heads=s.variant.heads_in_tile)
        parameters = {"splits": 1, "partial_rows": _rows(made.problem)}
        problem = dataclasses.replace(made.problem, num_splits=1)
        return Trial(problem, {**made.tensors, "partial_o": None, "partial_m_l": None}, made.expected, parameters)
    p = trial.problem(s, queries, 3 * a_round + 40, seen=False, heads=s.variant.heads_in_tile)
    p = dataclasses.replace(p, num_splits=_SPLITS)
    longest = p.max_seqlen_k if p.window_left < 0 else min(p.max_seqlen_k, p.window_left + p.max_seqlen_q)
    splits = min(_SPLITS, -(-longest // a_round))  # as `splits_of` has it
    exact = reference.run(trial.in_fp32(p))
    assert exact.lse is not None
    m_l = trial.unwritten((splits, _rows(p), 2), torch.float32)
    o = trial.unwritten((splits, _rows(p), -(-s.head_dim_v // 8) * 8), torch.float32)
    outputs = trial.outputs(p)

    def put_together(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        written = ~tensors["partial_m_l"][..., 0].isnan()  # there may be fewer parts than splits
        return _combined(p, tensors["partial_o"], tensors["partial_m_l"], written)

    expected = {
        "partial_o": Expected(exact.out, trial.allowed(p), lambda tensors: put_together(tensors)[0]),
        "partial_m_l": Expected(
            exact.lse,
            2e-5 * (1.0 + exact.lse.nan_to_num(0.0, 0.0, 0.0).abs()),
            lambda tensors: put_together(tensors)[1],
        ),
    }
    tensors = {"q": p.q, "k": p.k, "v": p.v, **outputs, "partial_o": o, "partial_m_l": m_l}
    if "lse" not in s.buffers:
        tensors["lse"] = None
    return Trial(p, tensors, expected, {"splits": splits, "partial_rows": _rows(p)})


def combine(s: Specialization) -> Trial:
    """Of as many parts as a sequence has, others hold NaN. Every key is seen: parts follow from lengths."""
    a_round, queries = s.variant.units * s.variant.keys, s.variant.rows // s.variant.heads_in_tile + 3
    p = trial.problem(s, queries, _SPLITS_TO_COMBINE * a_round - 5, seen=False, heads=s.variant.heads_in_tile)
    p = dataclasses.replace(
        p,
        num_splits=_SPLITS_TO_COMBINE,
        window_left=p.max_seqlen_k if s.left else -1,
        window_right=p.max_seqlen_q if s.right else -1,
    )
    generator = torch.Generator("cpu").manual_seed(0)
    m_l = torch.rand((_SPLITS_TO_COMBINE, _rows(p), 2), generator=generator, dtype=torch.float32, device="cpu") + 0.5
    m_l[..., 0] = 8.0 * m_l[..., 0] / _unit(p)
    o = torch.randn(
        (_SPLITS_TO_COMBINE, _rows(p), -(-s.head_dim_v // 8) * 8),
        generator=generator,
        dtype=torch.float32,
        device="cpu",
    )
    queries_of, parts = trial.lengths_of_rows(p)
    parts = torch.where(
        parts > 0, -(-parts // (-(-parts // (_SPLITS_TO_COMBINE * a_round)) * a_round).clamp(min=1)), parts
    )
    counts = parts.where(queries_of, 0).repeat_interleave(p.heads)
    given = torch.arange(_SPLITS_TO_COMBINE, device="cpu")[:, None] < counts
    m_l.masked_fill_(~given[..., None], torch.nan)
    out, lse = _combined(p, o, m_l, given)
    outputs = trial.outputs(p)
    expected = {"out": Expected(out, 2 * torch.finfo(p.q.dtype).eps * 8.0 + 2e-5)}
    if "lse" in s.buffers:
        expected["lse"] = Expected(lse, 2e-5 * (1.0 + lse.nan_to_num(0.0, 0.0, 0.0).abs()))
    else:
        outputs["lse"] = None
    tensors = {"partial_o": o, "partial_m_l": m_l, **outputs}
    return Trial(p, tensors, expected, {"splits": _SPLITS_TO_COMBINE, "partial_rows": _rows(p)})


def _rows(p: AttentionProblem) -> int:
    return p.q.numel() // p.q.shape[-1]


def _unit(p: AttentionProblem) -> float:
    """What makes a difference of the scores that kernels keep one of base e: SCORES_ARE_SCALED in scoring.metal."""
    return 1.0 if trial.scores_are_scaled(p) else float(p.softmax_scale)


def _combined(
    p: AttentionProblem, o: torch.Tensor, m_l: torch.Tensor, given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp of the parts that are `given`, (splits, rows), as combine.metal has them."""
    m = (m_l[..., 0].double() * _unit(p)).masked_fill(~given, -torch.inf)
    l, o = m_l[..., 1].double().masked_fill(~given, 0.0), o.double().masked_fill(~given[..., None], 0.0)
    largest = m.amax(0)
    heads_last = (*p.q.shape[:-1],)
    exists = trial.lengths_of_rows(p)[0].repeat_interleave(p.heads)
    if p.sinks is not None:
        sinks = p.sinks.double().expand(heads_last).reshape(-1)
        largest = torch.maximum(largest, sinks)
    base = largest.masked_fill(largest == -torch.inf, 0.0)
    weight = (m - base).exp()
    total = (weight * l).sum(0)
    if p.sinks is not None:
        total = total + (sinks - base).exp()
    summed = (weight[..., None] * o).sum(0)[..., : p.v.shape[-1]]
    out = (summed / total.masked_fill(total == 0.0, 1.0)[:, None]).masked_fill(~exists[:, None], 0.0)
    lse = (base + total.log()).masked_fill(~exists, -torch.inf)
    return out.view(p.out_shape), lse.view(heads_last).transpose(-1, -2)
