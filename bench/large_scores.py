"""Errors of attention over scores of any size, from 1e0 to 1e30, in every dtype: values, log-sum-exp and gradients.

    python bench/large_scores.py [--each]

For each dtype and size of scores (their standard deviation) the largest error against float64, as a Markdown table:
the worst of what "auto" chooses for CPU tensors, the torch tier and the Metal kernels on metal_host; after the slash,
of attention written out in plain PyTorch in float32. `--each` prints a row for every one of them instead.

An error is relative to what it is made from: the log-sum-exp, or the sum of the magnitudes of the products that are
added up. Where one key takes all, dq and dk are a difference of two equal sums, and zero. Gradients are compared with
FlashAttention's formula, in which the output has the precision of its dtype.
"""

import argparse
import os

import torch

from flash_attn_mps.frontends.fa2 import flash_attn_func
from flash_attn_mps.tiers.metal import compiler, variants
from metal_host import compile_shader

HEADS, HEAD_DIM, QUERIES, KEYS = 2, 64, 128, 192
EXPONENTS = (0, 1, 2, 3, 4, 6, 12, 18, 24, 30)
LARGEST_EXPONENT = {torch.float16: 8, torch.bfloat16: 30, torch.float32: 30}  # that q and k can have
TIERS = {  # MTLFLASHATTN_KERNEL, MTLFLASHATTN_VARIANT
    "auto": ("auto", None),
    "torch": ("torch", None),
    "simdgroup direct": ("simdgroup", "16x4x32-direct"),
    "simdgroup staged": ("simdgroup", "8x4x32-staged"),
    "scalar": ("scalar", None),
}
PLAIN = "plain float32"
NAMES = ("lse", "out", "dq", "dk", "dv")


def drawn(dtype, exponent):
    """q, k, v, dout. Scores are sums of HEAD_DIM products over sqrt(HEAD_DIM)."""
    generator = torch.Generator().manual_seed(exponent)
    std = 10.0 ** (exponent / 2)
    sizes = ((QUERIES, std), (KEYS, std), (KEYS, 1.0), (QUERIES, 1.0))
    return [torch.randn(1, n, HEADS, HEAD_DIM, generator=generator).mul_(size).to(dtype) for n, size in sizes]


def written_out(q, k, v, dout, dtype):
    """lse, out and FlashAttention's gradients, in the precision of the tensors; and the sums of magnitudes."""
    scale = HEAD_DIM**-0.5
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    lse, p = s.logsumexp(-1), s.softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, v)
    delta = (dout * out.to(dtype).to(out.dtype)).sum(-1).transpose(1, 2)[..., None]
    ds, ds_size = p * (dp - delta) * scale, p * (dp.abs() + delta.abs()) * scale

    def gradients(ds, q, k, dout):
        sums = (("bhqk,bkhd->bqhd", ds, k), ("bhqk,bqhd->bkhd", ds, q), ("bhqk,bqhd->bkhd", p, dout))
        return [torch.einsum(*of) for of in sums]

    sizes = (lse.abs(), torch.einsum("bhqk,bkhd->bqhd", p, v.abs()), *gradients(ds_size, q.abs(), k.abs(), dout.abs()))
    return (lse, out, *gradients(ds, q, k, dout)), sizes


def computed(tier, tensors):
    """lse, out, dq, dk, dv of a tier."""
    kernel, variant = TIERS[tier]
    os.environ["MTLFLASHATTN_KERNEL"] = kernel
    os.environ.pop("MTLFLASHATTN_VARIANT", None)
    if variant is not None:
        os.environ["MTLFLASHATTN_VARIANT"] = variant
    compiler.device_types = frozenset({"cpu"} if kernel in ("simdgroup", "scalar") else ())
    variants.forget()
    *leaves, dout = tensors
    leaves = [x.clone().requires_grad_() for x in leaves]
    out, lse, _ = flash_attn_func(*leaves, return_attn_probs=True)
    return (lse.detach(), out.detach(), *torch.autograd.grad(out, leaves, dout))


def errors(dtype, exponent):
    """Of each tier, and of plain PyTorch: name to the errors of NAMES."""
    tensors = drawn(dtype, exponent)
    exact, sizes = written_out(*(x.double() for x in tensors), dtype)
    (plain_lse, *plain), _ = written_out(*(x.float() for x in tensors), dtype)
    results = {tier: computed(tier, tensors) for tier in TIERS}
    results[PLAIN] = (plain_lse, *(x.to(dtype) for x in plain))
    return {
        name: [((x.double() - y).abs().max() / z.max()).item() for x, y, z in zip(result, exact, sizes, strict=True)]
        for name, result in results.items()
    }


def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="a row for each tier")
    each = parser.parse_args().each
    torch.set_num_threads(1)
    compiler.compile_shader = compile_shader
    header = ["dtype", "scores", *(["by"] if each else []), *NAMES]
    row(header)
    row(["---"] * len(header))
    for dtype, largest in LARGEST_EXPONENT.items():
        for exponent in sorted({min(exponent, largest) for exponent in EXPONENTS}):
            found = errors(dtype, exponent)
            about = [str(dtype).removeprefix("torch."), f"1e{exponent}"]
            if each:
                for name, values in found.items():
                    row([*about, name, *(f"{x:.1e}" for x in values)])
                continue
            plain = found.pop(PLAIN)
            worst = [max(values[i] for values in found.values()) for i in range(len(NAMES))]
            row([*about, *(f"{x:.0e} / {y:.0e}" for x, y in zip(worst, plain, strict=True))])


if __name__ == "__main__":
    main()
