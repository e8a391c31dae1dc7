"""The tables of docs/apple-model.md: predictions for this project's kernels, and published times beside the model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from flash_attn_mps.tiers.metal import simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant

from . import features
from .chips import CHIPS, Chip
from .kernels import ELEMENTS, Kernel, gradients, ours
from .predict import Call, predict
from .validate import UNSTATED, Row, mean_and_rms, ranked, rows

PAGE = Path(__file__).parent.parent / "docs" / "apple-model.md"
JUDGED = ("M1", "M1 Max", "M3 Max", "M4 Max")
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
CALL = Call(1, 16, 4096, 4096)
HEADER = (
    *("head dim", "dtype", "chip", "variant", "live registers", "threadgroup bytes", "groups a core"),
    *("share of the peak", "bound by"),
)


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in cells)


def variants(element: str, head_dim: int) -> list[Variant]:
    size = ELEMENTS[element].itemsize
    return [v for v in simdgroup.FORWARD.variants if simdgroup.fits(v, size, head_dim, head_dim)]


def is_modelled(chip: Chip, element: str) -> bool:
    """bfloat is emulated before M3, in ways that are not known."""
    return element != "bf16" or chip.core.name == "Apple9"


def defaults(chips: Sequence[str] = JUDGED, elements: Iterable[str] = ELEMENTS, dims: Iterable[int] = HEAD_DIMS) -> str:
    lines = []
    for element in elements:
        for head_dim in dims:
            variant = simdgroup.default(ELEMENTS[element].itemsize, head_dim, head_dim)
            for chip in (CHIPS[name] for name in chips):
                if is_modelled(chip, element):
                    lines.append(_described(chip, ours(variant, element, head_dim), element))
    return markdown(HEADER, lines)


def of_features(elements: Iterable[str] = ELEMENTS, dims: Iterable[int] = HEAD_DIMS) -> str:
    """The variant that a call with some features gets, and its live registers."""
    lines = []
    for element in elements:
        for head_dim in dims:
            cells: list[object] = [head_dim, element]
            for name in features.FEATURES:
                p = features.problem(name, ELEMENTS[element], head_dim)
                variant = features.default(p)
                cells.append(f"{variant}: {features.live_registers(p, variant)}".replace("-direct", ""))
            lines.append(cells)
    return markdown(("head dim", "dtype", *features.FEATURES), lines)


def _described(chip: Chip, kernel: Kernel, element: str, call: Call = CALL) -> list[object]:
    p = predict(chip, kernel, call)
    name = kernel.name.removeprefix("ours ")
    cells = [kernel.head_dim, element, chip.name, name, kernel.registers, kernel.threadgroup_bytes, p.groups]
    return [*cells, f"{p.share:.2f}", p.bound]


# metal-flash-attention's README (8671cdd): forward and backward of one head, of FlashAttention-2's seven products.
_PUBLISHED = {("M1 Max", 64): 0.62, ("M1 Max", 128): 0.63, ("M1 Max", 256): 0.64}
_PUBLISHED |= {("M4 Max", 64): 0.71, ("M4 Max", 128): 0.69, ("M4 Max", 256): 0.61}  # of an M4


def training(chips: Sequence[str] = ("M1 Max", "M3 Max", "M4 Max"), dims: Iterable[int] = (64, 128, 256)) -> str:
    """Forward and backward in fp16, each kernel's share of the peak and the whole by seven products."""
    lines = []
    for head_dim in dims:
        forward = ours(simdgroup.default(2, head_dim, head_dim), "fp16", head_dim)
        for chip in (CHIPS[name] for name in chips):
            made = [
                (kernel, predict(chip, kernel, CALL))
                for kernel in (forward, *gradients("fp16", head_dim, chip.generation))
            ]
            whole = CALL.operations(head_dim, 7) / chip.peak / (sum(p.milliseconds for _, p in made) / 1e3)
            of_gradients = "; ".join(
                f"{kernel.name}: {p.share:.2f} ({kernel.registers} registers)" for kernel, p in made[1:]
            )
            published = _PUBLISHED.get((chip.name, head_dim))
            cells = [head_dim, chip.name, f"{made[0][1].share:.2f}", of_gradients, f"{whole:.2f}", published or ""]
            lines.append(cells)
    header = (
        "head dim",
        "chip",
        "forward",
        "gradients",
        "forward and backward, of 7 products",
        "metal-flash-attention, measured",
    )
    return markdown(header, lines)


