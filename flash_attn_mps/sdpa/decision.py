"""Is a call taken or left to torch, and why: a pure function of the call and the settings."""

from __future__ import annotations

from typing import NamedTuple

from ..tiers.metal import decode, few, launch
from . import settings, torch_paths
from .call import Call
from .hazards import hazards
from .measured import NEVER, class_of
from .settings import Settings

# Before anything is measured: the graph over the whole score matrix was 3 times slower than a fused kernel at this
# length (pytorch#181575), and torch's own fused kernels are not known to be slower than ours.
DEFAULT_MIN_SEQ = 1024.0
_DEFAULTS = {"general": DEFAULT_MIN_SEQ, "math": NEVER, "vector": NEVER, "prefill": NEVER}
_VARIABLES = {"general": settings.MIN_SEQ, "vector": settings.FAST_MIN_SEQ, "prefill": settings.FAST_MIN_SEQ}


class Reason(NamedTuple):
    key: str  # short: calls are counted by it
    words: str


class Decision(NamedTuple):
    take: bool
    reasons: tuple[Reason, ...]

    @property
    def needed(self) -> bool:
        """Is torch's own result, or its memory, the reason, and not speed alone?"""
        return self.take and any(reason.key != "speed" for reason in self.reasons)

    def __str__(self) -> str:
        return ("taken: " if self.take else "left to torch: ") + "; ".join(reason.words for reason in self.reasons)


def decide(call: Call, given: Settings) -> Decision:
    """For a call that torch and this package both compute."""
    release = ".".join(map(str, given.torch))
    found = [
        Reason(hazard.issue, f"torch {release} is known to be wrong here: {hazard.what} ({hazard.issue})")
        for hazard in hazards(call, given.torch)
    ]
    size = torch_paths.score_bytes(call, given.torch)
    if size and size >= given.budget:
        found.append(
            Reason(
                "memory",
                f"torch's score matrix would have {size / settings.GIB:.3g} GB, the budget is "
                f"{given.budget / settings.GIB:.3g} GB ({settings.MIN_GB})",
            )
        )
    shortest, source = _shortest(call, given)
    # With few queries it is the number of keys that costs time.
    length = call.seqlen_k if call.seqlen_q <= few.DEFAULT else min(call.seqlen_q, call.seqlen_k)
    if length >= shortest:
        found.append(Reason("speed", f"{length} tokens are not fewer than {shortest:g}: {source}"))
    if found:
        return Decision(True, tuple(found))
    if shortest == NEVER:
        return Decision(False, (Reason("torch", f"torch is right here, and fast enough: {source}"),))
    return Decision(False, (Reason("short", f"{length} tokens are fewer than {shortest:g}: {source}"),))


def _shortest(call: Call, given: Settings) -> tuple[float, str]:
    """From which length on ours is used for the sake of speed, and who says so."""
    way = torch_paths.route(call, given.torch)
    widest = decode.MAX_HEAD_DIM if call.seqlen_q <= few.DEFAULT and not call.gradient else launch.MAX_HEAD_DIM
    if max(call.head_dim, call.head_dim_v) > widest:
        return NEVER, f"no Metal kernel has a head_dim above {widest}"
    chosen = {"general": given.min_seq, "math": None}.get(way, given.fast_min_seq)
    if chosen is not None:
        return chosen, f"{_VARIABLES[way]}, for torch's {way} path"
    measured = given.measured.get(class_of(call, way))
    if measured is not None:
        return measured, f"measured by `mtlflashattn tune` against torch's {way} path"
    return _DEFAULTS[way], f"the default against torch's {way} path"
