"""How much the tiled kernel does: no block that nobody sees, and no more of anything than torch's own kernel for MPS.

`python -m tests.metal.counters` prints the figures.
"""

import pytest
import torch

from flash_attn_mps.tiers.metal import launch, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import observe
from tests.test_metal_host import test_torch_kernels as torch_kernels

from . import counters
from .calls import Spec, draw


@pytest.fixture(scope="module")
def library():
    return counters.library_of_torch()


def compare(library, heads, length, dim, mask):
    """Staged, our kernel does at most what torch's does, counter by counter. Direct, it reads device memory in place of
    threadgroup memory: bytes of both kinds count together.
    """
    p = counters.problem(heads, length, dim, mask)
    expected, theirs = counters.torchs(library, p, mask)
    for staged in (True, False):
        variant = simdgroup.default(2, dim, dim)._replace(staged=staged)
        out, mine = counters.ours(p, variant)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
        together = [name for name in counters.COUNTERS if "bytes" in name]
        for name in counters.COUNTERS:
            if staged or name not in together:
                assert mine[name] <= theirs[name], f"{variant}: {name}"
        assert sum(mine[name] for name in together) <= sum(theirs[name] for name in together)
    if mask == "window":
        assert mine["matrix_products"] < theirs["matrix_products"] / 2


@torch_kernels.needs(torch_kernels.PREFILL)
@pytest.mark.parametrize("mask", counters.MASKS)
@pytest.mark.parametrize("dim", [64, 128])
def test_no_more_than_torch_s_kernel(library, dim, mask):
    compare(library, 1, 256, dim, mask)


@pytest.mark.metal_full
@torch_kernels.needs(torch_kernels.PREFILL)
@pytest.mark.parametrize("mask", counters.MASKS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [256, 512])
def test_no_more_than_torch_s_kernel_at_length(library, length, dim, mask):
    compare(library, 4, length, dim, mask)


def products_needed(spec, variant):
    """8x8x8 products: a simdgroup's rows against the blocks from the first key that one of them sees to the last."""
    products = 0
    for seqlen_q, seqlen_k in spec.lengths:
        distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if spec.window[0] >= 0:
            seen &= distance <= spec.window[0]
        if spec.window[1] >= 0:
            seen &= -distance <= spec.window[1]
        for tile in seen.split(variant.rows):
            keys = tile.any(0).nonzero().flatten().tolist()
            blocks = -(-(keys[-1] + 1 - keys[0]) // variant.keys) if keys else 0
            products += blocks * variant.keys // 8 * variant.rows // 8 * sum(-(-d // 8) for d in spec.dims)
    return products * spec.heads[0]


WINDOWS = [(-1, -1), (-1, 0), (20, 0), (-1, 9), (5, 5), (0, 0)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("storage", "lengths"),
    [
        ("dense", [(100, 100)]),
        ("dense", [(33, 100)]),
        ("dense", [(100, 33)]),
        ("varlen", [(n * n % 97, n * 7 % 61) for n in range(24)]),
        ("varlen-used", [(40, 17), (0, 9), (65, 64)]),
        ("packed-cache", [(3, 100), (40, 1)]),
        ("paged", [(33, 70), (1, 100)]),
    ],
    ids=lambda x: x if isinstance(x, str) else len(x),
)
def test_no_block_is_visited_that_nobody_sees(storage, lengths, window):
    """And so a batch of any lengths costs what its sequences cost alone."""
    spec = Spec(lengths, (16, 8), torch.float16, storage, window=window)
    for variant in (Variant(8, 2, 8, False), Variant(16, 2, 16, False)):
        with observe(instrumented=False) as launches:
            launch.run(draw(spec).problem, simdgroup.FORWARD, variant)
        assert launches[0].counters["matrix_products"] == products_needed(spec, variant)


def test_blocks_shared_by_simdgroups_are_skipped_by_those_that_do_not_see_them():
    """Staged, blocks begin where the group's first query begins to see: at most one more for each simdgroup's rows."""
    spec = Spec([(128, 128)], (16, 8), torch.float16, window=(20, 0))
    variant = Variant(8, 4, 8, True)
    with observe(instrumented=False) as launches:
        launch.run(draw(spec).problem, simdgroup.FORWARD, variant)
    done = launches[0].counters["matrix_products"]
    one_block_more = 128 // 8 * spec.heads[0] * variant.keys // 8 * sum(d // 8 for d in spec.dims)
    assert products_needed(spec, variant) <= done <= products_needed(spec, variant) + one_block_more


def test_a_sequence_without_queries_or_keys_costs_nothing():
    spec = Spec([(0, 100), (0, 0), (40, 0)], (16, 8), torch.float16, "varlen")
    with observe() as launches:
        launch.run(draw(spec).problem, simdgroup.FORWARD, Variant(8, 2, 8, False))
    assert launches[0].counters["matrix_products"] == 0
    assert launches[0].counters["transcendentals"] <= 40 * spec.heads[0] * 32  # log2 for the log-sum-exp
