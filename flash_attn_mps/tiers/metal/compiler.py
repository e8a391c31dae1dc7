"""The one seam between this package and a Metal compiler, and the cache of kernels that are compiled and proved."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import proved, recording, refusals
from .refusals import Refusal
from .specialization import Compilable

_CACHED = 512  # kernels; lengths, strides and scale are arguments, so few programs need more than a dozen


def _from_torch(source: str) -> Any:
    if not hasattr(torch.mps, "compile_shader"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.mps.compile_shader; it came with 2.7")
    return torch.mps.compile_shader(source)


# Who compiles, and for tensors on which devices the result runs. Tests put a compiler for other devices here.
compile_shader: Callable[[str], Any] = _from_torch
device_types: frozenset[str] = frozenset({"mps"})


failures: dict[Compilable, str] = {}  # what is not used on this machine, and why: the compiler's log, say


def unavailable(device: str) -> str | None:
    """Why no Metal kernel can run on `device`, in words; None if one can."""
    kind = torch.device(device).type
    if kind not in device_types:
        return f"Metal kernels run on {', '.join(sorted(device_types))}, not on {kind}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "torch has no MPS device on this machine"
    return None


@functools.lru_cache(maxsize=_CACHED)
def kernel(specialization: Compilable) -> Any | None:
    """The compiled kernel, or None, after a warning, if it is not to be used on this machine: Metal does not accept it,
    or it fails its proof."""
    source = specialization.source()
    try:
        compiled = getattr(compile_shader(source), specialization.kernel.entry)
    except (SyntaxError, RuntimeError) as error:
        failures[specialization] = str(error).strip()
        _warn_once(specialization, refusals.not_compiled(error))
        return None
    if refusal := _too_many_threads(specialization, compiled) or _prove(specialization, compiled, source):
        refuse(specialization, refusal)
        return None
    return compiled


def refuse(specialization: Compilable, refusal: Refusal) -> None:
    """It compiles, and is not to be used on this machine: kept, and said once."""
    failures[specialization] = f"{refusal.what}: {refusal.why}"
    _warn_once(specialization, refusal)


def proofs_wanted(elsewhere: str = "off") -> str:
    """`MTLFLASHATTN_PROVE`; `elsewhere` by default, with another compiler than torch's: whoever puts one here has tests
    of their own for what it compiles."""
    return proved.wanted("once" if compile_shader is _from_torch else elsewhere)


def who() -> str:
    """Who compiles, for the digest of a kernel."""
    return "torch" if compile_shader is _from_torch else repr(compile_shader)


def _too_many_threads(specialization: Compilable, compiled: Any) -> Refusal | None:
    """Why it cannot be launched, where this GPU gives its pipeline fewer threads than a group has."""
    most = getattr(compiled, "max_threads_per_threadgroup", None)
    needed = specialization.threads
    return None if most is None or most >= needed else refusals.too_many_threads(needed, most)


def _prove(specialization: Compilable, compiled: Any, source: str) -> Refusal | None:
    """Why it is not to be used, if it has not proved itself here before."""
    proof, wanted = specialization.kernel.proof, proofs_wanted()
    if proof is None or wanted == "off":
        return None
    line = proved.digest(source, who())
    if wanted == "once" and proved.holds(line):
        return None
    refusal = proof(specialization, compiled)
    if refusal is None:
        proved.remember(line)
    return refusal


def clear() -> None:
    """Forget all kernels, failures and warnings given, and what the file of proofs said."""
    kernel.cache_clear()
    recording.forget()
    failures.clear()
    proved.forget()
    _warned.clear()


_warned: set[str] = set()  # entries of kernels


def _warn_once(specialization: Compilable, refusal: Refusal) -> None:
    entry = specialization.kernel.entry
    if entry in _warned:
        return
    _warned.add(entry)
    warnings.warn(
        f"mtlflashattn: the Metal kernel {entry} {refusal.what} on this machine ({refusals.machine()}): {refusal.why}. "
        f"Another variant or kernel, or plain PyTorch, serves such calls (same results, perhaps slower). "
        f"{refusals.advice(refusal)} {specialization}",
        RuntimeWarning,
        stacklevel=2,
    )
