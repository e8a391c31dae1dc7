"""The tiled forward kernel against the kernel that PyTorch ships for MPS, both run as PTX on an NVIDIA GPU.

    python bench/nvidia_forward.py prepare DIRECTORY     anywhere, with the test extra and torch 2.13: compiles to PTX
    python bench/nvidia_forward.py run DIRECTORY         on a machine with a GPU, torch and ptxas; needs no compiler

`run` prints, for each problem, the speed of PyTorch's kernel (`ATen/native/mps/kernels/PrefillAttention.h` of the
installed torch), of our best variant, and of the best one that takes at most 128 registers a thread and spills none, if
there is one; geometric means of the ratios; then varlen against a dense batch. Spilled bytes (sp) are those of all
functions. Times on an NVIDIA GPU with its tensor cores rank no kernels for a Mac: see docs/apple-model.md.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from flash_attn_mps import describe, problem
from flash_attn_mps.tiers.metal import launch
from flash_attn_mps.tiers.metal.simdgroup import FORWARD, Variant
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import nvidia

HEADS, HEADS_K = 16, 8
DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}
MASKS = {"full": (-1, -1), "causal": (-1, 0), "window": (1024, 0)}
# PyTorch's tiles: queries, keys, simdgroups of a group.
TORCH_TILES = {64: (32, 32, 4), 128: (32, 16, 4), 256: (16, 8, 2)}
REGISTER_LIMITS = (128, 255)
VARLEN_VARIANT = Variant(16, 4, 32, False)


def variants(dtype: str, head_dim: int) -> list[Variant]:
    fitting = FORWARD.fitting(DTYPES[dtype].itemsize, head_dim, head_dim)
    return [v for v in fitting if v.simdgroups == 4 and v.keys >= 16 and v.rows <= (8 if dtype == "float" else 16)]


def problems() -> list[tuple[str, int, str, int, int]]:
    """(dtype, head_dim, mask, batch, length)."""
    listed = [
        (dtype, head_dim, mask, batch, length)
        for dtype in ("half", "bfloat")
        for head_dim in (64, 128)
        for mask in ("full", "causal")
        for batch in (1, 4)
        for length in (512, 2048, 8192)
    ]
    listed += [(dtype, head_dim, "window", 1, 8192) for dtype in ("half", "bfloat") for head_dim in (64, 128)]
    listed += [("half", 256, mask, 1, length) for mask in ("full", "causal") for length in (512, 2048, 8192)]
    listed += [("float", head_dim, mask, 1, 2048) for head_dim in (64, 128) for mask in ("full", "causal")]
    return listed


def tensors(dtype: str, head_dim: int, batch: int, length: int, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, length, heads, head_dim) for heads in (HEADS, HEADS_K, HEADS_K)]
    return [torch.randn(shape, device=device, dtype=DTYPES[dtype]) for shape in shapes]


def described(dtype: str, head_dim: int, mask: str, q, k, v) -> problem.AttentionProblem:
    options = describe.CallOptions(window_size=MASKS[mask], want_lse=True)
    return describe.dense(q, k, v, options)


def arguments(p: problem.AttentionProblem, variant: Variant, out: torch.Tensor, lse: torch.Tensor):
    """What the kernel is compiled for, and what it is called with."""
    return launch.arguments(FORWARD, p, variant, {"q": p.q, "k": p.k, "v": p.v, "out": out, "lse": lse})


def specialization(p: problem.AttentionProblem, variant: Variant) -> Specialization:
    result = launch.outputs(p)
    return arguments(p, variant, result.out, result.lse)[0]


def shape_of(variant: Variant) -> str:
    """Queries of a simdgroup, simdgroups, keys of a block; staged or direct; q in threadgroup memory."""
    way = f"{'s' if variant.staged else 'd'}{'q' * variant.shared_q}"
    return f"{variant.rows}x{variant.simdgroups}x{variant.keys}{way}"


def name_of(dtype: str, head_dim: int, mask: str, variant: Variant) -> str:
    return f"ours_{dtype}_{head_dim}_{mask}_{shape_of(variant)}"


def torch_name(dtype: str, head_dim: int, causal: bool) -> str:
    queries, keys, simdgroups = TORCH_TILES[head_dim]
    kind = {"half": "float16", "bfloat": "bfloat16", "float": "float32"}[dtype]
    return (
        f"prefill_attention_{kind}_bq{queries}_bk{keys}_bd{head_dim}_wm{simdgroups}_wn1_hm0_dc{int(causal)}_mask{kind}"
    )


def prepare(directory: Path) -> None:
    from metal_host import compile_shader

    # PyTorch's kernel multiplies in float: three products in tf32 for each of its own would flatter ours.
    os.environ["METAL_HOST_FAST_MATRICES"] = "1"
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}

    def ours(name: str, p: problem.AttentionProblem, variant: Variant) -> None:
        module = compile_shader(specialization(p, variant).source()).module("attention_forward")
        entries[name] = module.entries["attention_forward"]
        (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, 32 * variant.simdgroups))

    for dtype, head_dim, mask in sorted({p[:3] for p in problems()}):
        for variant in variants(dtype, head_dim):
            p = described(dtype, head_dim, mask, *tensors(dtype, head_dim, 1, 2048, "cpu"))
            ours(name_of(dtype, head_dim, mask, variant), p, variant)
    for mask in ("full", "causal"):
        ours(f"varlen_{mask}", packed("half", mask, 64, [64, 128], "cpu"), VARLEN_VARIANT)
    header = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
    library = compile_shader(header + "#include <ATen/native/mps/kernels/PrefillAttention.h>\n")
    names = dir(library)
    for dtype, head_dim in sorted({(p[0], p[1]) for p in problems()}):
        for causal in (False, True):
            name = torch_name(dtype, head_dim, causal)
            if name not in names:
                raise SystemExit(
                    f"PrefillAttention.h has no {name}; it has {[n for n in names if f'bd{head_dim}_' in n][:4]}"
                )
            module = library.module(name)
            entries[name] = module.entries[name]
            (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, 32 * TORCH_TILES[head_dim][2]))
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


class Kernel:
    """An assembled kernel that can be launched again and again with arguments already on the GPU."""

    def __init__(self, directory: Path, name: str, entry: str, limit: int | None):
        ptx, cubin = directory / f"{name}.{limit or 0}.ptx", directory / f"{name}.{limit or 0}.cubin"
        text = (directory / f"{name}.ptx").read_text()
        ptx.write_text(re.sub(r"(\.maxntid [^\n]*)", rf"\1\n.maxnreg {limit}", text) if limit else text)
        command = ["ptxas", f"-arch={nvidia.ARCHITECTURE}", "-v", str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.name, self.entry, self.cubin, self.limit = name, entry, cubin, limit
        if done.returncode:
            raise RuntimeError(done.stderr)
        self.used = nvidia.said_of(done.stderr, entry)
        self.function = None

    def resources(self) -> str:
        return f"r{self.used.registers} sp{self.used.spill_stores + self.used.spill_loads} tg{self.used.shared}"

    def fits_apple(self) -> bool:
        """Within the 128 registers of an Apple GPU, and nothing spilled?"""
        return self.used.registers <= 128 and not self.used.spill_stores + self.used.spill_loads

    def launch(self, buffers: list[torch.Tensor], grid: tuple[int, int, int], group: int):
        """A function that launches the kernel; `grid` in threads."""
        if self.function is None:
            module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
            nvidia._call("cuModuleLoadData", ctypes.byref(module), self.cubin.read_bytes())
            nvidia._call("cuModuleGetFunction", ctypes.byref(self.function), module, self.entry.encode())
        arguments = nvidia._Arguments(grid=(ctypes.c_uint32 * 3)(*grid), group=(ctypes.c_uint32 * 3)(group, 1, 1))
        for index, tensor in enumerate(buffers):
            arguments.arguments[index] = tensor.data_ptr()
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        blocks = (grid[0] // group, grid[1], grid[2])

        def go(kept=(buffers, arguments)):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            nvidia._call("cuLaunchKernel", self.function, *blocks, group, 1, 1, 0, stream, pointers, None)

        return go


def median_ms(launches: dict[str, object], rounds: int = 5) -> dict[str, float]:
    """The median time of each launch; rounds take them in turns, every other one backwards."""
    times: dict[str, list[float]] = {name: [] for name in launches}
    for go in launches.values():
        go()
    for turn in range(rounds):
        for name in list(launches)[:: 1 if turn % 2 else -1]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            launches[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def our_launch(kernel: Kernel, variant: Variant, p, out, lse):
    _, values = arguments(p, variant, out, lse)
    buffers = [torch.tensor(x, dtype=torch.int64, device="cuda") if isinstance(x, list) else x for x in values]
    threads, (group, _, _) = FORWARD.grid(p, variant)
    return kernel.launch(buffers, threads, group)


def packed(dtype: str, mask: str, head_dim: int, lengths: list[int], device: str) -> problem.AttentionProblem:
    q, k, v = (t.flatten(0, 1) for t in tensors(dtype, head_dim, 1, sum(lengths), device))
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    options = describe.CallOptions(window_size=MASKS[mask], want_lse=True)
    return describe.varlen(q, k, v, ends, ends.clone(), max(lengths), max(lengths), options)


def blocks(lengths: list[int], variant: Variant, causal: bool) -> int:
    """Blocks of scores that a head computes."""
    rows, total = variant.rows, 0
    for length in lengths:
        for first in range(0, length, rows):
            seen = min(first + rows, length) if causal else length
            total += -(-seen // variant.keys)
    return total


def compare_varlen(kernels: dict, rounds: int = 9) -> None:
    """64 sequences of mixed length in one call, against a dense batch, per block of scores."""
    variant, dtype, head_dim = VARLEN_VARIANT, "half", 64
    lengths = [64 * (1 + 7 * n % 31) + 13 * n % 64 for n in range(64)]
    even = int((sum(n * n for n in lengths) / 64) ** 0.5) // 64 * 64
    for mask in ("full", "causal"):
        ragged = packed(dtype, mask, head_dim, lengths, "cuda")
        dense = described(dtype, head_dim, mask, *tensors(dtype, head_dim, 64, even, "cuda"))
        launches = {}
        for name, p, entry in (
            ("varlen", ragged, "varlen_" + mask),
            ("dense", dense, name_of(dtype, head_dim, mask, variant)),
        ):
            out, lse = torch.empty_like(p.q), torch.empty(p.lse_shape, device="cuda")
            launches[name] = our_launch(kernels[entry, REGISTER_LIMITS[-1]], variant, p, out, lse)
        times = median_ms(launches, rounds)
        causal = mask == "causal"
        each = {n: times[n] / blocks(ls, variant, causal) for n, ls in (("varlen", lengths), ("dense", [even] * 64))}
        what = f"varlen, 64 sequences of {min(lengths)} to {max(lengths)}, {mask}"
        print(f"{what}: {each['varlen'] / each['dense']:.3f} times the dense batch, per block of scores")


def torch_launch(kernel: Kernel, head_dim: int, q, k, v, out):
    """`out` and the inputs are `(batch, heads, length, head_dim)`."""
    batch, _, length, _ = q.shape
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    packed = struct.pack(
        "<6i2f12i", batch, HEADS, head_dim, length, length, HEADS // HEADS_K, head_dim**-0.5, 1.0, *strides
    )
    values = torch.frombuffer(bytearray(packed), dtype=torch.uint8).cuda()
    nothing = torch.zeros(64, device="cuda")
    queries, _, simdgroups = TORCH_TILES[head_dim]
    grid = (-(-length // queries) * 32 * simdgroups, HEADS, batch)
    return kernel.launch([q, k, v, out, values, nothing, nothing], grid, 32 * simdgroups)


def run(directory: Path) -> None:
    nvidia._driver()
    entries = json.loads((directory / "entries.json").read_text())
    jobs = [
        (name, limit)
        for name in entries
        for limit in (REGISTER_LIMITS if name.startswith(("ours", "varlen")) else (None,))
    ]
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda job: Kernel(directory, job[0], entries[job[0]], job[1]), jobs)
        kernels = {(k.name, k.limit): k for k in made}
    print(torch.cuda.get_device_name(), flush=True)
    ratios: dict[tuple[str, ...], list[tuple[float, float | None]]] = {}
    for dtype, head_dim, mask, batch, length in problems():
        q, k, v = tensors(dtype, head_dim, batch, length, "cuda")
        p = described(dtype, head_dim, mask, q, k, v)
        causal = mask != "full"
        theirs = kernels[torch_name(dtype, head_dim, causal), None]
        heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        their_out = torch.empty_like(heads_first[0])
        launches = {"torch": torch_launch(theirs, head_dim, *heads_first, their_out)}
        outs, fitting = {}, set()
        for variant in variants(dtype, head_dim):
            for limit in REGISTER_LIMITS:
                kernel = kernels[name_of(dtype, head_dim, mask, variant), limit]
                name = f"{shape_of(variant)} {kernel.resources()}"
                outs[name] = torch.empty_like(q)
                if kernel.fits_apple():
                    fitting.add(name)
                lse = torch.empty(p.lse_shape, device="cuda")
                launches[name] = our_launch(kernel, variant, p, outs[name], lse)
        times = median_ms(launches)
        if mask == "window":
            wrong = max((o - next(iter(outs.values()))).abs().max().item() for o in outs.values())
        else:
            wrong = max((o.float() - their_out.transpose(1, 2).float()).abs().max().item() for o in outs.values())
        best, fits = min((n for n in times if n != "torch"), key=times.get), min(fitting, key=times.get, default=None)
        pair = (times["torch"] / times[best], times["torch"] / times[fits] if fits else None)
        ratios.setdefault((dtype, str(head_dim), mask), []).append(pair)
        flops = 4 * batch * HEADS * length * length * head_dim / (2 if causal else 1)
        print(
            f"{dtype:6} D{head_dim:<3} {mask:6} B{batch} L{length:<5} torch {flops / times['torch'] / 1e9:5.1f} TF/s "
            f"({theirs.resources()})  x{pair[0]:.2f} {best}  "
            f"<=128, no spills: {f'x{pair[1]:.2f} {fits}' if fits else 'none'}  differ {wrong:.0e}",
            flush=True,
        )
    compare_varlen(kernels)
    judged = [
        pair
        for (dtype, dim, mask), pairs in ratios.items()
        if dtype != "float" and mask != "window" and dim != "256"
        for pair in pairs
    ]
    for title, pairs in [
        ("fp16 and bf16, D 64 and 128, full and causal", judged),
        *((" ".join(key), value) for key, value in ratios.items()),
    ]:
        columns = [[pair[0] for pair in pairs], [pair[1] for pair in pairs if pair[1] is not None]]
        best, fits = (
            f"x{math.exp(sum(map(math.log, c)) / len(c)):.2f} ({len(c)} problems)" if c else "none" for c in columns
        )
        print(f"{title}: best {best}; with at most 128 registers and no spills {fits}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
