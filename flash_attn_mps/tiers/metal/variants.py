"""Which variant of a kernel a call gets: the one that is forced, or stored by `tune`, or this GPU's default."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from ...problem import AttentionProblem
from . import recording, store
from .kernel import Choice, TunedKernel

TUNE = "MTLFLASHATTN_TUNE"

_chosen: dict[tuple, Any] = {}  # by kernel and class of calls
_stored: dict[store.Key, store.Winner] | None = None  # None: the file has not been read


def chosen(
    p: AttentionProblem,
    kernel: Choice,
    tuned: Callable[[AttentionProblem, Any], store.Winner] | None = None,
) -> Any:
    """The variant of `kernel` for `p`: one dictionary look-up but for the first call of a class.

    `tuned`, where there is such a function, finds the fastest if `MTLFLASHATTN_TUNE` asks for it. Raises
    `NotImplementedError` where the kernel's variable names a variant that these head dims do not allow.
    """
    q = p.q
    shape = (q.dtype, q.shape[-1], p.v.shape[-1])
    call = (kernel, *shape, kernel.class_of(p), p.window_left >= 0, p.window_right >= 0, kernel.demands(p))
    variant = _chosen.get(call)
    if variant is None:
        variant = _chosen[call] = _choose(p, kernel, tuned)
    return variant


def instead(p: AttentionProblem, kernel: TunedKernel, refused: Any) -> Iterator[Any]:
    """What to run `p` with, in turn, where `refused` is not to be used on this machine."""
    shape = (p.q.itemsize, p.q.shape[-1], p.v.shape[-1])
    tried = {refused}
    for variant in kernel.fallbacks(refused, *shape):
        if variant not in tried and kernel.fits(variant, *shape):
            tried.add(variant)
            yield variant


def forget() -> None:
    """Choose anew from now on: the environment, or what is stored, has changed."""
    global _stored
    _chosen.clear()
    _stored = None
    recording.forget()


def _choose(p: AttentionProblem, kernel: Choice, tuned: Callable[[AttentionProblem, Any], store.Winner] | None) -> Any:
    global _stored
    shape = (p.q.itemsize, p.q.shape[-1], p.v.shape[-1])
    fitting = {str(variant): variant for variant in kernel.fitting(*shape)}
    if wanted := os.environ.get(kernel.variable):
        variant = fitting.get(wanted.replace(" ", "").lower())
        if variant is None:
            raise NotImplementedError(
                f"{kernel.variable}={wanted} is no variant for head dims {shape[1]} and {shape[2]} of "
                f"{shape[0]} bytes; there are {', '.join(fitting)}"
            )
        return variant
    if _stored is None:
        _stored = store.load()
    key = store.key_of(p, kernel)
    # A class that was not tuned is closest to the one with a simpler mask.
    for mask in store.MASKS[store.MASKS.index(key.mask) :: -1]:
        winner = _stored.get(key._replace(mask=mask))
        if winner is not None and winner.variant in fitting:
            return fitting[winner.variant]
    if tuned is not None and key.length == "long" and os.environ.get(TUNE, "").lower() == "auto":
        winner = _stored[key] = tuned(p, kernel)
        return fitting[winner.variant]
    demanded = kernel.demands(p)
    return kernel.default(*shape, demanded) if demanded else kernel.default(*shape)
