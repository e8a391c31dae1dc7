"""The Metal tiers where there is no Metal."""

import contextlib
from collections.abc import Iterator

import pytest

from flash_attn_mps.tiers.metal import compiler
from metal_host import compile_shader


@contextlib.contextmanager
def metal_on(device: str = "cpu") -> Iterator[None]:
    """The Metal tiers serve tensors on `device`, on the runner; kernels and failures are forgotten before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_shader", compile_shader)
        patch.setattr(compiler, "device_types", frozenset({device}))
        compiler.clear()
        try:
            yield
        finally:
            compiler.clear()
