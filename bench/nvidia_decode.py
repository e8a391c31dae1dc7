"""The decode kernel against those of PyTorch and MLX and the tiled kernel, all run as PTX on an NVIDIA GPU.

    python bench/nvidia_decode.py prepare DIRECTORY [--mlx CHECKOUT]
        anywhere, with the test extra and a torch that has DecodeAttention.h: compiles to PTX
    python bench/nvidia_decode.py run DIRECTORY [--quick | --quantised]
        on a machine with a GPU, torch and ptxas; needs no compiler; two to five minutes
    python bench/nvidia_decode.py check DIRECTORY
        there: small problems against float64, for compute-sanitizer

Full attention, fp16, 32 query heads. For each problem `run` prints median times in microseconds: of PyTorch's kernels
(`ATen/native/mps/kernels/DecodeAttention.h`, in one and two passes; they stop at 8 queries), of MLX's, of the tiled
kernel (the better of staged and direct), and of ours: the default, and the best of other shapes and numbers of splits;
then ratios, and the share of the card's memory bandwidth that reading k and v once comes to. Each launch reads caches
that others have pushed out of the second-level cache. Then quantised caches, beside the fp16 cache of as many keys.
Last come geometric means. Times on an NVIDIA GPU rank kernels; they say nothing about a Mac.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import nvidia_forward as forward
import torch

from flash_attn_mps import quantised
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import decode, gpu, launch, simdgroup
from flash_attn_mps.tiers.metal.decode import Variant
from metal_host import nvidia

HEADS = 32
DTYPE = torch.float16
GROUPS, QUERIES, DIMS = (1, 4, 8), (1, 4, 16, 32), (64, 128)
LENGTHS, BATCHES = (1024, 8192, 32768, 131072), (1, 16)
CACHES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
DESCALE = 1 / 16
CACHE_QUERIES, CACHE_LENGTHS = (1, 4), (8192, 32768, 131072)
LARGEST_CACHE = 9 << 30  # bytes of k and v of one problem
CORES = 132
PEAK = 4.8e12  # bytes a second, of an H200
SECOND_LEVEL = 60 << 20  # bytes
TORCH_QUERIES = 8  # what its decode kernels are used for
LIMITS = (128, 255)  # registers of a thread: what an Apple GPU has, and all
MLX_FILE = "mlx/backend/metal/kernels/scaled_dot_product_attention.metal"
MLX_BLOCKS = (64, 128, 256)

Go = Callable[[], object]


class Shape(NamedTuple):
    """One problem."""

    head_dim: int
    group: int
    batch: int
    queries: int
    keys: int

    @property
    def bytes(self) -> int:
        """Of k and v."""
        return 2 * 2 * self.batch * (HEADS // self.group) * self.keys * self.head_dim

    def __str__(self) -> str:
        return f"D{self.head_dim:<3} group {self.group} B{self.batch:<2} q{self.queries:<2} k{self.keys:<6}"


def shapes(quick: bool) -> Iterator[Shape]:
    for dim, group, batch, queries, keys in itertools.product(DIMS, GROUPS, BATCHES, QUERIES, LENGTHS):
        shape = Shape(dim, group, batch, queries, keys)
        if shape.bytes <= LARGEST_CACHE and not (quick and (keys not in (8192, 32768) or batch > 1)):
            yield shape


def quantised_shapes() -> Iterator[Shape]:
    for dim, group, batch, queries, keys in itertools.product(DIMS, GROUPS, BATCHES, CACHE_QUERIES, CACHE_LENGTHS):
        shape = Shape(dim, group, batch, queries, keys)
        if shape.bytes <= LARGEST_CACHE // 2:
            yield shape


def problem(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int = 0) -> AttentionProblem:
    scale = shape.head_dim**-0.5
    p = AttentionProblem(q, k, v, shape.batch, shape.queries, k.shape[1], scale, num_splits=splits)
    if k.dtype not in quantised.FORMATS:
        return p
    descale = torch.full((shape.batch, HEADS // shape.group), DESCALE, device=q.device)
    return dataclasses.replace(p, k_descale=descale, v_descale=descale)


def tensors(shape: Shape, device: str, keys: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, heads_k = keys or shape.keys, HEADS // shape.group
    sizes = [(shape.queries, HEADS), (n, heads_k), (n, heads_k)]
    return tuple(  # type: ignore[return-value]
        torch.randn(shape.batch, rows, heads, shape.head_dim, device=device, dtype=DTYPE) for rows, heads in sizes
    )


def variants(p: AttentionProblem) -> list[Variant]:
    """The default and shapes near it."""
    default, *_ = decode.variants(p)
    near = [
        default._replace(**{field: value})
        for field in ("units", "keys")
        for value in (getattr(default, field) // 2, getattr(default, field) * 2)
        if value >= (8 if field == "keys" else 1)
    ]
    room = simdgroup.MAX_THREADGROUP_BYTES
    return [
        default,
        *(v for v in near if decode.threadgroup_bytes(v, p.q.shape[-1], p.v.shape[-1]) <= room and v.keys <= 32),
    ]


def launches_of(p: AttentionProblem, variant: Variant, out: torch.Tensor) -> list[tuple[Any, list[Any], Any]]:
    """(specialization, arguments, (threads, threads of a group)) of each launch."""
    made: list[tuple[Any, list[Any], Any]] = []

    def note(kernel, p, variant, tensors, parameters) -> bool:
        specialization, values = launch.arguments(kernel, p, variant, {**tensors, "out": out}, parameters)
        made.append((specialization, values, kernel.grid(p, variant)))
        return True

    real, launch.enqueue = launch.enqueue, note
    try:
        decode.run(p, variant)
    finally:
        launch.enqueue = real
    return made


def name_of(specialization: Any) -> str:
    return f"{specialization.kernel.entry}_{zlib.crc32(specialization.source().encode()):x}"


def prepare(directory: Path, mlx: Path | None) -> None:
    from metal_host import compile_shader

    directory.mkdir(parents=True, exist_ok=True)
    entries: dict[str, tuple[str, int]] = {}

    def keep(name: str, library: Any, kernel: str, threads: int) -> None:
        if name not in entries:
            module = library.module(kernel)
            entries[name] = (module.entries[kernel], threads)
            (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, threads))

    for dim, group, queries in itertools.product(DIMS, GROUPS, QUERIES):
        shape = Shape(dim, group, 1, queries, 65536)
        q, k, v = tensors(shape, "cpu", 1)
        k, v = k.expand(-1, shape.keys, -1, -1), v.expand(-1, shape.keys, -1, -1)
        for splits in (1, 2):
            p = problem(shape, q, k, v, splits)
            for variant in variants(p)[: None if splits > 1 else 1]:
                for specialization, _, (_, (threads, _, _)) in launches_of(p, variant, torch.empty_like(q)):
                    source = specialization.source()
                    keep(name_of(specialization), compile_shader(source), specialization.kernel.entry, threads)
            if queries in CACHE_QUERIES:
                for codes in CACHES:
                    p = problem(shape, q, *(t[:, :1].to(codes).expand(k.shape) for t in (k, v)), splits)
                    for specialization, _, (_, (threads, _, _)) in launches_of(p, variants(p)[0], torch.empty_like(q)):
                        source = specialization.source()
                        keep(name_of(specialization), compile_shader(source), specialization.kernel.entry, threads)
        for specialization, _, (_, (threads, _, _)) in tiled(problem(shape, q, k, v), torch.empty_like(q)):
            keep(name_of(specialization), compile_shader(specialization.source()), "attention_forward", threads)
    header = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
    library = compile_shader(header + "#include <ATen/native/mps/kernels/DecodeAttention.h>\n")
    for dim in DIMS:
        keep(f"torch_one_{dim}", library, f"sdpa_vector_half_{dim}_{dim}_masknone", 1024)
        keep(f"torch_first_{dim}", library, f"sdpa_vector_2pass_1_half_{dim}_{dim}_masknone", 256)
        keep(f"torch_second_{dim}", library, f"sdpa_vector_2pass_2_half_{dim}", 1024)
    if mlx is not None:
        prepare_mlx(mlx, keep)
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


def prepare_mlx(mlx: Path, keep: Callable[[str, Any, str, int], None]) -> None:
    from metal_host import compile_shader

    text = (mlx / MLX_FILE).read_text()
    for blocks in MLX_BLOCKS:
        constants = {20: False, 21: False, 22: False, 23: False, 24: False, 25: False, 26: blocks}
        names = [
            f"{kernel}_float16_t_{dim}"
            for d in DIMS
            for kernel, dim in (
                ("sdpa_vector", f"{d}_{d}"),
                ("sdpa_vector_2pass_1", f"{d}_{d}"),
                ("sdpa_vector_2pass_1_gqa", f"{d}_{d}"),
                ("sdpa_vector_2pass_2", f"{d}"),
            )
        ]
        library = compile_shader(text, version="3.2", include=[mlx], constants=constants, kernels=names)
        for d in DIMS:
            keep(f"mlx_one_{d}", library, f"sdpa_vector_float16_t_{d}_{d}", 1024)
            for group, queries in itertools.product(GROUPS, (1, 4)):
                threads, kernel = 32 * group * queries, f"sdpa_vector_2pass_1_float16_t_{d}_{d}"
                keep(f"mlx_first_{d}_{blocks}_{threads}", library, kernel, threads)
            keep(f"mlx_gqa_{d}", library, f"sdpa_vector_2pass_1_gqa_float16_t_{d}_{d}", 256)
            keep(f"mlx_second_{d}_{blocks}", library, f"sdpa_vector_2pass_2_float16_t_{d}", 1024)


def tiled(p: AttentionProblem, out: torch.Tensor) -> list[tuple[Any, list[Any], Any]]:
    """As `launches_of`, for the tiled kernel: staged and direct."""
    default, found = simdgroup.default(2, p.q.shape[-1], p.q.shape[-1]), []
    for staged in (True, False):
        variant = default._replace(staged=staged)
        buffers = {"q": p.q, "k": p.k, "v": p.v, "out": out, "lse": None}
        found.append((*launch.arguments(simdgroup.FORWARD, p, variant, buffers), simdgroup.FORWARD.grid(p, variant)))
    return found


class Kernel(forward.Kernel):
    """With groups of three dimensions."""

    def launcher(self, values: list[Any], grid: tuple[int, int, int], group: tuple[int, int, int]) -> Go:
        buffers = [on_gpu(value) for value in values]
        self.launch([t for t in buffers if t is not None], group, group[0])  # loads the module, launches nothing
        arguments = nvidia._Arguments(grid=(ctypes.c_uint32 * 3)(*grid), group=(ctypes.c_uint32 * 3)(*group))
        for index, tensor in enumerate(buffers):
            if tensor is not None:
                arguments.arguments[index] = tensor.data_ptr()
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        blocks = [-(-n // g) for n, g in zip(grid, group, strict=True)]

        def go(kept=(buffers, arguments)) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            nvidia._call("cuLaunchKernel", self.function, *blocks, math.prod(group), 1, 1, 0, stream, pointers, None)

        return go


def limits(threads: int) -> tuple[int, ...]:
    """Those of `LIMITS` with which a group of `threads` has room among a multiprocessor's 65,536 registers."""
    return tuple(limit for limit in LIMITS if threads * limit <= 65536)


