"""Whether the tier `tensorops` is open on this machine, and how its GPU lays out a cooperative tensor.

Which lane has which element of a cooperative tensor depends on the GPU and on what macOS compiles for (pytorch#191794:
wrong numbers of a kernel that took it for granted). So a kernel asks, once on a machine: it reports the place of every
element, and makes products of tiles that show where each of their elements went (`kernels/tensorops_probe.metal`). An
answer that is known lets the tier's kernel move registers without asking; with another it asks for each element; and a
wrong product closes the tier.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import compiler, prove, proved, refusals, specialization
from . import tensorops_gate as gate
from .kernel import Program
from .refusals import Refusal

APPLE10, LEGACY, GENERIC = "apple10", "legacy", "generic"
LAYOUTS = (APPLE10, LEGACY, GENERIC)


class Case(NamedTuple):
    """A product that `kernels/cooperative.metal` makes."""

    dtype: str  # Metal's name of both operands' type
    transposed: bool  # is the right operand?
    mode: str  # Metal's name: is the product added, or does it replace the destination?


CASES = tuple(
    Case(dtype, *how)
    for dtype in ("half", "bfloat")
    for how in ((True, "multiply_accumulate"), (False, "multiply_accumulate"), (False, "multiply"))
)
_SLOTS = 32  # elements of a lane that are reported; both known layouts have 16 at most
_M, _N, _K, _LANES = 16, 32, 16, 32
_OPERANDS = ("left", "right", "destination")
_PRODUCTS = 3
_UNTOUCHED = -3  # where nothing is reported


class Answer(NamedTuple):
    """`layout`: of LAYOUTS, or None for words why the tier is closed."""

    layout: str | None
    reasons: tuple[str, ...] = ()


_answer: Answer | None = None  # None: nobody has asked
_lock = threading.Lock()


def layout() -> str | None:
    """How cooperative tensors lie in registers here: LAYOUT of `kernels/cooperative.metal`. None where no kernel with
    cooperative tensors is to be used. Waits for the device the first time on a machine."""
    return None if gate.unmet() else _asked().layout


def why_closed() -> list[str]:
    """Why the tier is not used on this machine, in words, by the first gates that it does not pass; empty if it is."""
    reasons = gate.unmet()
    if not reasons and gate.unsuited() and not gate.is_forced():
        reasons = gate.unsuited()
    return list(reasons or _asked().reasons)


def described() -> str:
    """For commands: is the tier used on this machine, and how or why not?"""
    reasons = why_closed()
    return f"not used: {'; '.join(reasons)}" if reasons else f"used, {layout()} layout of cooperative tensors"


def forget() -> None:
    """Ask anew."""
    global _answer
    _answer = None
    gate.forget()


def _asked() -> Answer:
    global _answer
    if _answer is None:
        with _lock:
            if _answer is None:
                _answer = _ask()
    return _answer


class _Probe:
    """What is compiled. It serves no call, so it has no proof; it is one."""

    kernel = Program(
        entry="tensorops_probe",
        headers=("metal_stdlib", "metal_tensor", "MetalPerformancePrimitives/MetalPerformancePrimitives.h"),
        sources=("tensorops_probe",),
    )

    threads = _LANES

    def source(self) -> str:
        cases = " ".join(
            f"CASE({n}, {dtype}, {str(transposed).lower()}, {mode})"
            for n, (dtype, transposed, mode) in enumerate(CASES)
        )
        defines = {"CASES": cases, "SLOTS": _SLOTS, "PRODUCTS": _PRODUCTS}
        return specialization.source_of(self.kernel, defines, ())

    def _asdict(self) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        return ""


PROBE = _Probe()


def _ask() -> Answer:
    """Of the disk, or of the device."""
    line = proved.digest(PROBE.source(), compiler.who())
    if compiler.proofs_wanted(elsewhere="always") != "always":
        for name in LAYOUTS:
            if proved.holds(f"{line}-{name}"):
                return Answer(name)
    compiled = compiler.kernel(PROBE)
    if compiled is None:
        return Answer(None, (f"its probe did not compile: {compiler.failures[PROBE]}",))
    found = prove.apart(lambda: _run(compiled))
    if isinstance(found, Refusal):
        compiler.refuse(PROBE, found)
        return Answer(None, (f"its probe {found.what}: {found.why}",))
    proved.remember(f"{line}-{found}")
    return Answer(found)


def _run(compiled: Any) -> str | Refusal:
    """The layout, or why tensor operations are not to be used. Waits for the device."""
    try:
        device = torch.device(next(iter(compiler.device_types)))
        left, right, destination = _tiles()
        places = torch.full(
            (len(CASES), len(_OPERANDS), _LANES, 1 + _SLOTS), _UNTOUCHED, dtype=torch.int32, device="cpu"
        )
        products = torch.full((len(CASES), *destination.shape), torch.nan, dtype=torch.float32, device="cpu")
        on_device = [x.to(device) for x in (places, products, left, right, destination)]
        compiled(*on_device, threads=(_LANES * len(CASES), 1, 1), group_size=(_LANES, 1, 1))
        places, products = (x.cpu() for x in on_device[:2])
        return _wrong_product(products) or _named(places)
    except Exception as error:  # whatever happens here would happen in the caller's program
        return refusals.broke(error)


@functools.cache
def _tiles() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left operands, right operands and what is added to: in all numbers that both types of 16 bits hold exactly.

    The first product has one-hot rows on the left and shows every element of the right operand, the second one-hot
    columns on the right and shows every element of the left one; the third sums over all of K.
    """
    m, n, k = (torch.arange(count, device="cpu") for count in (_M, _N, _K))
    count_left = m[:, None] * _K + k  # to 255
    count_right = k[:, None] * _N + n - 256  # from -256 to 255
    left = torch.stack([torch.eye(_M, _K, device="cpu"), count_left, (3 * m[:, None] + 5 * k) % 11 - 5])
    right = torch.stack([count_right, k[:, None] == n % _K, (7 * k[:, None] + 2 * n) % 13 - 6])
    destination = (512 * (m[:, None] * _N + n)).expand(_PRODUCTS, _M, _N)
    return left.float(), right.float(), destination.float().contiguous()


