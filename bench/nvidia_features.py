"""What a soft cap, ALiBi, sinks and dropout cost in the tiled forward kernel, run as PTX on an NVIDIA GPU.

    python bench/nvidia_features.py prepare DIRECTORY     anywhere, with the test extra and torch 2.13: compiles to PTX
    python bench/nvidia_features.py run DIRECTORY         on a machine with a GPU, torch and ptxas; needs no compiler

`run` prints the time with each over the time without any, and what the kernel occupies: registers (r), spilled bytes
(sp), bytes of threadgroup memory (tg).
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import nvidia_forward as forward
import torch
from nvidia_masks import VARIANTS, our_launch

from flash_attn_mps import describe, problem
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import nvidia

LENGTHS = (2048, 8192)
FEATURES = {
    "none": (),
    "softcap": ("softcap",),
    "ALiBi": ("alibi",),
    "both": ("softcap", "alibi"),
    "sinks": ("sinks",),
    "dropout": ("dropout",),
}
KERNELS = list(itertools.product(VARIANTS, FEATURES, (False, True)))  # head_dim, features, causal


def described(head_dim: int, length: int, feature: str, causal: bool, device: str) -> problem.AttentionProblem:
    q, k, v = forward.tensors("half", head_dim, 1, length, device)
    wanted, per_head = FEATURES[feature], torch.rand(forward.HEADS, device=device)
    options = describe.CallOptions(
        causal=causal,
        softcap=30.0 if "softcap" in wanted else 0.0,
        alibi_slopes=per_head if "alibi" in wanted else None,
        dropout_p=0.1 if "dropout" in wanted else 0.0,
        want_lse=True,
        want_probs=False,
    )
    p = describe.dense(q, k, v, options)
    return problem.with_sinks(p, per_head) if "sinks" in wanted else p


def name_of(head_dim: int, feature: str, causal: bool, variant: Variant) -> str:
    return f"{feature}_{head_dim}_{'causal' if causal else 'full'}_{forward.shape_of(variant)}"


def prepare(directory: Path) -> None:
    from metal_host import compile_shader

    os.environ["METAL_HOST_FAST_MATRICES"] = "1"
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for head_dim, feature, causal in KERNELS:
        p = described(head_dim, 256, feature, causal, "cpu")
        for variant in VARIANTS[head_dim]:
            name = name_of(head_dim, feature, causal, variant)
            module = compile_shader(forward.specialization(p, variant).source()).module("attention_forward")
            entries[name] = module.entries["attention_forward"]
            (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, 32 * variant.simdgroups))
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


def run(directory: Path) -> None:
    nvidia._driver()
    entries = json.loads((directory / "entries.json").read_text())
    kernels = {name: forward.Kernel(directory, name, entry, None) for name, entry in entries.items()}
    print(torch.cuda.get_device_name(), flush=True)
    for head_dim, length, causal in itertools.product(VARIANTS, LENGTHS, (False, True)):
        for variant in VARIANTS[head_dim]:
            launches, of = {}, {}
            for feature in FEATURES:
                of[feature] = kernels[name_of(head_dim, feature, causal, variant)]
                p = described(head_dim, length, feature, causal, "cuda")
                launches[feature] = our_launch(of[feature], variant, p, torch.empty_like(p.q))
            times = forward.median_ms(launches, rounds=9)
            cells = (f"{name} {times[name] / times['none']:.2f} ({of[name].resources()})" for name in FEATURES)
            mask = "causal" if causal else "full"
            print(f"D{head_dim:<3} L{length:<4} {mask:6} {forward.shape_of(variant):9}", "  ".join(cells), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
