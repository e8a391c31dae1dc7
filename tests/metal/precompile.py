"""Compiling the kernels of many calls on all cores, into the runner's cache on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from flash_attn_mps.tiers.metal import compiler, launch
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import compile_shader, observe


def specializations(launches: Iterable[tuple], run: Callable[..., object] = launch.run) -> list[Specialization]:
    """What `run` asks the compiler for, given each of `launches`, each once. Nothing is compiled."""
    asked: dict[Specialization, mock.Mock] = {}
    with mock.patch.object(compiler, "kernel", lambda specialization: asked.setdefault(specialization, mock.Mock())):
        for arguments in launches:
            run(*arguments)
    return list(asked)


def precompile(launches: Iterable[tuple], instrumented: bool = True, run: Callable[..., object] = launch.run) -> None:
    """Instrumented builds, or those that run without `observe`. `launches`: the arguments of `run`, by default
    (problem, kernel, variant)."""

    def compile_one(specialization: Specialization) -> None:
        with observe(instrumented=instrumented):
            compile_shader(specialization.source())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, specializations(launches, run)))
