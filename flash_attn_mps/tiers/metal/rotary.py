"""Rotary embedding, and new rows into a cache, in one launch (`kernels/rotary.metal`): what is done before attention.

The arguments are those of `movement.py`. Values are not looked at: a row for which the cache has no place is not
written, and a position for which the tables have no row is not rotated.
"""

from __future__ import annotations

import torch

from . import compiler, recording, rotary_proof
from .kernel import Program
from .movement import NewKeys, Queries, Rotary, arguments

PROGRAM = Program(
    entry="rotate_and_append",
    headers=("metal_stdlib",),
    sources=("codes", "rotary"),
    proof=rotary_proof.proof,
)
NOT_COMPILED = ["its kernel is not used on this machine"]  # the reason after `enqueue` has failed
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})


def unsupported_reasons(rotary: Rotary | None, queries: Queries | None, new: NewKeys | None) -> list[str]:
    """Why the kernel does not do it, in words; empty if it does."""
    first = _of_dtype(queries, new)
    if first.device.type not in compiler.device_types:
        return [f"tensors are on {first.device}"]
    reasons = []
    if first.dtype not in _FLOATS:
        reasons.append(f"{first.dtype}")
    if rotary is not None and (rotary.cos.dtype not in _FLOATS or rotary.sin.dtype is not rotary.cos.dtype):
        reasons.append(f"tables of {rotary.cos.dtype} and {rotary.sin.dtype}")
    if new is not None and (new.k_cache.stride(-1) != 1 or new.v_cache.stride(-1) != 1):
        reasons.append("the elements of a cache's rows are not neighbours")
    return reasons


def _of_dtype(queries: Queries | None, new: NewKeys | None) -> torch.Tensor:
    if queries is not None:
        return queries.q
    assert new is not None
    return new.k


def enqueue(rotary: Rotary | None, queries: Queries | None, new: NewKeys | None) -> bool:
    """Launch, without waiting for it. False where the kernel is not to be used on this machine."""
    movement, values, threads, group_size = arguments(PROGRAM, rotary, queries, new)
    if threads[0] == 0:
        return True
    compiled = compiler.kernel(movement)
    if compiled is None:
        return False
    recording.enqueue(compiled, values, threads, group_size)
    return True