def all_variants(chip: Chip, element: str, head_dim: int, call: Call) -> str:
    """Every variant that fits, the fastest first."""
    lines = [
        _described(chip, ours(v, element, head_dim, call.causal), element, call) for v in variants(element, head_dim)
    ]
    lines.sort(key=lambda line: str(line[-2]), reverse=True)
    return markdown(HEADER, lines)


@cache
def _rows() -> list[Row]:
    return rows()


def validation() -> str:
    lines = []
    for r in _rows():
        c = r.call
        shape = f"{c.batch} x {c.heads} x {c.queries} x {c.keys}{' causal' if c.causal else ''}"
        times = f"{r.milliseconds:.3f}", f"{r.prediction.milliseconds:.3f}", f"{r.ratio:.2f}"
        lines.append([r.chip.name, r.kernel.name, r.element, r.kernel.head_dim, shape, *times, r.source])
    header = (
        "chip",
        "kernel",
        "dtype",
        "D",
        "batch x heads x queries x keys",
        "measured ms",
        "predicted ms",
        "ratio",
        "source",
    )
    return markdown(header, lines)


def summary() -> str:
    """Errors by chip and kind of row, and how well tiles of one kernel are ranked."""
    found = _rows()
    known = [r for r in found if r.chip is not UNSTATED]

    def by_hand(r: Row) -> bool:
        return r.kernel.name.startswith("MFA")

    kinds = {
        "all": known,
        "in view when parameters were set": [r for r in known if r.in_view],
        "held out": [r for r in known if not r.in_view],
        "M1 Max, kernels known from their code": [r for r in known if r.chip.name == "M1 Max" and not by_hand(r)],
        "M3 to M5, kernels known from their code": [r for r in known if r.chip.generation > 2 and not by_hand(r)],
        "M1 Max, metal-flash-attention, written by hand": [r for r in known if r.chip.name == "M1 Max" and by_hand(r)],
        "M4, metal-flash-attention, written by hand": [r for r in known if r.chip.name != "M1 Max" and by_hand(r)],
        "one query": [r for r in known if r.call.queries == 1],
        "chip not stated, as 20 cores of M4's kind": [r for r in found if r.chip is UNSTATED],
    }
    lines = []
    for name, members in kinds.items():
        mean, rms = mean_and_rms(r.ratio for r in members)
        _, constant = mean_and_rms(_of_constant_share(members))
        lines.append([name, len(members), f"{mean:.2f}", f"x{rms:.2f}", f"x{constant:.2f}"])
    errors = markdown(
        ("rows", "number", "predicted / measured, mean", "rms", "rms of one share of the peak for all"), lines
    )
    groups: dict[str, list[tuple[float, float]]] = {}
    for r in found:
        if r.group:
            groups.setdefault(r.group, []).append((r.milliseconds, r.prediction.milliseconds))
    counts: dict[str, tuple[int, int]] = {}
    for name, pairs in groups.items():
        for kind in (name.partition(":")[0], "together"):
            counts[kind] = tuple(map(sum, zip(counts.pop(kind, (0, 0)), ranked(pairs), strict=True)))
    lines = [[name, *pair] for name, pair in counts.items()]
    return errors + "\n\n" + markdown(("ranked", "pairs right", "wrong"), lines)


def _of_constant_share(members: list[Row]) -> list[float]:
    """Ratios of the trivial model: each kernel runs at the same share of the ALU peak, the best one for these rows."""
    times = [r.call.operations(r.kernel.head_dim) / r.chip.peak * 1e3 / (r.milliseconds - r.floor) for r in members]
    mean, _ = mean_and_rms(times)
    return [t / mean for t in times]


def write_page() -> None:
    """Put the tables into docs/apple-model.md, each between its two markers."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "defaults": defaults(),
        "features": of_features(),
        "training": training(),
        "summary": summary(),
        "validation": validation(),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        first, last = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:first]}\n{table}\n{text[last:]}"
    PAGE.write_text(text, encoding="utf-8")