def on_gpu(value: Any) -> torch.Tensor | None:
    """A buffer, or the bytes of a number: an int is 32 bits, a list of ints 64 bits each."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    kind = torch.int64 if isinstance(value, list) else torch.int32 if isinstance(value, int) else torch.float32
    return torch.tensor(value, dtype=kind, device="cuda")


class Contender(NamedTuple):
    name: str
    go: Go
    out: torch.Tensor


class Bench:
    def __init__(self, directory: Path) -> None:
        nvidia._driver()
        gpu.cores = lambda: CORES
        self.directory, self.entries = directory, json.loads((directory / "entries.json").read_text())
        self.kernels: dict[tuple[str, int | None], Kernel] = {}

    def assemble(self) -> None:
        """All kernels, side by side."""
        entries, directory = self.entries, self.directory
        jobs = [
            (name, limit)
            for name, (_, threads) in entries.items()
            for limit in (limits(threads) if name.startswith("attention") else (None,))
        ]
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda job: Kernel(directory, job[0], entries[job[0]][0], job[1]), jobs)
            self.kernels = {(kernel.name, kernel.limit): kernel for kernel in made}

    def has(self, name: str) -> bool:
        return name in self.entries

    def kernel(self, name: str, limit: int | None = None) -> Kernel:
        if (name, limit) not in self.kernels:
            self.kernels[name, limit] = Kernel(self.directory, name, self.entries[name][0], limit)
        return self.kernels[name, limit]

    def launched(self, made: list[tuple[Any, list[Any], Any]], limit: int) -> Go:
        steps = [
            self.kernel(name_of(specialization), limit).launcher(values, *grid) for specialization, values, grid in made
        ]
        return lambda: [step() for step in steps]

    def ours(self, shape: Shape, q, k, v, every: bool) -> Iterator[Contender]:
        """The default first, as far as registers go the better of `LIMITS`."""
        default, *_ = decode.variants(problem(shape, q, k, v))
        for variant in variants(problem(shape, q, k, v)) if every else [default]:
            most = -(-shape.keys // (variant.units * variant.keys))
            automatic = decode.splits_of(problem(shape, q, k, v), variant)
            for splits in sorted(
                {automatic * 4, automatic * 2, automatic, -(-automatic // 2)} if every else {automatic}
            ):
                if not 1 <= splits <= min(most, decode.MAX_SPLITS) or (splits == 1 and variant != default):
                    continue
                out = torch.empty_like(q)
                made = launches_of(problem(shape, q, k, v, splits), variant, out)
                mark = "*" if variant == default and splits == automatic else ""
                for limit in limits(32 * variant.simdgroups):
                    yield Contender(f"{mark}{variant}/{splits} r{limit}", self.launched(made, limit), out)

    def tiled(self, shape: Shape, q, k, v) -> Iterator[Contender]:
        out = torch.empty_like(q)
        for made in tiled(problem(shape, q, k, v), out):
            for limit in LIMITS:
                yield Contender(f"tiled {made[0].variant} r{limit}", self.launched([made], limit), out)

    def torchs(self, shape: Shape, q, k, v) -> Iterator[Contender]:
        if shape.queries > TORCH_QUERIES:
            return
        dim, rows = shape.head_dim, shape.batch * HEADS
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
        mask = torch.zeros(4, dtype=torch.uint8, device="cuda")
        scalars = [
            shape.group,
            shape.keys,
            i32(q.stride(1), k.stride(1), v.stride(1), 0),
            i32(q.stride(2), k.stride(2), v.stride(2), 0),
            shape.head_dim**-0.5,
        ]
        rest = [mask, i32(0, 0, 0, 0), i32(q.stride(0), k.stride(0), v.stride(0), HEADS)]
        out = torch.empty(shape.batch, HEADS, shape.queries, dim, device="cuda", dtype=DTYPE)
        one = self.kernel(f"torch_one_{dim}")
        grid = (rows * 1024, shape.queries, 1)
        yield Contender("torch 1", one.launcher([q, k, v, out, *scalars, *rest], grid, (1024, 1, 1)), out)
        partial = torch.empty(*out.shape[:3], 32, dim, dtype=DTYPE, device="cuda")
        sums, maxima = (torch.empty(*out.shape[:3], 32, device="cuda") for _ in range(2))
        out = torch.empty_like(out)
        first = self.kernel(f"torch_first_{dim}").launcher(
            [q, k, v, partial, sums, maxima, *scalars, *rest], (rows * 256, shape.queries, 32), (256, 1, 1)
        )
        second = self.kernel(f"torch_second_{dim}").launcher(
            [partial, sums, maxima, out], (rows * 1024, shape.queries, 1), (1024, 1, 1)
        )
        yield Contender("torch 2", lambda: (first(), second()), out)

    def mlxs(self, shape: Shape, q, k, v) -> Iterator[Contender]:
        """Caches are heads first for these, as MLX has them."""
        dim, heads_k, queries = shape.head_dim, HEADS // shape.group, shape.queries
        if queries > TORCH_QUERIES or not self.has(f"mlx_one_{dim}"):
            return
        q = q.transpose(1, 2).contiguous()
        strides = [[k.stride(1)], [k.stride(2)], [v.stride(1)], [v.stride(2)]]
        out = torch.empty_like(q)
        scale = shape.head_dim**-0.5
        values = [q, k, v, out, shape.group, shape.keys, *strides, scale]
        grid = (shape.batch * HEADS * 1024, queries, 1)
        yield Contender("mlx 1", self.kernel(f"mlx_one_{dim}").launcher(values, grid, (1024, 1, 1)), out)
        for blocks in MLX_BLOCKS:
            firsts = [(f"mlx_first_{dim}_{blocks}_{32 * shape.group * queries}", (32, shape.group, queries))]
            if shape.group == 8 and queries == 1 and shape.batch == 1:  # it reads the keys of the first alone
                firsts.append((f"mlx_gqa_{dim}", (32, 8, 1)))
            for name, group in firsts:
                out = torch.empty_like(q)
                rows = shape.batch * HEADS * queries
                partial = torch.empty(rows, blocks, dim, dtype=DTYPE, device="cuda")
                sums, maxima = (torch.empty(rows, blocks, device="cuda") for _ in range(2))
                grid = (heads_k * group[0], shape.batch * group[1], blocks * group[2])
                values = [q, k, v, partial, sums, maxima, None, shape.keys, *strides, scale]
                first = self.kernel(name).launcher(values, grid, group)
                second = self.kernel(f"mlx_second_{dim}_{blocks}").launcher(
                    [partial, sums, maxima, out, blocks], (shape.batch * HEADS * 1024, queries, 1), (1024, 1, 1)
                )
                kind = "gqa" if "gqa" in name else "2"
                go = lambda first=first, second=second: (first(), second())  # noqa: E731
                yield Contender(f"mlx {kind}/{blocks}", go, out)

    def measure(self, shape: Shape, every: bool) -> dict[str, float]:
        """Microseconds of each contender; raises where results differ."""
        copies = max(1, min(8, -(-4 * SECOND_LEVEL // shape.bytes)))
        sets: list[list[Contender]] = []
        for _ in range(copies):
            q, k, v = tensors(shape, "cuda")
            found = [*self.ours(shape, q, k, v, every), *self.tiled(shape, q, k, v), *self.torchs(shape, q, k, v)]
            heads_first = [t.transpose(1, 2).contiguous() for t in (k, v)]
            found += self.mlxs(shape, q, *heads_first)
            if not sets:
                check(shape, found)
            sets.append(found)
        each = {
            contenders[0].name: [contender.go for contender in contenders] for contenders in zip(*sets, strict=True)
        }
        return medians(each)

    def measure_quantised(self, shape: Shape) -> dict[str, float]:
        """Microseconds with a cache in fp16 and in each of `CACHES`."""
        each: dict[str, list[Go]] = {}
        for copy in range(max(1, min(8, -(-8 * SECOND_LEVEL // shape.bytes)))):
            q, *kv = tensors(shape, "cuda")
            found = [c._replace(name=f"fp16 {c.name}") for c in self.ours(shape, q, *kv, every=False)]
            for dtype in CACHES:
                name, cache = quantised.FORMATS[dtype].name, [(t / DESCALE).to(dtype) for t in kv]
                ours = [c._replace(name=f"{name} {c.name}") for c in self.ours(shape, q, *cache, every=False)]
                if copy == 0:
                    same = [(quantised.decoded(t) * DESCALE).to(DTYPE) for t in cache]
                    check(shape, [*self.ours(shape, q, *same, every=False), *ours])
                found += ours
            for contender in found:
                each.setdefault(contender.name, []).append(contender.go)
        return medians(each)


def check(shape: Shape, contenders: list[Contender]) -> None:
    """Prints who differs from the first one."""
    expected = None
    for contender in contenders:
        contender.out.fill_(math.nan)
        contender.go()
        out = contender.out.float()
        if contender.name.startswith(("torch", "mlx")):  # heads first
            out = out.transpose(1, 2)
        if expected is None:
            expected = out
        difference = (out - expected).abs().max().item()
        if not difference < 4e-3:
            print(f"{shape} {contender.name} differs by {difference}", flush=True)


def medians(each: dict[str, list[Go]], rounds: int = 7) -> dict[str, float]:
    """Microseconds of a launch, which takes the copies by turns; contenders alternate.

    As graphs, whose launches cost the host nothing.
    """
    times: dict[str, list[float]] = {name: [] for name in each}
    graphs = {}
    for name, goes in each.items():
        count = max(1, min(16, int(500 / timed(lambda goes=goes: [go() for go in goes])))) * len(goes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for n in range(count):
                goes[n % len(goes)]()
        graphs[name] = graph, count
    for turn in range(rounds):
        for name in list(each)[:: 1 if turn % 2 else -1]:
            graph, count = graphs[name]
            times[name].append(timed(graph.replay) / count)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def timed(go: Callable[[], object]) -> float:
    """Microseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    go()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def best(times: dict[str, float], *kinds: str) -> tuple[str, float] | None:
    found = [name for name in times if name.startswith(kinds)]
    return min(((name, times[name]) for name in found), key=lambda pair: pair[1], default=None)


