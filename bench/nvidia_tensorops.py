"""The kernel on tensor operations against MLX's `steel_attention_nax`, both run as PTX on an NVIDIA GPU.

    METAL_HOST_SOURCES=FOLDER python bench/nvidia_tensorops.py prepare DIRECTORY     anywhere, with the test extra
    python bench/nvidia_tensorops.py run DIRECTORY     on a machine with a GPU, torch and ptxas; needs no compiler

FOLDER has a checkout `mlx`; without it our variants are timed alone. `run` prints, for each problem, the speed of MLX's
kernel, of our default variant and of our best one, and the largest difference of any from PyTorch's own attention on
that GPU. Both kernels get the layout apple10, and the same products on tensor cores, whose right operands are exchanged
between lanes: times rank them against each other at best, and say nothing about a Mac (docs/tensorops.md).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvidia_forward as forward
import nvidia_tensor_ops as others
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from flash_attn_mps import describe, problem
from flash_attn_mps.tiers.metal import launch, tensorops
from metal_host import nvidia

HEADS, HEADS_K = 16, 8
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PROBLEMS = list(itertools.product(DTYPES, (64, 96, 128), (False, True)))  # dtype, head dim, causal
LENGTHS = (2048, 8192)


def variants(head_dim: int) -> list[tensorops.Variant]:
    """The default first."""
    default = tensorops.default(2, head_dim, head_dim)
    fitting = [v for v in tensorops.FORWARD.fitting(2, head_dim, head_dim) if v.simdgroups in (2, 4)]
    layout = tensorops.LAYOUTS["apple10"]
    return [v._replace(layout=layout) for v in dict.fromkeys([default, *fitting])]


def described(dtype: str, head_dim: int, causal: bool, length: int, device: str) -> problem.AttentionProblem:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn((1, length, heads, head_dim), device=device, dtype=DTYPES[dtype])
        for heads in (HEADS, HEADS_K, HEADS_K)
    )
    return describe.dense(q, k, v, describe.CallOptions(causal=causal))


def arguments(p: problem.AttentionProblem, variant: tensorops.Variant, out: torch.Tensor):
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": out, "lse": None}
    return launch.arguments(tensorops.FORWARD, p, variant, tensors)


def name_of(dtype: str, head_dim: int, causal: bool, what: object) -> str:
    """`what`: a variant of ours, or "mlx"."""
    return f"{what}_{dtype}_{head_dim}_{int(causal)}"


def prepare(directory: Path) -> None:
    from metal_host import compile_shader

    directory.mkdir(parents=True, exist_ok=True)
    entries = {}

    def write(library, name: str, kernel: str, threads: int) -> None:
        module = library.module(kernel)
        entries[name] = module.entries[kernel]
        (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, threads))

    path = Path(os.environ.get("METAL_HOST_SOURCES", "/nonexistent")) / others.NAX
    for dtype, head_dim, causal in PROBLEMS:
        p = described(dtype, head_dim, causal, 64, "cpu")
        for variant in variants(head_dim):
            specialization, _ = arguments(p, variant, torch.empty_like(p.q))
            library = compile_shader(specialization.source(), version="4.0", kernels=[])
            name = name_of(dtype, head_dim, causal, variant)
            write(library, name, tensorops.FORWARD.entry, 32 * variant.simdgroups)
        if path.is_file():
            constants = {200: True, 201: True, 300: False, 301: causal, 302: False}
            include = path.parents[:8]
            library = compile_shader(path.read_text(), version="4.0", constants=constants, include=include, kernels=[])
            kernel = f"steel_attention_{dtype}_bq64_bk32_bd{head_dim}_wm4_wn1_mask{dtype}"
            write(library, name_of(dtype, head_dim, causal, "mlx"), kernel, 128)
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


def our_launch(kernel: forward.Kernel, variant: tensorops.Variant, p: problem.AttentionProblem, out: torch.Tensor):
    _, values = arguments(p, variant, out)
    buffers = [torch.tensor(x, dtype=torch.int64, device="cuda") if isinstance(x, list) else x for x in values]
    threads, (group, _, _) = tensorops.FORWARD.grid(p, variant)
    return kernel.launch(buffers, threads, group)


def run(directory: Path) -> None:
    nvidia._driver()
    entries = json.loads((directory / "entries.json").read_text())
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: forward.Kernel(directory, name, entries[name], None), entries)
        kernels = {kernel.name: kernel for kernel in made}
    print(torch.cuda.get_device_name(), flush=True)
    ratios = []
    for (dtype, head_dim, causal), length in itertools.product(PROBLEMS, LENGTHS):
        p = described(dtype, head_dim, causal, length, "cuda")
        heads_first = [x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        launches, outs = {}, {}
        for variant in variants(head_dim):
            outs[str(variant)] = torch.empty_like(p.q)
            kernel = kernels[name_of(dtype, head_dim, causal, variant)]
            launches[str(variant)] = our_launch(kernel, variant, p, outs[str(variant)])
        if theirs := kernels.get(name_of(dtype, head_dim, causal, "mlx")):
            out = torch.empty_like(heads_first[0])
            launches["mlx"] = others.attention(theirs, "mlx", *heads_first, out)
            outs["mlx"] = out.transpose(1, 2)
        times = forward.median_ms(launches)
        differ = max((out.float() - expected.transpose(1, 2).float()).abs().max().item() for out in outs.values())
        flops = 4 * HEADS * length * length * head_dim / (2 if causal else 1)
        default, *_ = ours = [str(variant) for variant in variants(head_dim)]
        shown = dict.fromkeys([*(set(times) - set(ours)), default, min(ours, key=times.__getitem__)])
        used = {name: kernels[name_of(dtype, head_dim, causal, name)].resources() for name in shown}
        speeds = "  ".join(f"{name} {flops / times[name] / 1e9:.1f} TF/s ({used[name]})" for name in shown)
        if theirs:
            ratios.append(times["mlx"] / times[default])
        what = f"{dtype:8} D{head_dim:<3} {'causal' if causal else 'full':6} L{length:<5}"
        print(f"{what} {speeds}  differ {differ:.0e}", flush=True)
    if ratios:
        print(f"default by MLX's: x{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} of {len(ratios)} problems")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
