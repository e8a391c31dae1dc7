"""Dropout in the kernels: the defined mask whatever the variant and the layout, also for the pass that comes after."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import tiers
from flash_attn_mps.describe import CallOptions, dense, varlen
from flash_attn_mps.frontends import fa2
from flash_attn_mps.problem import with_mask
from flash_attn_mps.tiers.metal import launch, scalar, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import observe
from tests.attention import oracle, philox
from tests.attention.rule import assert_within_rule
from tests.attention.test_varlen import cumulative
from tests.compiled import compiled

from . import counters
from .calls import SEED

# Blocks with less, as much and more than a byte of the mask for every lane, and with several words of it.
VARIANTS = [
    Variant(8, 2, 8, True),
    Variant(8, 1, 16, False),
    Variant(16, 2, 32, True),
    Variant(32, 1, 64, False),
    None,  # the scalar kernel
]
LENGTHS_Q, LENGTHS_K, HEADS = [40, 9, 33], [72, 72, 20], 3


def kept_by(p, variant):
    """(batch, heads, seqlen_q, seqlen_k): what a kernel keeps. Values are unit vectors, so the output is a row of p."""
    kernel = scalar.FORWARD if variant is None else simdgroup.FORWARD
    with observe():
        out = launch.run(p, kernel, variant or scalar.VARIANT).out
    return out.transpose(-2, -3) > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("how", ["dense", "window", "mask", "varlen"])
def test_every_kernel_keeps_what_the_definition_keeps(variant, how):
    longest_q, longest_k = max(LENGTHS_Q), max(LENGTHS_K)
    window = (30, 7) if how == "window" else (-1, -1)
    options = CallOptions(1.0, window_size=window, dropout_p=0.4, seed=SEED, want_probs=False)
    q = torch.zeros(3, longest_q, HEADS, 8, dtype=torch.float16)
    k = torch.zeros(3, longest_k, HEADS, 8, dtype=torch.float16)
    v = torch.eye(longest_k, dtype=torch.float16)[:, None].expand(3, longest_k, HEADS, longest_k).contiguous()
    expected = philox.keep(SEED, 0.4, 3, HEADS, longest_q, longest_k)
    if how == "varlen":
        packed = [
            torch.cat([x[b, :n] for b, n in enumerate(lengths)])
            for x, lengths in ((q, LENGTHS_Q), (k, LENGTHS_K), (v, LENGTHS_K))
        ]
        cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
        kept = kept_by(varlen(*packed, *cu, longest_q, longest_k, options), variant)
        for b, (rows, keys) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
            first = sum(LENGTHS_Q[:b])
            assert torch.equal(kept[:, first : first + rows, :keys], expected[b, :, :rows, :keys])
        return
    p = dense(q, k, v, options)
    if how == "mask":
        shown = torch.rand(3, HEADS, longest_q, longest_k) > 0.2
        p, expected = with_mask(p, shown), expected & shown
    if how == "window":
        distance = torch.arange(longest_k) - torch.arange(longest_q)[:, None] - (longest_k - longest_q)
        expected &= (distance >= -30) & (distance <= 7)
    assert torch.equal(kept_by(p, variant), expected)


def attend(q, k, v):
    return fa2.flash_attn_func(q, k, v, dropout_p=0.3, causal=True)


def in_a_graph(q, k, v):
    return compiled(attend)[0](q, k, v)


def checkpointed(q, k, v):
    return checkpoint(attend, q, k, v, use_reentrant=False)


def checkpointed_reentrantly(q, k, v):
    return checkpoint(attend, q, k, v, use_reentrant=True)


@pytest.mark.parametrize("route", [attend, in_a_graph, checkpointed, checkpointed_reentrantly])
def test_training_drops_the_same_scores_in_both_passes(route):
    """Two calls, each with its mask, by which the fp64 oracle computes: S_dmask of the tier `torch` shows them."""
    tensors = [torch.randn(2, n, heads, 32, dtype=torch.bfloat16) for n, heads in ((45, 4), (50, 2), (50, 2))]
    torch.manual_seed(7)
    masks = [
        ~torch.signbit(fa2.flash_attn_func(*tensors, dropout_p=0.3, causal=True, return_attn_probs=True)[2])
        for _ in range(2)
    ]

    def outcome(function, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        out.float().square().sum().backward()
        return out.detach(), *(x.grad for x in leaves)

    def ours(q, k, v):
        torch.manual_seed(7)
        return route(q, k, v) + route(q, k, v)

    def reference(q, k, v):
        return sum(oracle.dense(q, k, v, keep=keep, dropout_p=0.3, causal=True).out for keep in masks)

    with observe(instrumented=False) as launches:
        got = outcome(ours, torch.bfloat16)
    assert len(launches) >= 2
    exact, plain = outcome(reference, torch.float64), outcome(reference, torch.bfloat16)
    for name, mine, theirs, true in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_within_rule(name, mine, theirs, true)


@pytest.mark.parametrize("dim", [64, 128])
def test_dropout_adds_one_shuffle_for_a_fragment_of_scores(dim):
    """And three for a block and one for each of its row fragments: so no lane's number waits in registers.

    Bytes, products and exponentials are those of a call without it.
    """
    variant = simdgroup.default(2, dim, dim)
    options = {"causal": True, "want_probs": False}
    q, k, v = (torch.randn(1, 128, 2, dim, dtype=torch.float16) for _ in range(3))
    without, dropping = (
        counters.ours(dense(q, k, v, CallOptions(dropout_p=p, **options)), variant)[1] for p in (0.0, 0.1)
    )
    assert {name for name in counters.COUNTERS if without[name] != dropping[name]} == {"shuffles"}
    fragments = without["matrix_products"] // (2 * dim // 8)
    blocks = fragments // (variant.rows // 8 * variant.keys // 8)
    more = dropping["shuffles"] - without["shuffles"]
    assert fragments < more <= fragments + blocks * (3 + variant.rows // 8)


def test_dropout_adds_two_shuffles_for_a_fragment_of_scores_backward():
    """In each kernel; bytes, products and exponentials are those of a call without it."""
    q, k, v, dout = (torch.randn(1, 128, 2, 64, dtype=torch.float16) for _ in range(4))
    counted = []
    for dropout_p in (0.0, 0.1):
        options = CallOptions(causal=True, dropout_p=dropout_p, seed=SEED, want_lse=True, want_probs=False)
        p = dense(q, k, v, options)
        result = tiers.run(p)
        with observe() as launches:
            tiers.gradients(p, result.out, result.lse, dout, None, frozenset("qkv"))
        counted.append({launch.kernel: launch.counters for launch in launches})
    for kernel, products in (("attention_backward_queries", 3), ("attention_backward_keys", 4)):
        without, dropping = (of_kernels[kernel] for of_kernels in counted)
        assert {name for name in counters.COUNTERS if without[name] != dropping[name]} == {"shuffles"}
        fragments = without["matrix_products"] // (products * 64 // 8)
        assert dropping["shuffles"] == without["shuffles"] + 2 * fragments
