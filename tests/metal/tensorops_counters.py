"""What the kernel on tensor operations and MLX's `steel_attention_nax` do for the same call, counted by the runner.

    METAL_HOST_SOURCES=FOLDER python -m tests.metal.tensorops_counters [--lengths 2048 8192] [--dims 64 96 128]

FOLDER has a checkout `mlx`. A group of MLX's has 64 queries, and so has one of ours. What either does grows linearly
with the keys that a group sees: three groups are run, of the first, the second and the last queries, and the rest is
reckoned.
"""

import argparse
import dataclasses
import math

import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import launch, tensorops
from metal_host import observe
from tests.metal_tiers import metal_on
from tests.test_metal_host.public_sources import library, structure
from tests.test_metal_host.test_public_sources import attention_params
from tests.test_metal_host.test_public_tensor_ops import NAX

QUERIES = 64  # of a group
MASKS = ("full", "causal")
COUNTERS = (
    *("matrix_products", "transcendentals", "device_bytes_read", "device_bytes_written", "threadgroup_bytes_read"),
    *("simdgroup_barriers", "threadgroup_barriers", "shuffles"),
)


def problem(keys: int, dim: int, mask: str) -> AttentionProblem:
    """Of the last 64 queries of a sequence of `keys`; they see its end."""
    g = torch.Generator().manual_seed(keys + dim)
    q, k, v = (torch.randn(1, n, 1, dim, generator=g).half() for n in (QUERIES, keys, keys))
    return dense(q, k, v, CallOptions(causal=mask == "causal"))


def ours(p: AttentionProblem, variant: tensorops.Variant | None = None) -> tuple[torch.Tensor, dict[str, int]]:
    """(out, counters), under Apple10's layout."""
    variant = variant or tensorops.default(2, p.q.shape[-1], p.v.shape[-1])
    variant = variant._replace(layout=tensorops.LAYOUTS["apple10"])
    with observe(layout="apple10") as launches:
        result = launch.run(dataclasses.replace(p, want_lse=False), tensorops.FORWARD, variant)
    return result.out, launches[0].counters


def mlxs(p: AttentionProblem, mask: str) -> tuple[torch.Tensor, dict[str, int]]:
    """(out, counters)."""
    dim, keys = p.q.shape[-1], p.k.shape[1]
    constants = {200: True, 201: keys % 32 == 0, 300: False, 301: mask == "causal", 302: False}
    kernels = library(NAX, "mlx", constants, [])
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    out = torch.empty_like(q)
    params = structure(attention_params(q, k, v, out, QUERIES, 32))
    with observe(layout="apple10") as launches:
        kernel = getattr(kernels, f"steel_attention_float16_bq{QUERIES}_bk32_bd{dim}_wm4_wn1_maskfloat16")
        kernel(q, k, v, out, params, None, None, None, threads=(32, 4, 1), group_size=(32, 4, 1))
    return out.transpose(1, 2), launches[0].counters


def reckoned(count, length: int, mask: str) -> dict[str, int]:
    """The counters of a whole sequence of `length` queries and keys; `count`: those of `problem(keys, ...)`."""
    groups = length // QUERIES
    if mask == "full":
        one = count(length)
        return {name: groups * one[name] for name in COUNTERS}
    first, second, last = (count(QUERIES * n) for n in (1, 2, groups))
    total = {}
    for name in COUNTERS:
        step = second[name] - first[name]
        assert last[name] == first[name] + (groups - 1) * step or name == "transcendentals", f"{name} is not linear"
        total[name] = groups * (first[name] + last[name]) // 2
    return total


def compared(length: int, dim: int, mask: str) -> dict[str, tuple[int, int]]:
    """(ours, MLX's) of each counter."""
    checked = problem(3 * QUERIES, dim, mask)
    torch.testing.assert_close(ours(checked)[0], mlxs(checked, mask)[0], rtol=1e-2, atol=2e-3)
    mine = reckoned(lambda keys: ours(problem(keys, dim, mask))[1], length, mask)
    theirs = reckoned(lambda keys: mlxs(problem(keys, dim, mask), mask)[1], length, mask)
    return {name: (mine[name], theirs[name]) for name in COUNTERS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 96, 128])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("ours by MLX's".ljust(24) + "".join(f"{name.replace('_', ' '):>24}" for name in COUNTERS))
    with metal_on("cpu", version="4.0"):
        for dim in chosen.dims:
            for length in chosen.lengths:
                for mask in MASKS:
                    rows = compared(length, dim, mask)
                    shares = (a / b if b else math.inf if a else math.nan for a, b in rows.values())
                    print(f"D{dim} L{length} {mask}".ljust(24) + "".join(f"{x:>24.3f}" for x in shares), flush=True)


if __name__ == "__main__":
    main()
