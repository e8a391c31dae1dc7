"""Kernels as a compiler made them: a self-test finds out whether they are right, not who serves in their place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...tiers.metal import compiler, proved


@contextmanager
def unproved() -> Iterator[None]:
    """No kernel is asked for a proof. Afterwards none of them is left, nor what was said of them."""
    before = os.environ.get(proved.PROVE)
    os.environ[proved.PROVE] = "off"
    compiler.clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[proved.PROVE]
        else:
            os.environ[proved.PROVE] = before
        compiler.clear()
