"""Masks in the backward pass: a block that the mask hides whole costs nothing, in either kernel."""

import math

import pytest
import torch

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
