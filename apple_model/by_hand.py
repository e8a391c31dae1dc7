"""A kernel whose code a generator in Swift makes at run time, and so cannot be compiled here: its loop, by hand.

metal-flash-attention (https://github.com/philipturner/metal-flash-attention), the forward kernel. A simdgroup has eight
queries. Of keys, `columns` a round; the head dim is walked in blocks of `block`. K and V come through an asynchronous
copy of one simdgroup ("staged") or straight from device memory; queries and the output lie in registers ("cached") or
are read, and the output written, every round.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from .kernels import Kernel
from .program import Operation, Program


class _Writer:
    """Operations of a simdgroup, with names for what they load and compute."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.latest: dict[object, int] = {}

    def add(self, kind: str, amount: int = 1, after: tuple = (), name: object = None, **more) -> None:
        waits = tuple(dict.fromkeys(self.latest[x] for x in after if x in self.latest))
        number = len(self.operations)
        self.operations.append(Operation(kind, amount, waits=waits, number=number, **more))
        if name is not None:
            self.latest[name] = number

    def access(self, kind: str, space: str, size: int, lines: int, name: object = None, after: tuple = ()) -> None:
        """All lanes' `size` bytes: without conflicts of banks, or in so many cache lines."""
        lane = size // 32
        apart = lane if space == "threadgroup" else 0
        addresses = tuple(i * apart + (i % lines) * 128 * (space == "device") for i in range(32))
        self.add(kind, after=after, name=name, space=space, bytes=size, addresses=addresses)

    def product(self, accumulator: object, *operands: object) -> None:
        self.add("product", after=(*operands, accumulator), name=accumulator)


@cache
def metal_flash_attention(
    shape: tuple[int, int, int], element: str, head_dim: int, staged: bool, cached_q: bool, cached_o: bool
) -> Kernel:
    """shape: queries of a threadgroup, keys of a round, width of a block of the head dim; element: "fp16" or "fp32"."""
    rows, columns, block = shape
    size, space = (2 if element == "fp16" else 4), ("threadgroup" if staged else "device")
    fragments, key_fragments, fragment = head_dim // 8, columns // 8, 64 * size
    everybody, leader = _Writer(), _Writer()

    def copy() -> None:
        if staged:
            for writer in (everybody, leader):
                writer.add("barrier")
            leader.add("copy", bytes=columns * block * size)
            for writer in (everybody, leader):
                writer.add("barrier")

    def blocks() -> list[range]:
        return [range(first // 8, (first + block) // 8) for first in range(0, head_dim, block)]

    for block_fragments in blocks():
        copy()
        for writer in (everybody, leader):
            for f in block_fragments:
                if not cached_q:
                    writer.access("load", space, fragment, 8, ("q", f))
                for n in range(key_fragments):
                    # Transposed from device memory: two loads of an element.
                    writer.access("load", space, fragment, 16, ("k", n, f))
                for n in range(key_fragments):
                    writer.product(("s", n), ("k", n, f), ("q", f))
    for writer in (everybody, leader):
        writer.add("alu", 2 * key_fragments, after=tuple(("s", n) for n in range(key_fragments)))
        writer.add("shuffle", 2)
        writer.add("alu", 2 * key_fragments + 4)
        writer.add("exp", 2 * key_fragments + 1)
        writer.add("alu", 2 * key_fragments + 2)
        writer.add("shuffle", 2)
    for block_fragments in blocks():
        copy()
        for writer in (everybody, leader):
            for f in block_fragments:
                if not cached_o:
                    writer.access("load", space, 256, 8, ("o", f))
                writer.add("alu", 2, after=(("o", f),) if not cached_o else ())
            for n in range(key_fragments):
                for f in block_fragments:
                    writer.access("load", space, fragment, 8, ("v", n, f))
                for f in block_fragments:
                    writer.product(("o", f), ("v", n, f))
            if not cached_o:
                writer.add("alu", 0, after=tuple(("o", f) for f in block_fragments))
                for _ in block_fragments:
                    writer.access("store", space, 256, 8)
    registers = 2 * key_fragments * size // 2 + 16
    registers += 2 * (fragments if cached_o else block // 8) + (fragments if cached_q else 2) * size // 2
    program = Program(everybody.operations, 2 * fragments * key_fragments, element == "fp32", 0, 1000, Counter())
    name = f"MFA {rows}x{columns}x{block} {'staged' if staged else 'direct'} q{int(cached_q)}o{int(cached_o)}"
    return Kernel(
        *(name, rows // 8, rows, columns, head_dim, registers, max(rows, columns) * block * 4 * staged, program),
        leader=tuple(leader.operations) if staged else (),
    )
