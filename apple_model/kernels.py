"""The kernels that the model knows from their code: this project's, and the one that PyTorch ships for MPS."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import torch

from flash_attn_mps import describe
from flash_attn_mps.tiers.metal import backward_kernels, gpu, launch
from flash_attn_mps.tiers.metal.simdgroup import FORWARD, Variant
from metal_host import compile_shader
from metal_host.library import ShaderLibrary

from . import trace
from .program import Operation, Program, program_of

ELEMENTS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Products that a load is moved ahead of its place. Apple's compiler was not seen: what it does is part of the model.
AHEAD = 16
_METAL = {"fp16": "half", "bf16": "bfloat", "fp32": "float"}


@dataclass(frozen=True)
class Kernel:
    """A kernel's main loop, and what a threadgroup of it takes."""

    name: str
    simdgroups: int  # of a threadgroup
    rows: int  # queries of a threadgroup
    keys: int  # of a round
    head_dim: int
    registers: int  # of a lane, 32 bits each
    threadgroup_bytes: int
    program: Program
    leader: tuple[Operation, ...] = ()  # what the first simdgroup does, where it differs
    products: int = 2  # of matrices that it computes: q k^T and p v forward

    def __hash__(self) -> int:
        return id(self)


def _kernel(
    name: str,
    library: ShaderLibrary,
    entry: str,
    values: list,
    shape: tuple[tuple[int, int, int], tuple[int, int, int]],
    rows: int,
    keys: int,
    head_dim: int,
    position: int = 0,
    products: int = 2,
) -> Kernel:
    ptx = library.apple_ptx(entry)
    spaces = {p.index: p.space for p in library.kernel(entry).arguments if not isinstance(p, str)}
    buffers: dict[int, bytes | None] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and spaces.get(index) != "constant":
            buffers[index] = None
        else:
            buffers[index] = torch.as_tensor(value).numpy().tobytes()
    program = program_of(trace.run(ptx, buffers, *shape, position), AHEAD)
    shared = sum(int(n) for n in re.findall(r"^\.shared .*\[(\d+)\];", ptx, re.MULTILINE))
    simdgroups = shape[1][0] // 32
    registers = library.live_registers(entry)
    return Kernel(name, simdgroups, rows, keys, head_dim, registers, shared, program, (), products)


@cache
def ours(variant: Variant, element: str, head_dim: int, causal: bool = False) -> Kernel:
    """This project's forward kernel."""
    length = max(256, 6 * variant.keys, 2 * variant.rows * variant.simdgroups)
    q = torch.empty(1, length, 2, head_dim, dtype=ELEMENTS[element], device="meta")
    p = describe.dense(q, q, q, describe.CallOptions(causal=causal))
    outputs = launch.outputs(p)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": outputs.out, "lse": outputs.lse}
    specialization, values = launch.arguments(FORWARD, p, variant, tensors)
    library = compile_shader(specialization.source(), kernels=[])
    rows = variant.rows * variant.simdgroups
    shape = FORWARD.grid(p, variant)
    return _kernel(f"ours {variant}", library, FORWARD.entry, values, shape, rows, variant.keys, head_dim)


def gradients(element: str, head_dim: int, generation: int) -> list[Kernel]:
    """This project's kernels for dq, dk and dv in the default variants of a generation of chips; dk and dv may have one
    each."""
    size = ELEMENTS[element].itemsize
    with patch.object(gpu, "generation", lambda: generation):
        backward_kernels._default.cache_clear()
        of_queries, of_keys = (
            k.default(size, head_dim, head_dim) for k in (backward_kernels.QUERIES, backward_kernels.KEYS)
        )
    backward_kernels._default.cache_clear()
    made = (("dk",), ("dv",)) if of_keys.split else (("dk", "dv"),)
    return [
        _gradient(("dq",), of_queries, element, head_dim),
        *(_gradient(m, of_keys, element, head_dim) for m in made),
    ]


