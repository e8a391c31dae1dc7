"""What masks cost in the tiled forward kernel, run as PTX on an NVIDIA GPU.

    python bench/nvidia_masks.py prepare DIRECTORY     anywhere, with the test extra and torch 2.13: compiles to PTX
    python bench/nvidia_masks.py run DIRECTORY         on a machine with a GPU, torch and ptxas; needs no compiler

For each mask `run` prints the time of the same attention without one (causal or a window given as such, or nothing
hidden), with the mask, and of PyTorch's kernel (`ATen/native/mps/kernels/PrefillAttention.h`) with the mask. Half of
the keys are padding in "padding": a ratio of 0.5 would be perfect there.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nvidia_forward as forward
import torch

from flash_attn_mps import describe, problem
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import nvidia

DIMS, LENGTHS = (64, 128), (2048, 8192)
WINDOW = 1024
PLAIN = {"full": (-1, -1), "causal": (-1, 0), "window": (WINDOW - 1, 0)}


class Case(NamedTuple):
    plain: str  # the same attention without a mask
    dtype: torch.dtype  # bool, or what is added
    shape: str = "qk"  # of the mask: the dimensions of "bhqk" that are not broadcast


CASES = {
    "visible, bool": Case("full", torch.bool),
    "visible, half": Case("full", torch.float16),
    "causal, bool": Case("causal", torch.bool),
    "causal, half": Case("causal", torch.float16),
    "causal, float": Case("causal", torch.float32),
    "window, bool": Case("window", torch.bool),
    "window, half": Case("window", torch.float16),
    "padding, bool": Case("full", torch.bool, "bk"),
    "padding, half": Case("full", torch.float16, "bk"),
    "random, bool": Case("full", torch.bool, "hqk"),
    "bias, half": Case("full", torch.float16, "hqk"),
}
VARIANTS = {
    64: [Variant(16, 4, 32, False), Variant(16, 4, 32, True), Variant(8, 4, 32, False)],
    128: [Variant(16, 4, 32, False), Variant(8, 4, 32, True), Variant(8, 4, 32, False)],
}


def mask_of(name: str, length: int, device: str) -> tuple[int, torch.Tensor]:
    """(batch, mask)."""
    kind, case = name.partition(",")[0], CASES[name]
    row = torch.arange(length, device=device)
    if kind == "padding":
        seen = (row < torch.tensor([length // 4, length // 2, length // 2, length * 3 // 4], device=device)[:, None])[
            :, None, None
        ]
    elif kind in ("random", "bias"):
        seen = torch.rand(1, forward.HEADS, length, length, device=device, dtype=torch.float16) < 0.5
    else:
        distance = row[:, None] - row
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= 0 if kind != "visible" else seen
        seen &= distance < WINDOW if kind == "window" else seen
        seen = seen[None, None]
    if case.dtype == torch.bool:
        return len(seen), seen
    if kind == "bias":
        return 1, seen.to(case.dtype)
    return len(seen), torch.zeros(seen.shape, dtype=case.dtype, device=device).masked_fill_(~seen, -torch.inf)


def described(dim: int, batch: int, length: int, plain: str, device: str) -> problem.AttentionProblem:
    q, k, v = forward.tensors("half", dim, batch, length, device)
    return describe.dense(q, k, v, describe.CallOptions(window_size=PLAIN[plain], want_lse=True))


def name_of(what: str, dim: int, variant: Variant) -> str:
    return f"ours_{what.replace(', ', '_')}_{dim}_{forward.shape_of(variant)}"


def torch_name(dim: int, case: Case) -> str:
    queries, keys, simdgroups = forward.TORCH_TILES[dim]
    kind = "bool_" if case.dtype == torch.bool else "float16"
    return f"prefill_attention_float16_bq{queries}_bk{keys}_bd{dim}_wm{simdgroups}_wn1_hm1_dc0_mask{kind}"


def prepare(directory: Path) -> None:
    from metal_host import compile_shader

    os.environ["METAL_HOST_FAST_MATRICES"] = "1"
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}

    def write(name: str, library, entry: str, threads: int) -> None:
        module = library.module(entry)
        entries[name] = module.entries[entry]
        (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, threads))

    header = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
    theirs = compile_shader(header + "#include <ATen/native/mps/kernels/PrefillAttention.h>\n")
    for dim in DIMS:
        calls = {plain: described(dim, 1, 256, plain, "cpu") for plain in PLAIN}
        for name, case in CASES.items():
            batch, mask = mask_of(name, 256, "cpu")
            calls[name] = problem.with_mask(described(dim, batch, 256, "full", "cpu"), mask)
            if case.dtype != torch.float32:
                entry = torch_name(dim, case)
                write(entry, theirs, entry, 32 * forward.TORCH_TILES[dim][2])
        for name, p in calls.items():
            for variant in VARIANTS[dim]:
                library = compile_shader(forward.specialization(p, variant).source())
                write(name_of(name, dim, variant), library, "attention_forward", 32 * variant.simdgroups)
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


def our_launch(kernel: forward.Kernel, variant: Variant, p: problem.AttentionProblem, out: torch.Tensor):
    lse = torch.empty(p.lse_shape, device="cuda")
    return forward.our_launch(kernel, variant, p, out, lse)


def torch_launch(kernel: forward.Kernel, dim: int, p: problem.AttentionProblem, out: torch.Tensor):
    q, k, v = (t.transpose(1, 2).contiguous() for t in (p.q, p.k, p.v))
    batch, heads, length, _ = q.shape
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    packed = struct.pack("<6i2f12i", batch, heads, dim, length, length, heads // k.shape[1], dim**-0.5, 1.0, *strides)
    values = torch.frombuffer(bytearray(packed), dtype=torch.uint8).cuda()
    mask_strides = torch.tensor(p.mask.stride(), dtype=torch.int32, device="cuda")
    queries, _, simdgroups = forward.TORCH_TILES[dim]
    grid = (-(-length // queries) * 32 * simdgroups, heads, batch)
    return kernel.launch([q, k, v, out, values, mask_strides, p.mask], grid, 32 * simdgroups)


def run(directory: Path) -> None:
    nvidia._driver()
    entries = json.loads((directory / "entries.json").read_text())
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: forward.Kernel(directory, name, entries[name], None), entries)
        kernels = {kernel.name: kernel for kernel in made}
    print(torch.cuda.get_device_name(), flush=True)
    for dim in DIMS:
        for length in LENGTHS:
            for name, case in CASES.items():
                compare(kernels, dim, length, name, case)


def compare(kernels: dict[str, forward.Kernel], dim: int, length: int, name: str, case: Case) -> None:
    batch, mask = mask_of(name, length, "cuda")
    plain = described(dim, batch, length, case.plain, "cuda")
    p = problem.with_mask(described(dim, batch, length, "full", "cuda"), mask)
    launches, outs = {}, {}
    for variant in VARIANTS[dim]:
        for what, call in ((case.plain, plain), (name, p)):
            key = f"{what} {forward.shape_of(variant)}"
            outs[key] = torch.empty_like(p.q)
            launches[key] = our_launch(kernels[name_of(what, dim, variant)], variant, call, outs[key])
    theirs = kernels.get(torch_name(dim, case)) if case.dtype != torch.float32 else None
    if theirs is not None:
        its = torch.empty_like(p.q.transpose(1, 2).contiguous())
        launches["torch"] = torch_launch(theirs, dim, p, its)
        outs["torch"] = its.transpose(1, 2)
    times = forward.median_ms(launches)
    masked = [out for key, out in outs.items() if key.startswith(name)]
    against = outs.get("torch", outs[f"{case.plain} {forward.shape_of(VARIANTS[dim][0])}"])
    wrong = max((out.float() - against.float()).abs().max().item() for out in masked)
    parts = []
    for variant in VARIANTS[dim]:
        shape = forward.shape_of(variant)
        without, with_mask = times[f"{case.plain} {shape}"], times[f"{name} {shape}"]
        registers = [kernels[name_of(what, dim, variant)].registers for what in (case.plain, name)]
        parts.append(f"{shape} {with_mask / without:.2f} ({with_mask:.3f} ms, r{registers[0]}>{registers[1]})")
    best = min(times[key] for key in times if key.startswith(name))
    against_torch = f"  torch {times['torch']:.3f} ms, x{times['torch'] / best:.2f}" if "torch" in times else ""
    what = f"D{dim:<3} L{length:<4} B{batch} {name:14} of {case.plain:6}"
    print(f"{what} {'  '.join(parts)}{against_torch}  differ {wrong:.0e}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
