"""Forward and backward pass of the Metal kernels, run as PTX on an NVIDIA GPU.

    python bench/nvidia_backward.py prepare DIRECTORY     anywhere, with the test extra: compiles to PTX
    python bench/nvidia_backward.py run DIRECTORY         on a machine with a GPU, torch and ptxas; needs no compiler
    python bench/nvidia_backward.py check DIRECTORY       there: gradients against float64, for compute-sanitizer

`run` prints, for each problem, medians of the forward pass and of each kernel of the backward pass in its default
variants and in others, what the kernel occupies (registers, r; spilled bytes, sp; bytes of threadgroup memory, tg), and
both passes over the forward pass; then the memory of both passes at length 16384 over that of their inputs, outputs and
gradients. Times on an NVIDIA GPU with its tensor cores rank no kernels for a Mac.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nvidia_forward as bench
import torch

from flash_attn_mps import describe
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import backward, compiler, launch, simdgroup
from flash_attn_mps.tiers.metal.backward_kernels import KEYS, QUERIES, Variant
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import nvidia

DIMS = (64, 128)
MASKS = {"full": False, "causal": True}
LENGTHS = (2048, 8192)
REGISTERS, THREADGROUP, RELOAD = (True, False), (False, False), (False, True)
# Beside the defaults.
OF_QUERIES = {
    64: [Variant(8, 4, 8, False, *REGISTERS), Variant(8, 4, 32, True, *REGISTERS)],
    128: [Variant(8, 4, 8, False, *THREADGROUP), Variant(8, 4, 16, True, *REGISTERS)],
}
OF_KEYS = {
    64: [
        Variant(8, 4, 32, True, *REGISTERS),
        Variant(16, 4, 8, False, *THREADGROUP),
        Variant(16, 4, 16, True, *THREADGROUP),
        Variant(16, 4, 8, False, *REGISTERS, True),
    ],
    128: [
        Variant(8, 4, 16, True, *RELOAD),
        Variant(8, 4, 8, False, *REGISTERS),
        Variant(8, 4, 8, False, *REGISTERS, True),
        Variant(16, 4, 8, False, *THREADGROUP, True),
    ],
}


def candidates(head_dim: int) -> tuple[list[Variant], list[Variant]]:
    """Of queries and keys, the defaults first."""
    queries = [QUERIES.default(2, head_dim, head_dim), *OF_QUERIES[head_dim]]
    keys = [KEYS.default(2, head_dim, head_dim), *OF_KEYS[head_dim]]
    return list(dict.fromkeys(queries)), list(dict.fromkeys(keys))


class Call:
    """A problem with what its passes need."""

    def __init__(self, head_dim: int, causal: bool, length: int, device: str, dtype: torch.dtype = torch.float16):
        torch.manual_seed(0)
        shapes = [(1, length, heads, head_dim) for heads in (bench.HEADS, bench.HEADS_K, bench.HEADS_K, bench.HEADS)]
        q, k, v, self.dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        self.p: AttentionProblem = describe.dense(q, k, v, describe.CallOptions(causal=causal, want_lse=True))
        self.out, self.lse = q, torch.zeros(self.p.lse_shape, device=device)

    def forward(self, variant: simdgroup.Variant) -> None:
        result = launch.run(self.p, simdgroup.FORWARD, variant)
        self.out, self.lse = result.out, result.lse

    def gradients(self, names: str, queries: Variant, keys: Variant):
        return backward.compute(
            self.p, self.out, self.lse, self.dout, None, frozenset(names), queries, keys, each_head=False
        )


def name_of(specialization: Specialization) -> str:
    digest = hashlib.sha256(specialization.source().encode()).hexdigest()[:12]
    return f"{specialization.kernel.entry.removeprefix('attention_')}_{digest}"


def forward_variant(head_dim: int) -> simdgroup.Variant:
    return simdgroup.Variant(16 if head_dim == 64 else 8, 4, 32, False)


def every_launch(length: int, device: str) -> None:
    for head_dim, causal in itertools.product(DIMS, MASKS.values()):
        call = Call(head_dim, causal, length, device)
        call.forward(forward_variant(head_dim))
        queries, keys = candidates(head_dim)
        for variant in queries:
            call.gradients("q", variant, keys[0])
        for variant in keys:
            call.gradients("kv", queries[0], variant)


def prepare(directory: Path) -> None:
    from metal_host import compile_shader

    directory.mkdir(parents=True, exist_ok=True)
    entries = {}

    @functools.cache
    def compiled(specialization: Specialization) -> Callable[..., None]:
        entry, name = specialization.kernel.entry, name_of(specialization)
        module = compile_shader(specialization.source()).module(entry)
        entries[name] = module.entries[entry]
        threads = 32 * specialization.variant.simdgroups
        (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, threads))
        return lambda *_, **__: None

    compiler.kernel = compiled
    every_launch(64, "cpu")
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


@functools.cache
def on_gpu(parameters: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(parameters, dtype=torch.int64).cuda()


class Assembled:
    """In the place of compiler.kernel: kernels that `prepare` compiled, assembled at first use."""

    def __init__(self, directory: Path):
        nvidia._driver()
        self.directory, self.entries = directory, json.loads((directory / "entries.json").read_text())
        self.kernels: dict[str, bench.Kernel] = {}

    def __call__(self, specialization: Specialization) -> Callable[..., None]:
        name = name_of(specialization)
        if name not in self.kernels:
            self.kernels[name] = bench.Kernel(self.directory, name, self.entries[name], None)
        self.last = kernel = self.kernels[name]

        def go(*values, threads, group_size):
            buffers = [on_gpu(tuple(x)) if isinstance(x, list) else x for x in values]
            kernel.launch(buffers, threads, group_size[0])()

        return go


def medians(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of the GPU, without what the host does between launches: kernels wait for a long one."""
    long = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)

    def behind(call: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(4):
                long @ long
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        return timed

    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            seconds = behind(calls[name])()
            if turn:
                times[name].append(seconds)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def run(directory: Path) -> None:
    compiler.kernel = assembled = Assembled(directory)
    print(torch.cuda.get_device_name(), flush=True)
    for head_dim, mask, length in itertools.product(DIMS, MASKS, LENGTHS):
        measure(assembled, head_dim, mask, length)
    memory()


def measure(assembled: Assembled, head_dim: int, mask: str, length: int) -> None:
    call = Call(head_dim, MASKS[mask], length, "cuda")
    queries, keys = candidates(head_dim)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: call.forward(forward_variant(head_dim)),
        "rows": lambda: call.gradients("", queries[0], keys[0]),
        **{f"queries {v}": functools.partial(call.gradients, "q", v, keys[0]) for v in queries},
        **{f"keys {v}": functools.partial(call.gradients, "kv", queries[0], v) for v in keys},
    }
    occupied = {}
    for name, each in calls.items():
        each()
        occupied[name] = assembled.last.resources()
    times = medians(calls)
    for name in times:
        if " " in name:  # which has the preparation in it
            times[name] -= times["rows"]
    product = 2 * bench.HEADS * length * length * head_dim / (2 if MASKS[mask] else 1)  # operations of a whole one
    print(f"D{head_dim} {mask} L{length}")
    for name, ms in times.items():
        count = {"f": 2, "r": 0, "q": 3, "k": 5 if name.endswith("split") else 4}[name[0]]
        print(f"    {name:44} {ms:8.3f} ms {count * product / ms / 1e9:6.1f} TF/s  {occupied[name]}", flush=True)
    of_queries, of_keys = ([ms for name, ms in times.items() if name.startswith(kind)] for kind in ("queries", "keys"))
    totals = {"defaults": (0, 0)}
    totals["fastest"] = (of_queries.index(min(of_queries)), of_keys.index(min(of_keys)))
    for title, (q, k) in totals.items():
        both = times["forward"] + times["rows"] + of_queries[q] + of_keys[k]
        print(f"    forward and backward over forward, {title}: {both / times['forward']:.2f}", flush=True)