def _wrong_product(products: torch.Tensor) -> Refusal | None:
    left, right, destination = _tiles()
    product = left.double() @ right.double()
    for case, found in zip(CASES, products, strict=True):
        exact = product if case.mode == "multiply" else destination.double() + product
        error = (found.double() - exact).abs().nan_to_num(nan=torch.inf).max().item()
        if error:
            what = f"{case.mode} of {case.dtype} and {'transposed ' * case.transposed}{case.dtype}"
            return refusals.wrong(what, error, 0.0)
    return None


def _named(places: torch.Tensor) -> str:
    """The known layout that was reported in all cases, or the generic one."""
    return next((name for name, known in _KNOWN.items() if torch.equal(places, _expected(known))), GENERIC)


# Of a lane, whether the right operand is transposed, and an operand: row and column of each of its elements.
_Places = Callable[[int, bool, str], list[tuple[int, int]]]


def _expected(known: _Places) -> torch.Tensor:
    """What the kernel reports where that is the layout."""

    def reported(transposed: bool, operand: str, lane: int) -> list[int]:
        columns = _N if operand == "destination" or (operand == "right" and not transposed) else _K
        flat = [row * columns + column for row, column in known(lane, transposed, operand)]
        return [len(flat), *flat, *[_UNTOUCHED] * (_SLOTS - len(flat))]

    of = {t: [[reported(t, name, lane) for lane in range(_LANES)] for name in _OPERANDS] for t in (False, True)}
    return torch.tensor([of[case.transposed] for case in CASES], dtype=torch.int32, device="cpu")


def _apple10(lane: int, transposed: bool, operand: str) -> list[tuple[int, int]]:
    """Of GPUs from Apple10 on: tiles of 16x16, of which a lane has four neighbours in each of two rows.

    (MLX's fragments, mlx/backend/metal/kernels/steel/gemm/nax.h.)
    """
    row, column = (lane >> 2 & 4) | (lane >> 1 & 3), ((lane >> 2 & 2) | (lane & 1)) * 4
    tile = [(row + 8 * (i >> 2), column + (i & 3)) for i in range(8)]
    if operand == "left":
        return tile
    if operand == "right" and transposed:
        return tile + [(r + 16, c) for r, c in tile]
    return tile + [(r, c + 16) for r, c in tile]


def _legacy(lane: int, transposed: bool, operand: str) -> list[tuple[int, int]]:
    """Of GPUs before, and of what is compiled for macOS 26.0 and 26.1: tiles of 16x16 made of four of 8x8.

    (PyTorch's fragments, ATen/native/mps/kernels/MppAttention.h, from 2.14 on.)
    """
    row, column = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), (lane >> 3 & 1) * 4 + (lane & 1) * 2
    columns = [column + offset for offset in (0, 1, 8, 9)]
    if operand == "left":
        return [(r, c) for r in (row, row + 8) for c in columns]
    found = [(r, c + half) for r in (row, row + 8) for half in (0, 16) for c in columns]
    return [(c, r) for r, c in found] if operand == "right" and transposed else found


_KNOWN: dict[str, _Places] = {APPLE10: _apple10, LEGACY: _legacy}