def run(directory: Path, quick: bool, quantised_only: bool) -> None:
    bench = Bench(directory)
    bench.assemble()
    print(torch.cuda.get_device_name(), flush=True)
    for (name, limit), kernel in bench.kernels.items():
        if name.startswith("attention_decode") and limit == LIMITS[0]:
            free = bench.kernels.get((name, LIMITS[1]))
            print(f"{name}: {kernel.resources()}" + (f"; without a limit {free.resources()}" if free else ""))
    ratios: dict[str, list[float]] = {}
    for shape in () if quantised_only else shapes(quick):
        times = bench.measure(shape, every=shape.batch == 1 and shape.keys in (1024, 8192, 131072))
        default, fastest = best(times, "*"), best(times, "*", *"0123456789")
        assert default is not None and fastest is not None
        share = shape.bytes / (default[1] * 1e-6) / PEAK
        line = f"{shape} ours {default[1]:8.1f} ({share:4.0%})"
        for kind in ("torch", "mlx", "tiled"):
            other = best(times, kind)
            if other is not None:
                ratio = other[1] / default[1]
                ratios.setdefault(f"{kind}, group {shape.group}, q{shape.queries}", []).append(ratio)
                line += f"  {other[0]} {other[1]:8.1f} x{ratio:5.2f}"
        print(f"{line}  default {default[0]}, best {fastest[0]} {fastest[1]:.1f}", flush=True)
        torch.cuda.empty_cache()
    for shape in () if quick else quantised_shapes():
        times = bench.measure_quantised(shape)
        fp16 = best(times, "fp16")
        assert fp16 is not None
        line = f"{shape} fp16 {fp16[1]:8.1f} ({shape.bytes / (fp16[1] * 1e-6) / PEAK:4.0%})"
        for name in (quantised.FORMATS[dtype].name for dtype in CACHES):
            ours = best(times, name)
            assert ours is not None
            ratios.setdefault(f"{name} to fp16, k{shape.keys}", []).append(ours[1] / fp16[1])
            line += f"  {name} {ours[1]:8.1f} x{ours[1] / fp16[1]:5.2f} ({ours[0].split()[-1]})"
        print(line, flush=True)
        torch.cuda.empty_cache()
    for name, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{name}: x{mean:.2f}, {min(values):.2f} to {max(values):.2f} ({len(values)} problems)")