def memory() -> None:
    """Of both passes at length 16384, by torch's allocator."""
    for head_dim in DIMS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call = Call(head_dim, True, 16384, "cuda")
        call.forward(forward_variant(head_dim))
        queries, keys = candidates(head_dim)
        grads = call.gradients("qkv", queries[0], keys[0])
        torch.cuda.synchronize()
        tensors = [call.p.q, call.p.k, call.p.v, call.out, call.dout, *(t for t in grads if t is not None)]
        needed = sum(t.numel() * t.itemsize for t in tensors)
        peak = torch.cuda.max_memory_allocated() - before
        print(
            f"D{head_dim} L16384: peak {peak / 2**20:.0f} MiB, {peak / needed:.3f} times inputs, outputs and gradients"
        )


def check(directory: Path) -> None:
    """Small problems in every variant; arithmetic of the reference on the CPU."""
    compiler.kernel = Assembled(directory)
    for head_dim, (mask, causal) in itertools.product(DIMS, MASKS.items()):
        queries, keys = candidates(head_dim)
        for n in range(max(len(queries), len(keys))):
            call = Call(head_dim, causal, 200, "cuda")
            call.forward(forward_variant(head_dim))
            a, b = queries[n % len(queries)], keys[n % len(keys)]
            got = call.gradients("qkv", a, b)
            leaves = [t.double().cpu().requires_grad_() for t in (call.p.q, call.p.k, call.p.v)]
            q, k, v = (t.transpose(1, 2) for t in leaves)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            exact = torch.autograd.grad(out.transpose(1, 2), leaves, call.dout.double().cpu())
            errors = [(x.double().cpu() - y).abs().max().item() for x, y in zip(got[:3], exact, strict=True)]
            print(
                f"D{head_dim} {mask} {a} {b}: errors of dq, dk, dv {', '.join(f'{e:.1e}' for e in errors)}", flush=True
            )
            assert max(errors) < 2e-2


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run", "check"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run, "check": check}[sys.argv[1]](Path(sys.argv[2]))
