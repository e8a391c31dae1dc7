"""Which variant of the tiled kernel a call gets."""

from __future__ import annotations

import functools
import re
import subprocess

from .specialization import Variant

MAX_THREADGROUP_BYTES = 32 << 10


def all_variants(element_bytes: int, head_dim: int, head_dim_v: int) -> list[Variant]:
    """Every variant that fits these head dims: what `tune` tries, and what the tests run."""
    shapes = [
        Variant(rows, simdgroups, keys, staged)
        for rows in (8, 16, 32)
        for simdgroups in (1, 2, 4, 8)
        for keys in (8, 16, 32, 64)
        for staged in (False, True)
    ]
    return [variant for variant in shapes if fits(variant, element_bytes, head_dim, head_dim_v)]


def fits(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> bool:
    """Does it stay within threadgroup memory, and within registers that no GPU spills badly?"""
    wide = max(head_dim, head_dim_v)
    if variant.staged and threadgroup_bytes(variant, element_bytes, head_dim, head_dim_v) > MAX_THREADGROUP_BYTES:
        return False
    # 32-bit registers of a lane for q, o and s alone, of some 256.
    registers = variant.rows // 8 * (wide // 8 * (2 + element_bytes // 2) + variant.keys // 4)
    return registers <= 208 and not (variant.staged and variant.simdgroups == 1)


def threadgroup_bytes(variant: Variant, element_bytes: int, head_dim: int, head_dim_v: int) -> int:
    if not variant.staged:
        return 0
    padding = 16 // element_bytes
    rows = sum(-(-dim // 8) * 8 + padding for dim in (head_dim, head_dim_v))
    return variant.keys * rows * element_bytes


@functools.lru_cache(maxsize=512)
def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What should do well on this machine's GPU generation (Apple M1 and M2: staged; later ones: direct)."""
    wide = max(head_dim, head_dim_v)
    staged = generation() in (1, 2)
    rows = 16 if wide <= 64 and element_bytes == 2 else 8
    keys = 32 if wide <= 128 else 16
    preferred = Variant(rows, 4, keys, staged)
    candidates = [preferred, preferred._replace(keys=16), preferred._replace(keys=8), preferred._replace(staged=False)]
    return next(variant for variant in candidates if fits(variant, element_bytes, head_dim, head_dim_v))


@functools.cache
def generation() -> int:
    """The number in "Apple M3 Max"; 0 where there is none to be found."""
    try:
        brand = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except OSError:
        return 0
    found = re.search(r"Apple M(\d+)", brand)
    return int(found.group(1)) if found else 0