def inspect(directory: Path) -> None:
    """Lengths that fill no block, in splits and whole; arithmetic of the reference on the CPU."""
    bench, worst = Bench(directory), 0.0
    for dim, group, queries in itertools.product(DIMS, GROUPS, QUERIES):
        shape = Shape(dim, group, 2, queries, 1003)
        for dtype, splits in itertools.product((DTYPE, *(CACHES if queries in CACHE_QUERIES else ())), (1, 5)):
            q, *kv = tensors(shape, "cpu")
            cache = [(t / DESCALE).to(dtype) for t in kv] if dtype in CACHES else kv
            values = [quantised.decoded(t) * DESCALE if dtype in CACHES else t for t in cache]
            exact = torch.nn.functional.scaled_dot_product_attention(
                *(t.double().transpose(1, 2) for t in (q, *values)), enable_gqa=True
            ).transpose(1, 2)
            p = problem(shape, *(t.cuda() for t in (q, *cache)), splits)
            out = torch.full(q.shape, math.nan, dtype=DTYPE).cuda()
            variant, *_ = decode.variants(p)
            bench.launched(launches_of(p, variant, out), LIMITS[0])()
            error = (out.double().cpu() - exact).abs().max().item()
            worst = max(worst, error)
            assert error < 2e-3, (shape, dtype, splits, error)
    print(f"largest error {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "check"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mlx", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--quantised", action="store_true", help="these problems alone")
    chosen = parser.parse_args()
    if chosen.what == "prepare":
        os.environ["METAL_HOST_FAST_MATRICES"] = "1"
        prepare(chosen.directory, chosen.mlx)
    elif chosen.what == "check":
        inspect(chosen.directory)
    else:
        run(chosen.directory, chosen.quick, chosen.quantised)
