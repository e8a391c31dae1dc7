"""Running cases, and the rule by which a result is right."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import quantised
from ...problem import AttentionProblem, Result
from ...tiers import BY_NAME, Gradients, cpu
from ...tiers.metal import backward, compiler, launch, simdgroup, tensorops
from . import cases
from .build import Built, build
from .cases import Case

# The outcomes of a case. If one of _OPTIONAL does not serve it, that is no failure: PyTorch decides what the cpu tier
# supports, and `mtlflashattn tune` which calls tensor operations are faster for.
RIGHT, WRONG, NOT_COMPILED, RAISED, NOT_SERVED = "right", "wrong", "not compiled", "raised", "not served"
_OPTIONAL = (cpu.TIER.name, tensorops.TIER.name)


class Outcome(NamedTuple):
    """`share`: the largest error as a share of what is allowed; 0 where there is no result."""

    case: Case
    status: str
    share: float = 0.0
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status != RIGHT and not (self.status == NOT_SERVED and self.case.tier in _OPTIONAL)


def run(case: Case, device: torch.device | str) -> Outcome:
    """Run one case on `device`; never raises."""
    try:
        built = build(case, device)
        tier = BY_NAME[case.tier]
        reasons = tier.unsupported_reasons(built.problem)
        if built.dout is not None:
            reasons += tier.unsupported_backward_reasons(built.problem, False, frozenset(built.gradients))
        if reasons:
            return Outcome(case, NOT_SERVED, detail="; ".join(dict.fromkeys(reasons)))
        known = set(compiler.failures)
        result = _result(case, built.problem)
        gradients = Gradients() if result is None else _gradients(case, built, result)
        if result is None or gradients is None:
            logs = [log for specialization, log in compiler.failures.items() if specialization not in known]
            return Outcome(case, NOT_COMPILED, detail=logs[0] if logs else "as in a case before")
        return _judged(case, built, result, gradients)
    except Exception as error:  # whatever happens on somebody's machine belongs in the report
        return Outcome(case, RAISED, detail=f"{type(error).__name__}: {error}")


def _result(case: Case, p: AttentionProblem) -> Result | None:
    if not case.variant or p.needs_grad:
        return BY_NAME[case.tier].run(p)
    variant = cases.variants(case)[case.variant]
    return tensorops.run(p, variant) if case.tier == tensorops.TIER.name else launch.run(p, simdgroup.FORWARD, variant)


def _gradients(case: Case, built: Built, result: Result) -> Gradients | None:
    """None where a kernel does not compile; empty where none are to be computed."""
    tier, p, lse, dout, needed = BY_NAME[case.tier], built.problem, result.lse, built.dout, frozenset(built.gradients)
    if dout is None or lse is None or tier.backward is None:
        return Gradients()
    if not case.variant:
        return tier.backward(p, result.out, lse, dout, None, needed)
    keys = cases.variants(case)[case.variant]
    queries, each_head = keys._replace(split=False), backward.each_head(p, keys)
    return backward.compute(p, result.out, lse, dout, None, needed, queries, keys, each_head)


def _judged(case: Case, built: Built, result: Result, gradients: Gradients) -> Outcome:
    dtype = getattr(torch, case.dtype)
    lse = None if result.lse is None or not built.problem.want_lse else result.lse.cpu()
    worst, detail = 0.0, ""
    for b, (out, row_lse) in enumerate(built.of_sequences(result.out.cpu(), lse)):
        exact = built.out[b]
        if not out.numel():
            continue
        # Probabilities and output are rounded once each to the dtype of v. All else is float32: scores of up to 20,
        # whose exponentials a GPU gives to a few units in the last place.
        largest = max(1.0, exact.abs().max().item(), _largest(built.problem)) / (1.0 - built.problem.dropout_p)
        share, where = _share(out.double(), exact, 2 * torch.finfo(dtype).eps * largest + 2e-5)
        if share > worst:
            worst, detail = share, f"out of sequence {b} at (query, head, dim) = {where}"
        if row_lse is None:
            continue
        finite = built.lse[b].masked_fill(built.lse[b] == -torch.inf, 0.0)
        allowed = 2e-5 * (1 + finite.abs().max().item())
        # An infinity in the wrong place, or none in the right one, is a NaN or an infinity in the difference.
        same = (row_lse == -torch.inf) & (built.lse[b] == -torch.inf)
        share, where = _share(row_lse.double().masked_fill(same, 0.0), built.lse[b].masked_fill(same, 0.0), allowed)
        if share > worst:
            worst, detail = share, f"log-sum-exp of sequence {b} at (head, query) = {where}"
    for name, exact in built.gradients.items():
        # Probabilities, their gradients, the output and the result are rounded once each, and summed in float32. The
        # gradient of a sink is a sum over all queries, each of which has a rounded output.
        allowed = (8 if name == "sinks" else 2) * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item()) + 5e-5
        share, where = _share(getattr(gradients, f"d{name}").cpu().double(), exact, allowed)
        if share > worst:
            worst, detail = share, f"gradient of {name} at {where}"
    return Outcome(case, RIGHT if worst <= 1 else WRONG, worst, detail if worst > 1 else "")


def _largest(p: AttentionProblem) -> float:
    v = p.v if p.v_descale is None else quantised.decoded(p.v) * p.v_descale.max()
    return v.float().nan_to_num(0.0).abs().max().item() if v.numel() else 0.0


def _share(x: torch.Tensor, exact: torch.Tensor, allowed: float) -> tuple[float, tuple[int, ...]]:
    """The largest error in units of `allowed`, and where it is. NaN is infinitely wrong."""
    error = (x - exact).abs().nan_to_num(nan=torch.inf)
    index = int(error.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), error.shape))
    return error.flatten()[index].item() / allowed, where
