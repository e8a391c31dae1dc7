"""Where torch.compile stands in the program that it traces."""

from __future__ import annotations

from collections.abc import Iterator

from torch._guards import TracingContext

from flash_attn_shim.guests.source import Position

_OURS = ("flash_attn_shim", "guests")


def positions() -> Iterator[Position]:
    """The calls of the traced program, from the innermost out, without those of this package."""
    for frame in reversed(TracingContext.extract_stack()):
        if "/".join(_OURS) not in frame.filename.replace("\\", "/"):
            column, end_column = getattr(frame, "colno", None), getattr(frame, "end_colno", None)
            yield Position(frame.filename, frame.lineno or 0, column, end_column)
