"""What our kernel and the one that torch ships for MPS do for the same call: products, exponentials, bytes, barriers.

    python -m tests.metal.counters [--heads 4] [--lengths 256 512] [--dims 64 128]

Counted by the runner's instrumented build, so no noise and no machine is in the figures. torch's kernel has no window:
it gets one as a boolean mask, as scaled_dot_product_attention would.
"""

import argparse

import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import compiler, launch, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import compile_shader, observe
from tests.test_metal_host import test_torch_kernels as torch_kernels

MASKS = {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "window_size": (64, 0)}}
COUNTERS = (
    "matrix_products",
    "transcendentals",
    "device_bytes_read",
    "device_bytes_written",
    "threadgroup_bytes_read",
    "threadgroup_bytes_written",
    "threadgroup_barriers",
    "simdgroup_barriers",
    "shuffles",
)


def problem(heads: int, length: int, dim: int, mask: str) -> AttentionProblem:
    g = torch.Generator().manual_seed(length + dim)
    q, k, v = (torch.randn(1, length, heads, dim, generator=g).half() for _ in range(3))
    return dense(q, k, v, CallOptions(**MASKS[mask]))


def ours(p: AttentionProblem, variant: Variant) -> tuple[torch.Tensor, dict[str, int]]:
    """(out, counters)."""
    with observe() as launches:
        out = launch.run(p, simdgroup.FORWARD, variant).out
    return out, launches[0].counters


def library_of_torch():
    return compile_shader(torch_kernels.HEADER + f"#include <{torch_kernels.PREFILL}>\n")


def torchs(library, p: AttentionProblem, mask: str) -> tuple[torch.Tensor, dict[str, int]]:
    """(out, counters)."""
    length, heads, dim = p.q.shape[1:]
    case = torch_kernels.Case(
        torch.float16, dim, length, length, mask == "causal", "bool" if mask == "window" else "none", (heads, heads)
    )
    its = torch_kernels.Problem(case, "cpu")
    its.q, its.k, its.v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    its.out = torch.empty_like(its.q)
    if mask == "window":
        distance = torch.arange(length)[:, None] - torch.arange(length)
        its.mask = ((distance >= 0) & (distance <= 64)).expand(1, heads, length, length)
    with observe() as launches:
        torch_kernels.run_prefill(library, its)
    return its.out.transpose(1, 2), launches[0].counters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    compiler.compile_shader, compiler.device_types = compile_shader, frozenset({"cpu"})
    library = library_of_torch()
    print(" " * 34 + "".join(f"{name.replace('_', ' '):>26}" for name in COUNTERS))
    for length in chosen.lengths:
        for dim in chosen.dims:
            default = simdgroup.default(2, dim, dim)
            for mask in MASKS:
                p = problem(chosen.heads, length, dim, mask)
                rows = {"torch": torchs(library, p, mask)[1]}
                for staged in (False, True):
                    variant = default._replace(staged=staged)
                    rows["staged" if staged else "direct"] = ours(p, variant)[1]
                for name, counters in rows.items():
                    print(
                        f"L{length} D{dim} {mask:7} {name:12}".ljust(34)
                        + "".join(f"{counters[c]:>26,}" for c in COUNTERS),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
