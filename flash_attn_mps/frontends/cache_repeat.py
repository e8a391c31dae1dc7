"""The steps of a generation: the same call again and again, with other tensors of the same layout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable
from operator import attrgetter
from typing import Any

import torch

from .. import checks, tiers, trace
from ..describe import CallOptions
from ..graph import transforms
from ..problem import Result
from ..tiers.metal import recording
from .cache_call import CacheCall
from .cache_plan import describe, run

_FIELDS = [(field.name, field.type) for field in dataclasses.fields(CacheCall) if field.name != "options"]
_FIELDS += [(f"options.{field.name}", field.type) for field in dataclasses.fields(CallOptions)]
# cache_seqlens may be a number too, but that would be another one in each step: such calls are not repeated.
_TENSORS = [
    name for name, kind in _FIELDS if kind in ("torch.Tensor", "torch.Tensor | None") or name == "cache_seqlens"
]
_tensors_of = attrgetter(*_TENSORS)
_others_of = attrgetter(*(name for name, _ in _FIELDS if name not in _TENSORS))
_OF_TENSORS, _OF_OTHERS = frozenset({torch.Tensor, type(None)}), frozenset({bool, int, float, str, tuple, type(None)})


def computed(call: CacheCall) -> Result:
    """What `call` comes to: by its plan, or by the launches of the same step before.

    The latter where only the device knows lengths, and nobody counts calls or has other derivatives than autograd's.
    """
    if not (checks.readable(call.q) or trace.enabled or transforms.active()):
        tensors = _tensors_of(call)
        layout = _layout(tensors, _others_of(call))
        if layout is not None:
            return recording.repeated(layout, tensors, lambda: run(describe(call)))
    return run(describe(call))


def _layout(tensors: tuple[Any, ...], others: tuple[Any, ...]) -> Hashable:
    """All that the launches depend on but for addresses; None for a call that is not to be repeated."""
    if not (_OF_TENSORS.issuperset(map(type, tensors)) and _OF_OTHERS.issuperset(map(type, others))):
        return None
    try:
        layouts = [
            None if t is None else (t.shape, t.stride(), t.storage_offset() & 15, t.dtype, t.device) for t in tensors
        ]
    except RuntimeError:  # sparse or nested: refused by name
        return None
    return (*layouts, others, os.environ.get(tiers.FORCE))
