"""Which variant of the tiled kernel a call gets: the one that is forced, or stored by `tune`, or this GPU's default."""

from __future__ import annotations

import functools
import os

from ...problem import AttentionProblem
from . import gpu, store
from .specialization import Variant

FORCE = "MTLFLASHATTN_VARIANT"
TUNE = "MTLFLASHATTN_TUNE"
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
    votes = 2 * 4 * variant.simdgroups  # under a mask: staging.metal, `wanted`
    return variant.keys * rows * element_bytes + votes


@functools.lru_cache(maxsize=512)
def default(element_bytes: int, head_dim: int, head_dim_v: int) -> Variant:
    """What should do well on this machine's GPU generation: M1 and M2 staged, later ones direct.

    An unknown GPU gets the staged one, which does no more of anything than PyTorch's kernel (tests/metal/counters.py).
    """
    wide = max(head_dim, head_dim_v)
    staged = gpu.generation() <= 2
    rows = 16 if wide <= 64 and element_bytes == 2 else 8
    keys = 32 if wide <= 128 else 16
    preferred = Variant(rows, 4, keys, staged)
    candidates = [preferred, preferred._replace(keys=16), preferred._replace(keys=8), preferred._replace(staged=False)]
    return next(variant for variant in candidates if fits(variant, element_bytes, head_dim, head_dim_v))


_SHORT, _MEDIUM = store.LENGTHS["short"], store.LENGTHS["medium"]
_chosen: dict[tuple, Variant] = {}  # by class of calls
_stored: dict[store.Key, store.Winner] | None = None  # None: the file has not been read


def chosen(p: AttentionProblem) -> Variant:
    """The variant for `p`: one dictionary look-up but for the first call of a class.

    Raises `NotImplementedError` where `MTLFLASHATTN_VARIANT` names one that these head dims do not allow.
    """
    q, queries = p.q, p.max_seqlen_q
    length = 0 if queries <= _SHORT else 1 if queries <= _MEDIUM else 2
    call = (q.dtype, q.shape[-1], p.v.shape[-1], length, p.window_left >= 0, p.window_right >= 0)
    variant = _chosen.get(call)
    if variant is None:
        variant = _chosen[call] = _choose(p)
    return variant


def forget() -> None:
    """Choose anew from now on: the environment, or what is stored, has changed."""
    global _stored
    _chosen.clear()
    _stored = None


def _choose(p: AttentionProblem) -> Variant:
    global _stored
    shape = (p.q.itemsize, p.q.shape[-1], p.v.shape[-1])
    if wanted := os.environ.get(FORCE):
        return _forced(wanted, shape)
    if _stored is None:
        _stored = store.load()
    key = store.key_of(p)
    fitting = set(all_variants(*shape))
    # A class that was not tuned is closest to the one with a simpler mask.
    for mask in store.MASKS[store.MASKS.index(key.mask) :: -1]:
        winner = _stored.get(key._replace(mask=mask))
        if winner is not None and winner.variant in fitting:
            return winner.variant
    if key.length == "long" and os.environ.get(TUNE, "").lower() == "auto":
        from . import tune

        winner = tune.briefly(p)
        _stored[key] = winner
        return winner.variant
    return default(*shape)


def _forced(text: str, shape: tuple[int, int, int]) -> Variant:
    fitting = all_variants(*shape)
    variant = next((variant for variant in fitting if str(variant) == text.replace(" ", "").lower()), None)
    if variant is None:
        raise NotImplementedError(
            f"{FORCE}={text} is no variant for head dims {shape[1]} and {shape[2]} of {shape[0]} bytes; "
            f"there are {', '.join(map(str, fitting))}"
        )
    return variant
