"""Where the elements of a cooperative tensor are: a choice of the run, which Metal leaves to the implementation.

"apple10" is the placement of Apple's GPUs from family 10 (M5) on, "legacy" that of older ones and of shaders that are
compiled for macOS 26.0; both are known for tiles of 16 and 32 from what others measured and from kernels that count on them
(MLX's NAX kernels and MNN's notes on an M5; torch's MppAttention.h). A number draws a placement that the interface allows:
runtime/tensor.c.
"""

from __future__ import annotations

import os

NAMES = ("apple10", "legacy")
DEFAULT = "apple10"
_MOST_SEEDS = 1 << 31


def number(layout: str | int | None) -> int:
    """The layout as the runtime has it (runtime.h); None takes that of METAL_HOST_LAYOUT."""
    if layout is None:
        text = os.environ.get("METAL_HOST_LAYOUT") or DEFAULT
        layout = int(text) if text.isdecimal() else text
    if layout in NAMES:
        return NAMES.index(layout)
    if isinstance(layout, int) and not isinstance(layout, bool) and 0 <= layout < _MOST_SEEDS:
        return len(NAMES) + layout
    raise ValueError(f"layout must be 'apple10', 'legacy' or a seed from 0 to {_MOST_SEEDS - 1}, got {layout!r}")
