"""The `tensorops` tier: tiled FlashAttention-2 on the matrix units that M5 and later have beside their ALUs.

The kernel is that of the `simdgroup` tier (`kernels/forward.metal`) on other fragments: cooperative tensors, which
Metal 4 multiplies (`kernels/cooperative.metal`, `kernels/tensorops.metal`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...problem import AttentionProblem, Result
from ..tier import Tier
from . import compiler, launch, simdgroup, trial, tune, variants
from . import tensorops_gate as gate
from . import tensorops_probe as probe
from .kernel import OPTIONAL_BUFFERS, SERVES, Choice, Grid, TunedKernel
from .prove import Proof
from .specialization import Specialization

LAYOUTS = {probe.GENERIC: 0, probe.APPLE10: 1, probe.LEGACY: 2}  # as cooperative.metal has them


class Variant(NamedTuple):
    """The shape of the kernel: what is fastest depends on the GPU."""

    rows: int  # queries of a simdgroup: a multiple of 16
    simdgroups: int  # simdgroups of a threadgroup
    keys: int  # keys of a block: a multiple of 32
    shared_q: bool = False  # are queries in threadgroup memory? Else in registers.
    slices: int = 1  # simdgroups that share the head dims of their queries: 2 are a threadgroup
    layout: int = LAYOUTS[probe.GENERIC]  # of cooperative tensors on this machine: nobody's choice

    def __str__(self) -> str:
        """Like "16x4x32", "16x4x32-q" or "16x2x32-q-split", as `MTLFLASHATTN_TENSOROPS_VARIANT` takes it."""
        return f"{self.rows}x{self.simdgroups}x{self.keys}{'-q' * self.shared_q}{'-split' * (self.slices - 1)}"


MAX_REGISTERS = simdgroup.MAX_REGISTERS


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Is there room for it? Queries leave the registers, and head dims are split, only where they must."""
    if element_bytes != 2 or (variant.slices > 1 and (head_dim % 2 or head_dim_v % 2)):
        return False
    shape = (head_dim, head_dim_v)
    if threadgroup_bytes(variant, *shape) > simdgroup.MAX_THREADGROUP_BYTES:
        return False
    if variant.shared_q and live_registers(variant._replace(shared_q=False), *shape) <= MAX_REGISTERS:
        return False
    if variant.slices > 1 and live_registers(variant._replace(slices=1, shared_q=True), *shape) <= MAX_REGISTERS:
        return False
    return live_registers(variant, *shape) <= MAX_REGISTERS


