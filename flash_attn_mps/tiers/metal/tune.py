"""Which variant of a kernel is fastest on this GPU: measured, by successive halving.

(Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943: time all candidates briefly, drop the slower part, time
the rest for longer.) Only a variant whose result is right takes part.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ... import describe, timing
from ...problem import AttentionProblem
from .. import reference
from . import backward, composed, launch, store
from .kernel import Choice, TunedKernel
from .store import Key, Winner

# (rounds, how many of the candidates go on). The last survivors meet the default again, whose place they must earn.
_HEATS = ((1, 1 / 4), (3, 1 / 4), (7, 0.0))
_GAIN = 0.98  # of the default's time: less than that is noise
_BATCH_SECONDS = 0.02
_LENGTHS = {"short": (4, 384, 16), "medium": (1, 1536, 16), "long": (1, 4096, 8)}  # batch, length, heads
_WINDOW = 1024
_SMALL = 150  # the length at which results are compared: beyond a block of any variant, and no multiple of 8

_log = logging.getLogger(__name__)


class Trial(NamedTuple):
    """A call to time. Of gradients, the forward pass is given."""

    p: AttentionProblem
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    dout: torch.Tensor | None = None


Launch = Callable[[Trial, Any, Any], "Sequence[torch.Tensor] | None"]


class Outcome(NamedTuple):
    """What was found for one class of calls. `refused`: variants that did not compile, or gave a wrong result."""

    key: Key
    winner: Winner | None  # None: not even the default works here
    tried: int
    refused: dict[Any, str]


def keys(
    kernel: Choice, dtypes: Sequence[str], head_dims: Sequence[int], lengths: Sequence[str], masks: Sequence[str]
) -> list[Key]:
    """All combinations that have a variant; those that share their compiled kernels follow each other."""
    name = kernel.name
    every = [
        Key(name, t, d, d, length, mask) for t in dtypes for d in head_dims for mask in masks for length in lengths
    ]
    return [key for key in every if kernel.fitting(*_shape(key))]


def candidates(key: Key, kernel: Choice) -> list[Any]:
    """The default, and of those that fit all that may be faster."""
    shape = _shape(key)
    return list(dict.fromkeys([kernel.default(*shape), *filter(kernel.worth_tuning, kernel.fitting(*shape))]))


def launched(trial: Trial, kernel: Any, variant: Any) -> Sequence[torch.Tensor] | None:
    """What is computed by that variant. None where a kernel does not compile."""
    p, out, lse, dout = trial
    if out is None or lse is None or dout is None:
        result = launch.run(p, kernel, variant) if kernel.run is None else kernel.run(p, variant)
        return None if result is None else (result.out,)
    if kernel is composed.WAYS:
        way = reference.backward if variant == composed.COMPOSED else backward.run
        grads = way(p, out, lse, dout, None, kernel.gradients)
    else:  # *rows*, which runs before, is small beside them
        each_head = backward.each_head(p, variant)
        grads = backward.compute(p, out, lse, dout, None, kernel.gradients, variant, variant, each_head)
    return None if grads is None else tuple(grad for grad in grads if grad is not None)


def tune(
    key: Key,
    kernel: Choice,
    device: torch.device | str,
    watch: timing.Stopwatch,
    *,
    candidates: Sequence[Any],
    run: Launch = launched,
    tick: Callable[[], object] = lambda: None,
) -> Outcome:
    """The fastest of `candidates` and the default, for calls of class `key`. `tick` is called once for each."""
    default = kernel.default(*_shape(key))
    refused = {}
    small = _trial(_problem(key, kernel, device, True), kernel)
    exact = _exact(small, kernel)
    calls = {}
    trial = _trial(_problem(key, kernel, device, False), kernel)
    for variant in dict.fromkeys([default, *candidates]):
        reason = _refusal(functools.partial(run, small, kernel, variant), exact, small)
        if reason:
            refused[variant] = reason
            tick()
        else:
            calls[variant] = functools.partial(run, trial, kernel, variant)
    times: dict[Any, float] = {}
    alive = list(calls)
    for heat, (count, share) in enumerate(_HEATS):
        measured = timing.rounds(
            {variant: calls[variant] for variant in alive},
            watch,
            count,
            _BATCH_SECONDS,
            tick if not heat else lambda: None,
        )
        times = {variant: sorted(seconds)[len(seconds) // 2] for variant, seconds in measured.items()}
        alive = sorted(times, key=times.__getitem__)[: max(2, round(share * len(times)))]
        if default in calls and default not in alive:
            alive.append(default)
    if not times:
        return Outcome(key, None, len(calls) + len(refused), refused)
    fastest = min(times, key=times.__getitem__)
    if default in times and times[fastest] > _GAIN * times[default]:
        fastest = default
    winner = Winner(str(fastest), times[fastest], times.get(default, times[fastest]))
    return Outcome(key, winner, len(calls) + len(refused), refused)


def briefly(p: AttentionProblem, kernel: TunedKernel) -> Winner:
    """Tune `p`'s class among the default's neighbours, and store what was found: a few seconds, on the way."""
    key = store.key_of(p, kernel)
    _log.info("tuning %s on %s", key, p.q.device)
    default = kernel.default(*_shape(key))
    near = _neighbours(default, key, kernel)
    with torch.no_grad():
        outcome = tune(key, kernel, p.q.device, timing.stopwatch(p.q.device), candidates=near)
    winner = outcome.winner or Winner(str(default), 0.0, 0.0)
    if outcome.winner is not None:
        try:
            store.save({key: winner})
        except OSError as error:
            _log.warning("the result of tuning is not kept: %s", error)
    return winner


def _shape(key: Key) -> tuple[int, int, int]:
    return getattr(torch, key.dtype).itemsize, key.head_dim, key.head_dim_v


def _neighbours(variant: Any, key: Key, kernel: Choice) -> list[Any]:
    """Those that differ from `variant` in one respect, a number by one step."""
    near = {
        field: {value, value * 2, value // 2}
        for field, value in variant._asdict().items()
        if not isinstance(value, bool)
    }
    return [
        other
        for other in kernel.fitting(*_shape(key))
        if all(getattr(other, field) in values for field, values in near.items())
        and sum(a != b for a, b in zip(variant, other, strict=True)) == 1
    ]


def _problem(key: Key, kernel: Choice, device: torch.device | str, small: bool) -> AttentionProblem:
    if kernel.problem is not None:
        return kernel.problem(key, device, small)
    batch, length, heads = (2, _SMALL, 2) if small else _LENGTHS[key.length]
    dtype = getattr(torch, key.dtype)
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtype)

    heads_k = max(1, heads // 4)
    window = min(_WINDOW, length // 2) if key.mask == "window" else -1
    options = describe.CallOptions(causal=key.mask != "full", window_size=(window, -1))
    return describe.dense(
        randn(heads, key.head_dim), randn(heads_k, key.head_dim), randn(heads_k, key.head_dim_v), options
    )


def _trial(p: AttentionProblem, kernel: Choice) -> Trial:
    if not kernel.gradients:
        return Trial(p)
    result = reference.run(replace(p, want_lse=True))
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(p.out_shape, generator=generator).to(p.q.device, p.q.dtype)
    return Trial(p, result.out, result.lse, dout)


def _exact(trial: Trial, kernel: Choice) -> Sequence[torch.Tensor]:
    """In fp32, and on the CPU, since PyTorch's own kernels on that GPU may be wrong as well."""
    p, _, _, dout = trial
    p = replace(p, q=p.q.float().cpu(), k=p.k.float().cpu(), v=p.v.float().cpu(), want_lse=True)
    result = reference.run(p)
    if dout is None:
        return (result.out,)
    assert result.lse is not None
    grads = reference.backward(p, result.out, result.lse, dout.float().cpu(), None, kernel.gradients)
    return tuple(grad for grad in grads if grad is not None)


def _refusal(
    call: Callable[[], Sequence[torch.Tensor] | None], exact: Sequence[torch.Tensor], trial: Trial
) -> str | None:
    """Why a variant is ruled out, in words; None if it is not."""
    try:
        results = call()
    except (RuntimeError, ValueError) as failure:  # a pipeline that takes fewer threads than the variant has, say
        return f"it fails to launch ({failure})"
    if results is None:
        return "it does not compile"
    eps = torch.finfo(trial.p.v.dtype).eps
    for result, right in zip(results, exact, strict=True):
        error = (result.float().cpu() - right).abs().max().item()
        # Probabilities and output are rounded once each to the dtype of v; for gradients ds and the output are, too.
        largest = trial.p.v.abs().max().item() if trial.dout is None else 2 * right.abs().max().item()
        allowed = 2 * eps * largest + 1e-5
        if not error <= allowed:
            return f"its result is off by {error:.2g}; rounding explains {allowed:.2g}"
    return None
