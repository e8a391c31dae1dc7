"""What can go wrong: a source that Metal would not take, and a launch that does what Metal leaves undefined."""

from __future__ import annotations

from dataclasses import dataclass


class MetalSyntaxError(SyntaxError):
    """The source is not Metal Shading Language as this runner knows it; the message is the compiler's log."""

    def __init__(self, log: str):
        super().__init__(f"Failed to create metal library, error: {log}")
        self.log = log


def refuse(file: str, line: int, message: str) -> MetalSyntaxError:
    """An error of the runner's own, in the compiler's form."""
    return MetalSyntaxError(f"{file}:{line}: error: {message}")


@dataclass(frozen=True)
class Fault:
    """One thing that an instrumented launch found.

    kind: "race", "out of bounds", "uninitialised", "divergent barrier", "divergent simdgroup operation",
        "inactive lane", "index", or "misaligned".
    file, line: where in the source; other_line: the other access of a race, 0 where there is none.
    message: one sentence with memory, thread, threadgroup and places.
    """

    kind: str
    file: str
    line: int
    other_line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.message}"


class KernelFault(RuntimeError):
    """An instrumented launch did what Metal leaves undefined. `faults` lists what was found, in order."""

    def __init__(self, kernel: str, faults: list[Fault]):
        self.faults = faults
        super().__init__(f"kernel {kernel}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults))
