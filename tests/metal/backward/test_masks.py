"""Masks in the backward pass: a block that the mask hides whole costs nothing, in either kernel."""

import math

import pytest
import torch

from flash_attn_mps import flash_attention
from flash_attn_mps.tiers.metal import backward_kernels
from flash_attn_mps.tiers.metal.backward_kernels import Variant
from metal_host import observe
from tests.metal.calls import Spec, arranged, draw
from tests.metal.test_masks import PATTERNS, added, pattern

from .gradients import Backward

DIRECT, STAGED = Variant(8, 2, 8, False, True, False), Variant(16, 2, 16, True, False, False)
LENGTHS = (64, 96)


def masked(name, kind, lengths=LENGTHS, **how):
    seen = pattern(name, *lengths)
    mask = seen if kind == "bool" else added(seen, torch.float32)
    spec = Spec([lengths] * 2, (16, 24), torch.float16, heads=(2, 1), mask=arranged(mask[None, None], "rows"), **how)
    return Backward(draw(spec)), seen


def blocks(seen, variant, held_are_keys):
    """8 by 8 blocks of scores in those of held by passing rows of which the mask shows any."""
    rows, columns = (variant.passing, variant.held) if held_are_keys else (variant.held, variant.passing)
    shown = seen.unflatten(1, (-1, columns)).any(-1).unflatten(0, (-1, rows)).any(1)
    return shown.sum().item() * rows // 8 * columns // 8 * 2 * 2  # in two heads of two sequences


@pytest.mark.parametrize("name", PATTERNS)
def test_hidden_blocks_cost_nothing(name):
    call, seen = masked(name, "bool")
    for variant in (DIRECT, STAGED):
        with observe() as launches:
            got = call.run(variant, variant)
        call.check(got)
        _, queries, keys = (launch.counters["matrix_products"] for launch in launches)
        assert queries == blocks(seen, variant, False) * (2 + 3 + 2)
        assert keys == blocks(seen, variant, True) * (2 + 3 + 2 + 3)


@pytest.mark.metal_full
@pytest.mark.parametrize("lengths", [(100, 100), (33, 128), (2, 100), (128, 70), (40, 257)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("name", PATTERNS)
def test_structured_masks(name, kind, lengths):
    call, _ = masked(name, kind, lengths, window=(-1, 0) if name == "blocks" else (-1, -1))
    for variant in (DIRECT, STAGED, Variant(8, 4, 32, True, True, False)):
        with observe():
            got = call.run(variant, variant)
        call.check(got)


@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, torch.finfo(torch.float16).min, -1e4, -1e30])
def test_a_row_whose_every_key_has_the_least_number_added(least):
    """Its probabilities are those of its scores, or equal where the sum swallows these: no log-sum-exp says so."""
    mask = torch.zeros(1, 1, 40, 50)
    mask[..., 3:9, :] = least
    mask[..., 20:22, 10:] = least
    for dtype in (torch.float32, torch.float16):
        drawn = draw(Spec([(40, 50)] * 2, (16, 16), dtype, heads=(2, 1), mask=mask, sinks=True, window=(-1, 4)))
        drawn.problem.sinks.fill_(-math.inf)
        call = Backward(drawn)
        with observe():
            got = call.run()
        call.check(got)
        assert got["q"].abs().max() > 0


BROADCAST = ["", "b", "h", "bh", "q", "bhq", "k", "bhqk"]
RULES = [
    {"window": (-1, 0)},
    {"window": (9, 4), "softcap": 2.0},
    {"storage": "dense-used", "lengths": [(33, 20), (33, 50)], "sinks": True},
    {"dropout_p": 0.3, "scale": -0.3},
]


@pytest.mark.parametrize("broadcast", BROADCAST)
def test_the_gradient_of_a_mask(broadcast, rules=RULES[:1]):
    """Summed over the axes on which it is one for many; zero where it hides. Of its own shape and dtype."""
    for n, how in enumerate(rules):
        lengths = how.get("lengths", [(33, 50)] * 2)
        how = {name: value for name, value in how.items() if name != "lengths"}
        kind = "float32" if (len(broadcast) + n) % 2 else "same"
        spec = Spec(lengths, (24, 16), torch.float16, heads=(4, 2), mask=kind, broadcast=broadcast, **how)
        call = Backward(draw(spec))
        mask = call.call.problem.mask
        with observe() as launches:
            got = call.run()
        assert launches[-1].kernel == "attention_backward_mask"
        call.check(got)
        assert got["mask"].dtype == mask.dtype and got["mask"].shape == mask.shape
        assert (got["mask"][mask.isneginf()] == 0).all()


@pytest.mark.parametrize("columns", [53, 1])
def test_keys_that_are_not_used_give_a_mask_no_gradient(columns):
    """Also those of a tile whose other keys every query sees."""
    mask = torch.randn(2, 2, 33, columns)
    call = Backward(draw(Spec([(33, 20), (33, 50)], (24, 16), torch.float32, "dense-used", (2, 1), mask=mask)))
    with observe():
        got = call.run()
    call.check(got)
    assert columns == 1 or (got["mask"][0, ..., 20:] == 0).all()


@pytest.mark.metal_full
@pytest.mark.parametrize("broadcast", BROADCAST)
def test_the_gradient_of_a_mask_under_all_rules(broadcast):
    test_the_gradient_of_a_mask(broadcast, RULES)


@pytest.mark.parametrize("name", ["causal", "blocks", "one", "none"])
def test_the_gradient_of_a_mask_costs_two_products_where_it_shows(name):
    call, seen = masked(name, "added")
    variant = backward_kernels.mask_variant(2, 16, 24)
    with observe() as launches:
        call.run(names=["mask"])
    _, mask = (launch.counters["matrix_products"] for launch in launches)
    assert mask == blocks(seen, variant, True) * (2 + 3)


def test_a_learned_bias_of_pytorchs_shape():
    """By the public function: (1, heads, seqlen_q, seqlen_k), whatever the batch."""
    q, k, v = (torch.randn(2, 2, 40, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 40, 40, requires_grad=True)
    with observe(instrumented=False) as launches:
        got = torch.autograd.grad(flash_attention(q, k, v, attn_mask=bias).square().sum(), (q, k, v, bias))
    assert "attention_backward_mask" in [launch.kernel for launch in launches]
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v, bias)]
    s = leaves[0] @ leaves[1].mT * 16**-0.5 + leaves[3]
    expected = torch.autograd.grad((s.softmax(-1) @ leaves[2]).square().sum(), leaves)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
