"""Compiling the kernels of many calls on all cores, into the runner's cache on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import compiler, launch
from flash_attn_mps.tiers.metal.kernel import Kernel
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import compile_shader, observe


def specializations(launches: Iterable[tuple[AttentionProblem, Kernel, Any]]) -> list[Specialization]:
    """What `launch.run` asks the compiler for, each once. Nothing is compiled."""
    asked: dict[Specialization, None] = {}
    with mock.patch.object(compiler, "kernel", asked.setdefault):
        for arguments in launches:
            launch.run(*arguments)
    return list(asked)


def precompile(launches: Iterable[tuple[AttentionProblem, Kernel, Any]], instrumented: bool = True) -> None:
    """Instrumented builds, or those that run without `observe`."""

    def compile_one(specialization: Specialization) -> None:
        with observe(instrumented=instrumented):
            compile_shader(specialization.source())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, specializations(launches)))
