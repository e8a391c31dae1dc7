"""Chips: cores, clock, and the generation of the core."""

from __future__ import annotations

from dataclasses import dataclass

from .core import APPLE7, APPLE8, APPLE9, Core


@dataclass(frozen=True)
class Chip:
    name: str
    cores: int
    ghz: float
    core: Core

    @property
    def generation(self) -> int:
        """The number in "M3 Max"."""
        return int(self.name[1])

    @property
    def peak(self) -> float:
        """Of the ALUs, in operations a second: 128 multiplications with an addition a core and cycle."""
        return self.cores * 256 * self.ghz * 1e9


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("M1", 8, 1.278, APPLE7),
        Chip("M1 Max", 32, 1.296, APPLE7),
        Chip("M1 Max 24", 24, 1.296, APPLE7),
        Chip("M2 Max", 38, 1.398, APPLE8),
        Chip("M3 Max", 40, 1.39, APPLE9),
        Chip("M3 Ultra", 80, 1.39, APPLE9),
        Chip("M4", 10, 1.58, APPLE9),
        Chip("M4 iPad", 10, 1.47, APPLE9),
        Chip("M4 Pro", 20, 1.58, APPLE9),
        Chip("M4 Max", 40, 1.58, APPLE9),
        Chip("M5 Pro", 20, 1.62, APPLE9),
    )
}