@cache
def _gradient(made: tuple[str, ...], variant: backward_kernels.Variant, element: str, head_dim: int) -> Kernel:
    """A round is a block of the other side."""
    kernel = backward_kernels.QUERIES if made == ("dq",) else backward_kernels.KEYS
    rows = variant.held * variant.simdgroups
    length = max(256, 6 * variant.passing, 2 * rows)
    q = torch.empty(1, length, 2, head_dim, dtype=ELEMENTS[element], device="meta")
    p = describe.dense(q, q, q, describe.CallOptions())
    terms = torch.empty(*p.lse_shape, 4, device="meta")
    tensors: dict[str, torch.Tensor | None] = {"q": q, "k": q, "v": q, "dout": q, "terms": terms}
    parameters = {}
    if kernel is backward_kernels.KEYS:
        tensors |= {"dk": None, "dv": None}
        parameters = {"total_k": length, "heads_together": 1}
    tensors |= dict.fromkeys(made, q)
    specialization, values = launch.arguments(kernel, p, variant, tensors, parameters)
    library = compile_shader(specialization.source(), kernels=[])
    # q k^T again; do v^T, which dv does without; and one for each gradient.
    products = (1 if made == ("dv",) else 2) + len(made)
    name, shape = f"{'+'.join(made)} {variant}", kernel.grid(p, variant)
    return _kernel(name, library, kernel.entry, values, shape, rows, variant.passing, head_dim, 0, products)


def torch_launch(
    tile: tuple[int, int, int], element: str, head_dim: int, causal: bool, heads: int, length: int
) -> tuple[ShaderLibrary, str, list[torch.Tensor], tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """(library, entry, arguments, threads in all and of a group) of PyTorch's prefill kernel; see `torchs`."""
    queries, keys, simdgroups = tile
    entry = f"prefill_{queries}_{keys}_{head_dim}"
    source = (
        "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
        "#include <ATen/native/mps/kernels/PrefillAttention.h>\n"
        f'instantiate_kernel("{entry}", prefill_attention, {_METAL[element]}, {queries}, {keys}, {head_dim}, '
        f"{simdgroups}, 1, 0, {int(causal)}, {_METAL[element]})\n"
    )
    strides = [heads * length * head_dim, length * head_dim, head_dim] * 4
    packed = struct.pack("<6i2f12i", 1, heads, head_dim, length, length, 1, head_dim**-0.5, 1.0, *strides)
    tensor = torch.empty(1, heads, length, head_dim, dtype=ELEMENTS[element], device="meta")
    parameters = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    values = [tensor, tensor, tensor, tensor, parameters, torch.zeros(4, dtype=torch.int32), tensor]
    shape = ((-(-length // queries) * 32 * simdgroups, heads, 1), (32 * simdgroups, 1, 1))
    return compile_shader(source, kernels=[]), entry, values, shape


@cache
def torchs(
    tile: tuple[int, int, int], element: str, head_dim: int, causal: bool = False, name: str = "torch"
) -> Kernel:
    """PyTorch's prefill kernel, whose text is MLX's and Hugging Face's too; tile: queries, keys, simdgroups.

    Needs a torch that has ATen/native/mps/kernels/PrefillAttention.h (2.13); the tile need not be one that it ships.
    """
    queries, keys, simdgroups = tile
    length = max(256, 6 * keys, queries)
    library, entry, values, shape = torch_launch(tile, element, head_dim, causal, 1, length)
    label, last_tile = f"{name} {queries}x{keys}x{simdgroups}", -(-length // queries) - 1
    return _kernel(label, library, entry, values, shape, queries, keys, head_dim, last_tile)


def with_rescaling(kernel: Kernel, rounds: int) -> Program:
    """The program with what growing maxima cost: that of row j grows in round n with probability 1/n, and any of a
    fragment's eight costs."""
    program = kernel.program
    if not program.rescaling or rounds < 1:
        return program
    share = sum(1 - (1 - 1 / n) ** 8 for n in range(1, rounds + 1)) / rounds
    extra = Operation("alu", round(program.rescaling * share))
    return replace(program, operations=[*program.operations, extra])
