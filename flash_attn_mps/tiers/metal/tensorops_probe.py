"""Whether the tier `tensorops` is open on this machine, and how its GPU lays out a cooperative tensor."""

from __future__ import annotations

from . import tensorops_gate as gate

GENERIC = "generic"  # asked from the tensor, element by element: right for every layout


def layout() -> str | None:
    """How cooperative tensors lie in registers here: LAYOUT of `kernels/cooperative.metal`. None where no kernel with
    cooperative tensors is to be used."""
    return None if gate.unmet() else GENERIC


def why_closed() -> list[str]:
    """Why the tier is not used on this machine, in words, by the first gates that it does not pass; empty if it is."""
    if reasons := gate.unmet():
        return reasons
    return [] if gate.is_forced() else gate.unsuited()
