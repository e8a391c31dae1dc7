"""Masks with structure: whole blocks that nobody sees, that everybody sees, and those between.

A mask is bool or added, in any memory, on top of windows, ALiBi, soft-capping and sinks. What a block of keys costs is
counted: nothing where the mask hides it.
"""

import math
import re
from dataclasses import replace

import pytest
import torch

from flash_attn_mps import dispatch
from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.problem import with_mask
from flash_attn_mps.tiers.metal import compiler, launch, scalar, simdgroup
from flash_attn_mps.tiers.metal.simdgroup import Variant
from flash_attn_mps.tiers.metal.specialization import Mask
from metal_host import observe
from tests.attention.pairwise import case_id, pairwise

from .calls import Spec, arranged, draw
from .precompile import precompile, specializations
from .test_host import Watch, kernel, on_device  # noqa: F401 (a fixture)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIM = 16
DIRECT, STAGED = Variant(16, 2, 16, False), Variant(8, 4, 16, True)
TILED = (simdgroup.FORWARD, DIRECT), (simdgroup.FORWARD, STAGED)
SCALAR = (scalar.FORWARD, scalar.VARIANT)

PATTERNS = {  # of queries i + offset and keys j: which are seen
    "all": lambda i, j: (i >= j) | (i < j),
    "none": lambda i, j: (i >= j) & (i < j),
    "causal": lambda i, j: j <= i,
    "band": lambda i, j: (j <= i) & (j > i - 20),
    "front": lambda i, j: (j < 40) & (i == i),
    "back": lambda i, j: (j >= 40) & (i == i),
    "blocks": lambda i, j: (i // 32 + j // 32) % 2 == 0,
    "one": lambda i, j: (i == 37) & (j == 50),
    "all but one": lambda i, j: (i != 37) | (j != 50),
    "queries": lambda i, j: (i // 20 % 2 == 0) & (j == j),
}


def pattern(name, seqlen_q, seqlen_k):
    """(seqlen_q, seqlen_k), bool."""
    i = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    return PATTERNS[name](i, torch.arange(seqlen_k)[None])


def added(seen, dtype):
    """-inf where not seen; else zero in every other block of 32 keys, and random numbers in the rest."""
    bias = torch.randn(seen.shape) * (torch.arange(seen.shape[-1]) // 32 % 2)
    return bias.to(dtype).masked_fill_(~seen, -math.inf)


LENGTHS = ((100, 100), (64, 64), (33, 128), (2, 100), (128, 70), (40, 257))
CASES = pairwise(
    mask=("bool", "same", "float32"),
    dtype=DTYPES,
    layout=("rows", "offset", "columns"),
    variant=(DIRECT, STAGED, Variant(8, 1, 8, False), Variant(32, 2, 32, False), Variant(8, 2, 64, False)),
    window=((-1, -1), (-1, 0), (30, 5)),
    extra=("none", "softcap", "alibi", "sinks"),
)

FULL = [
    {**CASES[n % len(CASES)], "dtype": dtype, "variant": variant}
    for dtype in (torch.float16, torch.float32)
    for n, variant in enumerate(simdgroup.FORWARD.fitting(dtype.itemsize, DIM, 24))
]


def calls_of(case):
    """Every pattern, each with the next of the lengths."""
    for n, name in enumerate(PATTERNS):
        lengths = LENGTHS[(n + len(case_id(case))) % len(LENGTHS)]
        seen = pattern(name, *lengths)
        dtype = {"same": case["dtype"], "float32": torch.float32}.get(case["mask"])
        mask = arranged((seen if dtype is None else added(seen, dtype))[None, None], case["layout"])
        extra = {"softcap": {"softcap": 2.0}, "alibi": {"alibi": "BH"}, "sinks": {"sinks": True}}.get(case["extra"], {})
        rules = {"window": case["window"], "mask": mask, **extra}
        yield name, draw(Spec([lengths] * 2, (DIM, 24), case["dtype"], heads=(2, 1), **rules))


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """The kernels of the chosen cases, compiled side by side."""
    tests = (test_structured_masks, test_structured_masks_in_every_variant)
    chosen = [item.callspec.params for item in request.session.items if item.function in tests]
    calls = ((call.problem, simdgroup.FORWARD, how["case"]["variant"]) for how in chosen for _, call in calls_of(**how))
    precompile(calls)


@pytest.mark.metal_full
@pytest.mark.parametrize("case", FULL, ids=case_id)
def test_structured_masks_in_every_variant(case):
    test_structured_masks(case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_structured_masks(case):
    for name, call in calls_of(case):
        print(name, tuple(call.problem.mask.shape))
        with observe():
            result = launch.run(call.problem, simdgroup.FORWARD, case["variant"])
        call.check(result)


def counted(p, variant, instrumented=False):
    with observe(instrumented=instrumented) as launches:
        launch.run(p, simdgroup.FORWARD, variant)
    (one,) = launches
    return one.counters


def plain(length, **how):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, length, 2, DIM).half() for _ in range(3))
    return dense(q, k, v, CallOptions(**how))


SAME_AS = {"causal": {"causal": True}, "band": {"window_size": (19, 0)}, "all": {}}


@pytest.mark.parametrize("variant", [DIRECT, STAGED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
@pytest.mark.parametrize("name", SAME_AS)
def test_a_mask_costs_the_products_of_the_window_that_it_draws(name, dtype, variant):
    """Tile for tile: no product where it hides all, and no exponentials."""
    seen = pattern(name, 128, 128)
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
    without, with_it = counted(plain(128, **SAME_AS[name]), variant), counted(with_mask(plain(128), mask), variant)
    if name == "band":  # windows begin where they begin, blocks under a mask at multiples of their length
        assert with_it["matrix_products"] <= without["matrix_products"] * 1.3
    else:
        assert with_it["matrix_products"] == without["matrix_products"]
    assert with_it["transcendentals"] <= without["transcendentals"] * 1.3


@pytest.mark.parametrize("variant", [DIRECT, STAGED], ids=str)
def test_padding_costs_nothing(variant):
    """Half of the keys are padding, for every query: half of the work, and half of k and v is not read."""
    mask = torch.ones(1, 1, 1, 128, dtype=torch.bool)
    whole = counted(with_mask(plain(128), mask), variant, instrumented=True)
    mask[..., 64:] = False
    half = counted(with_mask(plain(128), mask), variant, instrumented=True)
    assert half["matrix_products"] * 2 == whole["matrix_products"]
    readers = 128 // variant.rows // (variant.simdgroups if variant.staged else 1)
    k_and_v = 2 * 128 * 2 * DIM * 2  # bytes, of both heads
    assert whole["device_bytes_read"] - half["device_bytes_read"] == readers * k_and_v / 2


@pytest.mark.parametrize("variant", [DIRECT, STAGED], ids=str)
def test_nothing_is_done_for_queries_that_see_nothing(variant):
    p = with_mask(plain(128), torch.zeros(128, 128, dtype=torch.bool))
    assert counted(p, variant)["matrix_products"] == 0


def test_simdgroups_agree_on_the_blocks_of_run_after_run():
    """Where a run of 32 blocks shows nothing, nothing but the votes' own barrier keeps simdgroups together: one that is
    ahead must not write its vote of the next run where another still reads those of the last."""
    keys = 32 * STAGED.keys
    mask = torch.ones(1, 1, 1, 4 * keys, dtype=torch.bool)
    mask[..., : 2 * keys + 5] = False
    counters = counted(
        draw(Spec([(64, 4 * keys)], (DIM, DIM), heads=(1, 1), mask=mask)).problem, STAGED, instrumented=True
    )
    assert counters["threadgroup_barriers"] > 0


@pytest.mark.parametrize("variant", [DIRECT, STAGED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32])
def test_how_often_a_mask_is_read(dtype, variant):
    """Every element once for each head, twice where it hides or changes some scores of its block but not all; and one
    that is broadcast over queries once for each tile.
    """
    without = counted(plain(128), variant, instrumented=True)["device_bytes_read"]

    def read(*shape, blank=False):
        mask = torch.zeros(shape) if blank else torch.randn(shape)
        mask = mask >= 0 if dtype == torch.bool else mask.to(dtype)
        return counted(with_mask(plain(128), mask), variant, instrumented=True)["device_bytes_read"] - without

    heads = 2
    strides = 8 * 4 * 32 * 4 * heads * (128 // variant.rows)  # what the kernel takes from its parameters
    once = heads * 128 * 128 * dtype.itemsize
    assert read(128, 128, blank=True) <= once + strides
    assert read(1, 128, blank=True) <= once / (variant.rows // 8) + strides
    assert read(128, 128) <= 2 * once + strides


@pytest.mark.parametrize("variant", [DIRECT, STAGED], ids=str)
def test_where_all_is_seen_values_are_not_searched_for_nan(variant):
    """One product more for every value that is not finite is the sign of a search: none, if the mask hides nothing."""
    p = plain(128)
    p.v[:, 5] = math.nan
    seen = torch.ones(128, 128, dtype=torch.bool)
    assert counted(with_mask(p, seen), variant)["matrix_products"] == counted(p, variant)["matrix_products"]
    seen[3, 7] = False  # beside it, in one tile of each head
    assert counted(with_mask(p, seen), variant)["matrix_products"] > counted(p, variant)["matrix_products"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", ["same", "float32"])
@pytest.mark.parametrize("kernel", [*TILED, SCALAR], ids=str)
def test_the_least_finite_number_does_not_hide(kernel, mask_dtype, dtype):  # noqa: F811
    """finfo.min on a whole row changes nothing but the log-sum-exp; beside keys that are seen it hides."""
    mask_dtype = dtype if mask_dtype == "same" else torch.float32
    lowest = torch.finfo(mask_dtype).min
    mask = torch.zeros(40, 64, dtype=mask_dtype)
    mask[:8] = lowest  # whole tiles
    mask[8, :] = lowest  # a row of one
    mask[20:, 30:] = lowest
    mask[30] = -math.inf
    mask[31, :63] = -math.inf  # and the last key has finfo.min
    call = draw(Spec([(40, 64)], (DIM, DIM), dtype, heads=(2, 1), mask=mask))
    call.problem.q[:, :9] = 0.0  # so that their scores are alike: others would be rounded to where the mask is
    call.sequences[0].q[:9] = 0.0
    result = launch.run(call.problem, *kernel)
    exact = call.expected(torch.float64)
    torch.testing.assert_close(result.out.double(), exact.out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse.double(), exact.lse, rtol=1e-5, atol=1e-5)
    assert (result.out[0, :9].float().abs().sum(-1) > 0).all()
    assert torch.equal(result.out[0, 31, 0], call.problem.v[0, 63, 0])
    assert (result.out[0, 30] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kernel", [*TILED, SCALAR], ids=str)
def test_what_is_added_and_not_finite_reaches_its_row_alone(kernel, value):  # noqa: F811
    mask = torch.zeros(40, 64)
    mask[:16, :32] = -math.inf
    call = draw(Spec([(40, 64)], (DIM, DIM), torch.float16, heads=(2, 1), mask=mask))
    clean = launch.run(call.problem, *kernel).out
    for row, key in ((3, 40), (20, 7)):
        mask[row, key] = value
    call.problem.mask = mask.expand(1, 2, 40, 64)
    out = launch.run(call.problem, *kernel).out
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[[3, 20]] = True
    assert out[0, spoilt].isnan().all()
    assert torch.equal(out[0, ~spoilt], clean[0, ~spoilt])


@pytest.mark.parametrize("kernel", [*TILED, SCALAR], ids=str)
def test_true_may_be_any_number_but_zero(kernel):  # noqa: F811
    """As in torch: of bytes that a view calls bool."""
    seen = pattern("blocks", 64, 64)
    bytes_ = seen.to(torch.uint8) * (1 + torch.arange(64, dtype=torch.uint8) * 3 % 255)
    call = draw(Spec([(64, 64)], (DIM, DIM), torch.float16, heads=(2, 1), mask=seen))
    call.problem.mask = bytes_.view(torch.bool).expand(1, 2, 64, 64)
    call.check(launch.run(call.problem, *kernel))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
def test_every_place_in_memory(dtype, offset, step):
    """Rows at any offset, and columns apart: the right vectors, and nothing read beside the mask."""
    seen = pattern("blocks", 40, 48)
    mask = seen if dtype == torch.bool else added(seen, dtype)
    room = torch.ones(offset + 40 * 48 * step - (step - 1), dtype=dtype)
    there = room.as_strided(mask.shape, (48 * step, step), offset)
    there.copy_(mask)
    call = draw(Spec([(40, 48)], (DIM, DIM), torch.float16, heads=(2, 1), mask=there))
    for variant in (DIRECT, STAGED):
        with observe():
            call.check(launch.run(call.problem, simdgroup.FORWARD, variant))


def test_what_is_compiled_depends_on_the_layout_and_not_on_the_length():
    masks = [torch.ones(n, n, dtype=torch.bool).expand(2, 4, n, n) for n in range(1, 140)]
    layouts = {launch.mask_layout(mask) for mask in masks[1:]}
    assert layouts == {Mask("uchar", aligned, False, False) for aligned in (1, 4, 16)}
    padding = {launch.mask_layout(mask[:, :, :1].expand(mask.shape)) for mask in masks[1:]}
    assert padding == {Mask("uchar", 16, True, False)}
    assert launch.mask_layout(masks[63][..., ::2]) == Mask("uchar", 0, False, False)
    assert launch.mask_layout(masks[63][..., :1].expand(2, 4, 64, 64)) == Mask("uchar", 0, False, True)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("shape", [(1, 1, 40, 50), (1, 1, 1, 50), (1, 4, 40, 1), ()], ids=str)
def test_one_launch_no_wait_and_no_tensor_but_the_outputs(shape, batch, kernel):  # noqa: F811
    q, k = on_device(batch, 40, 4, 64), on_device(batch, 50, 2, 64)
    mask, sinks = on_device(*shape, dtype=torch.bool), on_device(4, dtype=torch.float32)
    with Watch() as watch:
        p = with_mask(dense(q, k, k, CallOptions()), mask)
        dispatch.attention(replace(p, sinks=sinks))
    assert kernel.call_count == 1
    assert [shape for _, shape in watch.created] == [(batch, 40, 4, 64)]
    assert kernel.call_args.args[-1].data_ptr() == mask.data_ptr()


def test_masks_do_not_change_the_kernels_of_calls_without():
    """Nothing of a mask is left in their source once it is preprocessed: no buffer, no vote."""
    p = plain(64)
    (asked,) = specializations([(p, simdgroup.FORWARD, STAGED)])
    source = asked.source()
    assert re.search(r"#define HAS_MASK 0\b", source)
    assert compiler.compile_shader(source).attention_forward is not None
    votes = {counter: counted(p, STAGED)[counter] for counter in ("shuffles", "threadgroup_barriers")}
    blocks = 128 // 2 // STAGED.keys
    assert votes["threadgroup_barriers"] == 2 * blocks * 2 * (64 // (STAGED.rows * STAGED.simdgroups))


def test_neighbouring_elements_are_loaded_together():
    """Instructions that load from device memory: fewer, the better the rows of the mask are aligned."""
    p = with_mask(plain(64), torch.ones(64, 64, dtype=torch.bool))
    (asked,) = specializations([(p, simdgroup.FORWARD, Variant(16, 2, 32, False))])
    loads = []
    for aligned in (16, 4, 1):
        library = compiler.compile_shader(asked._replace(mask=asked.mask._replace(aligned=aligned)).source())
        loads.append(library.module("attention_forward").ptx.count("ld.global"))
    fragments, rows = 32 // 8, 16 // 8
    assert loads[0] < loads[1] < loads[2]
    assert loads[2] - loads[0] >= rows * (2 * fragments - 1)
