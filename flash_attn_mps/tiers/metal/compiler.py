"""The one seam between this package and a Metal compiler, and the cache of compiled kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...project import please_report
from .specialization import Compilable

_CACHED = 512  # kernels; lengths, strides and scale are arguments, so few programs need more than a dozen


def _from_torch(source: str) -> Any:
    if not hasattr(torch.mps, "compile_shader"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.mps.compile_shader; it came with 2.7")
    return torch.mps.compile_shader(source)


# Who compiles, and for tensors on which devices the result runs. Tests put a compiler for other devices here.
compile_shader: Callable[[str], Any] = _from_torch
device_types: frozenset[str] = frozenset({"mps"})


failures: dict[Compilable, str] = {}  # what did not compile, and the compiler's log


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
    """The compiled kernel, or None, after a warning, if this machine's Metal does not accept it."""
    try:
        return getattr(compile_shader(specialization.source()), specialization.kernel.entry)
    except (SyntaxError, RuntimeError) as error:
        failures[specialization] = str(error).strip()
        _warn_once(specialization, error)
        return None


def clear() -> None:
    """Forget all kernels, failures and warnings given."""
    kernel.cache_clear()
    failures.clear()
    _warned.clear()


_warned: set[str] = set()  # entries of kernels


def _warn_once(specialization: Compilable, error: Exception) -> None:
    entry = specialization.kernel.entry
    if entry in _warned:
        return
    _warned.add(entry)
    reason = str(error).strip().splitlines()
    warnings.warn(
        f"mtlflashattn: the Metal kernel {entry} did not compile on this machine; falling back to "
        f"plain PyTorch (slower, same results). {please_report('doctor')} "
        f"{specialization}: {reason[0] if reason else type(error).__name__}",
        RuntimeWarning,
        stacklevel=2,
    )
