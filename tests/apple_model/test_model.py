"""The cost model of Apple's GPUs: what it counts in code, and what it makes of that."""

import math

import pytest
import torch

from apple_model import kernels, validate
from apple_model.by_hand import metal_flash_attention
from apple_model.chips import CHIPS
from apple_model.core import APPLE7, APPLE9, steady
from apple_model.predict import Call, predict
from apple_model.program import Operation, Program, bank_cycles, lines
from flash_attn_mps.tiers.metal import launch, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import nvidia, observe
from tests.metal.calls import Spec, draw

needs_code = pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice of a CUDA toolkit")


@needs_code
@pytest.mark.parametrize(
    ("variant", "head_dim"),
    [(Variant(8, 2, 16, False), 64), (Variant(8, 2, 16, True), 64), (Variant(8, 2, 16, False, True), 32)],
    ids=str,
)
def test_a_round_counts_what_the_runner_counts(variant, head_dim):
    """The main loop of the code against the counters of a launch, 16 keys more: a round more."""

    def counters(seqlen_k):
        spec = Spec([(16, seqlen_k)], (head_dim, head_dim), torch.float16, heads=(1, 1), lse=False)
        with observe() as launches:
            launch.run(draw(spec).problem, simdgroup.FORWARD, variant)
        return launches[0].counters

    before, after = counters(64), counters(80)
    counted = {name: (after[name] - before[name]) // variant.simdgroups for name in before}
    program = kernels.ours(variant, "fp16", head_dim).program
    assert program.products == counted["matrix_products"] == program.counts["products"]
    assert program.counts["device load bytes"] == counted["device_bytes_read"]
    assert program.counts["threadgroup load bytes"] == counted["threadgroup_bytes_read"]
    assert program.counts["threadgroup store bytes"] == counted["threadgroup_bytes_written"]
    assert program.counts["barriers"] == after["threadgroup_barriers"] - before["threadgroup_barriers"]


def made_of(*operations, products):
    return Program([*operations], products, False, 0, 0)


def test_products_alone_run_at_16_of_17():
    chain = [Operation("product", 1, number=n) for n in range(64)]
    for core in (APPLE7, APPLE9):
        assert math.isclose(steady(core, made_of(*chain, products=64), 4, 3).cycles, 64 * 17, rel_tol=0.02)


def test_products_that_wait_for_each_other_run_at_half_that_in_one_simdgroup():
    chain = [Operation("product", 1, waits=(n - 1,) if n else (), number=n) for n in range(64)]
    alone = steady(APPLE7, made_of(*chain, products=64), 4, 1).cycles
    assert math.isclose(alone, 64 * 34, rel_tol=0.05)
    assert steady(APPLE7, made_of(*chain, products=64), 4, 3).cycles < 0.55 * alone


def test_a_load_is_hidden_by_other_simdgroups_only():
    addresses = tuple(16 * lane for lane in range(32))
    load = Operation("load", 1, "device", 512, addresses, number=0)
    work = [Operation("product", 1, waits=(0,), number=n) for n in range(1, 17)]
    one, three = (steady(APPLE7, made_of(load, *work, products=16), 4, groups).cycles for groups in (1, 3))
    assert one > 16 * 17 + 0.9 * APPLE7.device_latency
    assert three < 1.1 * 16 * 17 + 10


def test_lines_and_banks():
    assert lines(tuple(16 * lane for lane in range(32)), 16) == 4
    assert lines(tuple(256 * lane for lane in range(32)), 16) == 32
    assert bank_cycles(tuple(4 * lane for lane in range(32)), 4, 128) == 1
    assert bank_cycles(tuple(4 * lane for lane in range(32)), 4, 64) == 2
    assert bank_cycles(tuple(128 * lane for lane in range(32)), 4, 128) == 32


def test_a_launch_takes_as_long_as_its_fullest_core():
    """One tile more than the cores have room for costs another wave; causal tiles cost half."""
    kernel = metal_flash_attention((32, 64, 32), "fp16", 64, True, True, True)
    chip = CHIPS["M1 Max"]
    room = chip.cores * chip.core.groups(kernel.simdgroups, kernel.registers, kernel.threadgroup_bytes)
    full, more = (predict(chip, kernel, Call(1, heads, 32, 8192)).milliseconds for heads in (room, room + 1))
    assert 1.1 < more / full < 2.1
    whole, causal = (predict(chip, kernel, Call(4, 16, 4096, 4096, c)).milliseconds for c in (False, True))
    assert 0.45 < causal / whole < 0.6


@pytest.mark.metal_full
@needs_code
def test_published_times_are_predicted():
    """What docs/apple-model.md says of the model's errors."""
    rows = validate.rows()
    mean, rms = validate.mean_and_rms(row.ratio for row in rows)
    assert 0.9 < mean < 1.1
    assert rms < 1.25
