"""Why a kernel is not used on this machine, in words: what happened, and what whoever reads it can do."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple

import torch

from ...project import please_report
from . import gpu

FAST_MATH = "PYTORCH_MPS_FAST_MATH"  # torch's own: it compiles with the fast math mode then


class Refusal(NamedTuple):
    """`what` happened to the kernel, `why`, and `known`: what is known about it; else a report is asked for."""

    what: str
    why: str
    known: str = ""


# What the compiler says, in lower case: what is known about it.
_KNOWN = (
    ("bfloat", "Metal has bfloat16 from macOS 14 on."),
    ("no torch.mps.compile_shader", "Update torch."),
    ("xpc_error", "Apple's compiler crashes on some large kernels."),
    ("internal error", "Apple's compiler crashes on some large kernels."),
    ("metal 4 is needed", "Unset PYTORCH_MPS_METAL_VERSION, or update torch."),
)


def not_compiled(error: Exception) -> Refusal:
    """The compiler's refusal, or its crash."""
    why = _first_line(error)
    known = next((sentence for text, sentence in _KNOWN if text in str(error).lower()), "")
    return Refusal("did not compile", why, known)


def too_many_threads(needed: int, most: int) -> Refusal:
    return Refusal(
        "does not fit",
        f"it needs {needed} threads in a group, and this GPU gives it {most} at most",
        "How many it gives depends on the chip and on macOS.",
    )


def wrong(name: str, error: float, allowed: float) -> Refusal:
    """The proof: `name` is off by `error`."""
    known = ""
    if os.environ.get(FAST_MATH, "0") not in ("", "0"):
        known = f"{FAST_MATH} is set, under which Metal need not honour NaN and infinities: unset it."
    return Refusal(
        "gave a wrong result for a test problem", f"{name} is off by {error:.3g}; {allowed:.3g} is allowed", known
    )


def broke(error: Exception) -> Refusal:
    """The proof could not be made."""
    return Refusal("failed on a test problem", f"{type(error).__name__}: {_first_line(error)}")


def advice(refusal: Refusal) -> str:
    """What is known about it, or whom to tell."""
    if refusal.known:
        return refusal.known
    if gpu.is_virtual():
        return "Virtual machines have a GPU that fails in ways which no Mac does: there is nothing to report."
    return please_report("report")


def machine() -> str:
    """Like "Apple M3 Max, 40 cores, macOS 26.1 (25B78), torch 2.14.0"."""
    system = f"macOS {gpu.macos()} ({gpu.os_build()})" if gpu.os_build() else platform.system()
    return ", ".join(filter(None, (gpu.name(), system, f"torch {torch.__version__}")))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
