"""How much the backward kernels do, counted: 7 products to the forward pass's 2, and nothing for what nobody sees."""

import pytest
import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.tiers.metal import backward, backward_kernels, launch, simdgroup
from flash_attn_mps.tiers.metal.backward_kernels import Variant
from metal_host import observe
from tests.metal.calls import Spec, draw

from .gradients import Backward


def counted(length, dim, causal, heads=1, instrumented=True):
    """Counters of the forward pass, and of each launch of the backward pass, by the default variants."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, length, heads, dim).half() for _ in range(4))
    p = dense(q, k, v, CallOptions(causal=causal, want_lse=True))
    with observe(instrumented=instrumented) as launches:
        result = launch.run(p, simdgroup.FORWARD, simdgroup.default(2, dim, dim))
        backward.run(p, result.out, result.lse, dout, None, frozenset("qkv"))
    return launches[0].counters, [launch.counters for launch in launches[1:]]


def total(launches, name):
    return sum(counters[name] for counters in launches)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_products(dim, causal, length=128):
    forward, gradients = counted(length, dim, causal, instrumented=False)
    assert total(gradients, "matrix_products") <= 1.03 * 7 / 2 * forward["matrix_products"]
    # Of held rows by eight passing ones, where somebody sees any: 3 products for dq and 4 for dk and dv.
    window = (-1, 0) if causal else (-1, -1)
    held = [kernel.default(2, dim, dim).held for kernel in (backward_kernels.QUERIES, backward_kernels.KEYS)]
    queries, keys = blocks_seen(Spec([(length, length)], window=window, heads=(1, 1)), *held)
    assert total(gradients, "matrix_products") == (3 * queries + 4 * keys) * dim // 8


@pytest.mark.metal_full
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_products_and_exponentials_of_a_long_call(dim, causal):
    forward, gradients = counted(1024, dim, causal)
    assert total(gradients, "matrix_products") <= 1.03 * 7 / 2 * forward["matrix_products"]
    assert total(gradients, "transcendentals") <= 2 * forward["transcendentals"]


def test_an_ordinary_query_is_not_walked_again():
    """Its log-sum-exp says enough: the preparation multiplies nothing."""
    _, (rows, *_) = counted(64, 64, True)
    assert rows["matrix_products"] == 0


def test_a_gradient_that_nobody_needs_costs_nothing():
    call = Backward(draw(Spec([(64, 64)], (64, 64), torch.float16, heads=(2, 1), sinks=True)))
    products = {}
    for names in ("q", "k", "v", "kv", "qkv"):
        with observe(instrumented=False) as launches:
            got = call.run(names=names)
        assert set(got) == set(names)
        products[names] = total([launch.counters for launch in launches], "matrix_products") / (8 * 8 * 8 * 2)
    assert products == {"q": 3, "k": 3, "v": 2, "kv": 4, "qkv": 7}
    with observe(instrumented=False) as launches:
        assert set(call.run(names=["sinks"])) == {"sinks"}
    assert [launch.kernel for launch in launches] == ["attention_backward_rows"]


def blocks_seen(spec, held_queries, held_keys):
    """(queries, keys): blocks of 8 passing rows from the first to the last that some held row goes with."""
    totals = []
    for held, dim in ((held_queries, 0), (held_keys, 1)):
        count = 0
        for seqlen_q, seqlen_k in spec.lengths:
            distance = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)
            seen = torch.ones_like(distance, dtype=torch.bool)
            if spec.window[0] >= 0:
                seen &= distance <= spec.window[0]
            if spec.window[1] >= 0:
                seen &= -distance <= spec.window[1]
            for tile in seen.split(held, dim):
                passing = tile.any(dim).nonzero().flatten().tolist()
                count += held // 8 * -(-(passing[-1] + 1 - passing[0]) // 8) if passing else 0
        totals.append(count * spec.heads[0])
    return totals


@pytest.mark.parametrize(
    ("storage", "lengths", "window"),
    [
        ("dense", [(100, 100)], (20, 0)),
        ("dense", [(33, 100)], (-1, 0)),
        ("dense", [(100, 33)], (-1, 0)),
        ("dense", [(100, 100)], (-1, 9)),
        ("dense", [(100, 100)], (0, 0)),
        ("varlen", [(n * n % 97, n * 7 % 61) for n in range(12)], (-1, 0)),
        ("varlen-used", [(40, 17), (0, 9), (65, 64)], (5, 5)),
    ],
    ids=str,
)
def test_no_block_is_visited_that_nobody_sees(storage, lengths, window):
    """And so a batch of any lengths costs what its sequences cost alone."""
    spec = Spec(lengths, (16, 8), torch.float16, storage, window=window)
    call = Backward(draw(spec))
    for variant in (Variant(8, 2, 8, False, True, False), Variant(16, 2, 32, False, True, False)):
        with observe(instrumented=False) as launches:
            call.run(variant, variant)
        queries, keys = (launch.counters["matrix_products"] for launch in launches[1:])
        of_queries, of_keys = blocks_seen(spec, variant.held, variant.held)
        assert (queries, keys) == (of_queries * (2 * 2 + 1), of_keys * (2 * 2 + 2 * 1))