def live_registers(variant: Variant, head_dim: int, head_dim_v: int) -> int:
    """About how many registers of a lane are alive together in a block that nothing hides a key of.

    o, q, s and the operands that are loaded together are exact; the rest is what the Metal runner counts beside them
    (docs/tensorops.md).
    """
    row_tiles, key_tiles = variant.rows // 16, variant.keys // 32
    d, dv = head_dim // variant.slices, head_dim_v // variant.slices
    o, s = 16 * row_tiles * -(-dv // 32), 16 * row_tiles * key_tiles
    q, operands = (0, 12) if variant.shared_q else (4 * row_tiles * -(-d // 16), 23 if d % 32 else 16)
    return o + s + q + operands + 25 + 6 * (row_tiles - 1) + 5 * variant.shared_q + 5 * (variant.slices - 1)


def threadgroup_bytes(variant: Variant, head_dim: int, head_dim_v: int) -> int:
    """As forward.metal declares them under an unknown layout, which needs the most: `Exchange` in cooperative.metal."""
    total = variant.simdgroups * (16 * 16 * 2 + 16 * 32 * (2 + 4))
    if variant.shared_q:
        total += variant.simdgroups * variant.rows * -(-(head_dim // variant.slices) // 16) * 16 * 2
    if variant.slices > 1:
        total += 2 * variant.slices * variant.rows * variant.keys * 4
    return total


# The best first, as far as that can be counted. Four simdgroups: as many rows as others' kernels for these units have.
_PREFERRED = (
    Variant(16, 4, 32),
    Variant(16, 4, 32, shared_q=True),
    Variant(16, 2, 32, shared_q=True),
    Variant(16, 2, 32, slices=2),
    Variant(16, 2, 32, shared_q=True, slices=2),
)


@functools.lru_cache(maxsize=512)
def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What should do well where nothing was tuned."""
    return next(v for v in _PREFERRED if fits(v, element_bytes, head_dim, head_dim_v))


def fallbacks(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> list[Variant]:
    """The usual one, then smaller groups."""
    usual = default(element_bytes, head_dim, head_dim_v)
    return [usual, *(usual._replace(simdgroups=n) for n in (2, 1) if n < usual.simdgroups and usual.slices == 1)]


@functools.lru_cache(maxsize=512)
def _has_room(head_dim: int, head_dim_v: int) -> bool:
    return any(fits(variant, 2, head_dim, head_dim_v) for variant in _PREFERRED)


def run(p: AttentionProblem, variant: Variant) -> Result | None:
    """The forward pass. None where the kernel is not to be used on this machine."""
    return None if probe.layout() is None else launch.run(p, FORWARD, on_this_machine(variant))


def on_this_machine(variant: Variant) -> Variant:
    """With the layout that the probe found."""
    layout = probe.layout()
    assert layout is not None
    return variant._replace(layout=LAYOUTS[layout])


def _trial(s: Specialization) -> trial.Trial:
    """Work for all simdgroups of a group, and a tail. There are more queries than keys: the first may see none."""
    queries, keys = s.variant.rows * s.variant.simdgroups, s.variant.keys
    seqlen_q = max(queries + 19, 2 * keys + 18)
    return trial.forward(s, seqlen_q, seqlen_q - 5)


def _grid(p: AttentionProblem, variant: Variant) -> Grid:
    return launch.tiles_of_queries(p, variant.rows * variant.simdgroups // variant.slices, 32 * variant.simdgroups)


FORWARD = TunedKernel(
    entry="attention_tensorops",
    headers=("metal_stdlib", "metal_tensor", "MetalPerformancePrimitives/MetalPerformancePrimitives.h"),
    sources=(
        *launch.LANE_SOURCES,
        "cooperative",
        *launch.FORWARD_SOURCES,
        "tensorops",
        "attend",
        "forward",
    ),
    buffers=launch.FORWARD_BUFFERS,
    optional=tuple(OPTIONAL_BUFFERS),
    defines={"attention_forward": "attention_tensorops"},  # the name that the function has in forward.metal
    grid=_grid,
    variants=tuple(
        Variant(rows, simdgroups, keys, shared_q, slices)
        for rows in (16, 32)
        for keys in (32, 64)
        for shared_q in (False, True)
        for simdgroups, slices in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2))
    ),
    fits=fits,
    default=default,
    variable="MTLFLASHATTN_TENSOROPS_VARIANT",
    fallbacks=fallbacks,
    run=run,
    proof=Proof(_trial),
)

WAYS = Choice(
    entry="attention_tiled",
    variants=(gate.NAME, simdgroup.TIER.name),
    fits=lambda _, element_bytes, *dims: element_bytes == 2 and _has_room(*dims),
    default=lambda *_: simdgroup.TIER.name if gate.unsuited() else gate.NAME,
    variable="MTLFLASHATTN_FORWARD",
    run=lambda p, way: (serve if way == gate.NAME else simdgroup.serve)(p),
)
_NOT_FASTEST = f"{simdgroup.TIER.name} is faster for such calls, as tuned or as {WAYS.variable} asks for"


def limits(p: AttentionProblem) -> list[str]:
    """Why another kernel is to compute `p`, or why no kernel can; what closes the tier for all calls comes first."""
    if p.q.device.type in compiler.device_types and (unmet := gate.unmet()):
        return list(unmet)
    reasons, head_dim, head_dim_v = launch.limits(p), p.q.shape[-1], p.v.shape[-1]
    if p.q.itemsize != 2:
        reasons.append(f"matrix units multiply 16 bits, and q is {str(p.q.dtype).removeprefix('torch.')}")
    if not _has_room(head_dim, head_dim_v):
        reasons.append(f"head dims {head_dim} and {head_dim_v} do not fit in registers: odd ones cannot be halved")
    return reasons or _closed(p)


def _closed(p: AttentionProblem) -> list[str]:
    """Why the tier does not compute calls like `p` on this machine."""
    if variants.chosen(p, WAYS) != gate.NAME and not gate.is_forced():
        return list(gate.unsuited()) or [_NOT_FASTEST]
    return probe.why_closed() if probe.layout() is None else []


def serve(p: AttentionProblem) -> Result | None:
    """The forward pass, by the variant that is chosen or one in its place. None where none is to be used."""
    variant = variants.chosen(p, FORWARD, tune.briefly)
    result = run(p, variant)
    if result is None:
        others = (run(p, other) for other in variants.instead(p, FORWARD, variant))
        result = next((found for found in others if found is not None), None)
    return result


TIER = Tier(gate.NAME, SERVES | {"dropout", "quantised"}, limits, serve, metal=True)
