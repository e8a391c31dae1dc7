"""The Metal tiers where there is no Metal."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

from flash_attn_mps.tiers.metal import compiler, decode, launch
from metal_host import compile_shader
from tests.replaced_tiers import replace_tier


@contextlib.contextmanager
def metal_on(device: str = "cpu", version: str | None = None) -> Iterator[None]:
    """The Metal tiers serve tensors on `device`, on the runner; kernels and failures are forgotten before and after.

    `version`: of Metal, if not the runner's default.
    """
    compile_ = compile_shader if version is None else functools.partial(compile_shader, version=version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_shader", compile_)
        patch.setattr(compiler, "device_types", frozenset({device}))
        compiler.clear()
        try:
            yield
        finally:
            compiler.clear()


def decode_serves_all(patch: pytest.MonkeyPatch) -> None:
    """The decode tier computes calls of any number of queries and keys, the keys of all but the shortest in splits."""
    replace_tier(patch, decode.TIER.name, limits=lambda p: launch.limits(p, decode.MAX_HEAD_DIM))
    patch.setattr(decode, "cheapest", lambda groups, rounds, *_: min(rounds, decode.MAX_SPLITS))
    shapes = decode.shapes
    small = {"units": 2, "keys": 8}
    patch.setattr(decode, "shapes", lambda *how: tuple(variant._replace(**small) for variant in shapes(*how)[:1]))
