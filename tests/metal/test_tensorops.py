"""The kernel on cooperative tensors over the grid, under every layout that these may have.

The runner lays cooperative tensors out as it is told: as the family Apple10 does, as older ones do, or in any way that
the interface allows, drawn from a seed. Code that assumes a layout which it does not have gives wrong numbers there.
"""

import itertools
import math

import pytest
import torch

from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.tiers.metal import compiler, launch, proved, tensorops
from metal_host import nvidia, observe
from tests.attention.pairwise import case_id
from tests.metal_tiers import metal_on
from tests.test_metal_host.public_sources import SOURCES

from . import grid, tensorops_counters, test_proof, test_values
from .calls import Spec, draw
from .precompile import specializations

KNOWN = ("apple10", "legacy")
SEEDS = tuple(range(1, 21))
FACTORS = {
    "dtype": (torch.float16, torch.bfloat16),
    "rows": (16, 32),
    "simdgroups": (1, 2, 4),
    "keys": (32, 64),
    "shared_q": (False, True),
    "slices": (1, 2),
    "layout": ("apple10", "legacy", "generic"),
}
SHAPES = 2  # for each case
DEFAULT = list(enumerate(grid.cases(**FACTORS)))
FULL = list(enumerate(grid.cases(dims=grid.DIMS + grid.MORE_DIMS, **FACTORS)))
SAMPLED = [DEFAULT[n] for n in (2, 12, 14, 17, 18, 44, 69)]  # each layout, dtype, storage and kind of variant


@pytest.fixture(autouse=True, scope="module")
def _metal_4():
    with metal_on("cpu", version="4.0"):
        yield


def variant_of(case):
    """The variant that a case asks for, made smaller until there is room for it. None where there is none at all."""
    layout = tensorops.LAYOUTS[case["layout"]]
    wanted = tensorops.Variant(*(case[field] for field in ("rows", "simdgroups", "keys", "shared_q", "slices")))
    nearest = sorted(
        tensorops.FORWARD.fitting(2, *case["dims"]),
        key=lambda v: [abs(a - b) for a, b in zip(v, wanted, strict=True)],
    )
    return nearest[0]._replace(layout=layout) if nearest else None


def launches(number, case):
    variant = variant_of(case)
    for spec in grid.specs(case, number, SHAPES) if variant else ():
        yield spec, tensorops.FORWARD, variant


def run(number, case, seeds):
    """Code that knows a layout under that one; the generic code under both and those of `seeds`."""
    of_machine = [case["layout"]] if case["layout"] in KNOWN else [*KNOWN, *seeds]
    for seed, (spec, kernel, variant) in enumerate(launches(number, case)):
        print(variant, spec)
        call = draw(spec)
        for layout in of_machine:
            with observe(seed=seed, layout=layout):
                result = launch.run(call.problem, kernel, variant)
            call.check(result)


def numbered(cases):
    return [pytest.param(n, case, id=f"{n}-{case_id(case)}") for n, case in cases]


@pytest.mark.parametrize(("number", "case"), numbered(SAMPLED))
def test_grid(number, case):
    run(number, case, SEEDS[:2])


@pytest.mark.parametrize(
    ("dims", "layout"),
    [
        ((80, 96), "legacy"),
        pytest.param((256, 256), "apple10", marks=pytest.mark.metal_full),
    ],
)
def test_the_default_for_wide_heads(dims, layout):
    """Queries in threadgroup memory, head dims halved, and a fragment that is not full."""
    call = draw(Spec([(33, 70), (20, 45)], dims, torch.float16, "packed-cache", heads=(2, 1), window=(-1, 0)))
    variant = tensorops.default(2, *dims)._replace(layout=tensorops.LAYOUTS[layout])
    with observe(layout=layout):
        call.check(launch.run(call.problem, tensorops.FORWARD, variant))


def test_code_that_assumes_another_layout_gives_wrong_numbers():
    """So these tests tell the layouts apart."""
    for assumed, is_there in (("apple10", "legacy"), ("legacy", "apple10"), ("apple10", 1)):
        call = draw(Spec([(33, 70)], (32, 32), torch.float16, heads=(1, 1)))
        variant = tensorops.Variant(16, 1, 32, layout=tensorops.LAYOUTS[assumed])
        with observe(instrumented=False, layout=is_there):
            result = launch.run(call.problem, tensorops.FORWARD, variant)
        with pytest.raises(AssertionError):
            call.check(result)


KERNEL = (tensorops.FORWARD, tensorops.Variant(16, 2, 32, layout=tensorops.LAYOUTS["apple10"]))
HOWS = ({}, {"window": (-1, 0)}, {"window": (9, 4)}, {"mask": "bool"}, {"mask": "same", "window": (-1, 0)})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_what_a_query_sees_reaches_it_and_no_other(how, operand, value):
    test_values.test_what_a_query_sees_reaches_it_and_no_other(KERNEL, how, operand, value)


@pytest.mark.metal_full
@pytest.mark.parametrize("layout", tensorops.LAYOUTS)
@pytest.mark.parametrize(
    "variant", [tensorops.Variant(16, 2, 64, True, 2), tensorops.Variant(32, 1, 32), tensorops.Variant(16, 4, 32, True)]
)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_what_a_query_sees_reaches_it_under_every_layout(how, variant, layout, monkeypatch):
    monkeypatch.setenv("METAL_HOST_LAYOUT", "3" if layout == "generic" else layout)
    kernel = tensorops.FORWARD, variant._replace(layout=tensorops.LAYOUTS[layout])
    for operand, value in itertools.product("qkv", (math.nan, math.inf, -math.inf)):
        test_values.test_what_a_query_sees_reaches_it_and_no_other(kernel, how, operand, value)


@pytest.mark.parametrize("mask", ["bool", "same"])
def test_rows_that_see_nothing(mask):
    test_values.test_rows_that_see_nothing(KERNEL, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_the_range_of_the_dtype(dtype):
    test_values.test_scores_beyond_the_range_of_the_dtype(KERNEL, dtype)


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["apple10", "legacy"])
def test_quantised_caches(layout, codes):
    call = draw(Spec([(33, 70)] * 2, (40, 32), torch.float16, "paged-cache", window=(-1, 0), codes=codes))
    variant = tensorops.Variant(16, 2, 32, layout=tensorops.LAYOUTS[layout])
    with observe(layout=layout):
        call.check(launch.run(call.problem, tensorops.FORWARD, variant))


def test_every_specialization_has_a_trial_that_is_its_own():
    every = specializations(launch_of for n, case in DEFAULT[::3] for launch_of in problems(n, case))
    assert len(every) > 20
    for s in every:
        test_proof.check_trial(s, "forward")


def problems(number, case):
    for spec, kernel, variant in launches(number, case):
        yield draw(spec).problem, kernel, variant


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 8 * (t / 4) + 4 * r + t % 4; }", "return 8 * r + t; }"),  # the slots of another layout
        ("if (HIDDEN) {", "if (false) {"),  # NaN that queries do not see
        ("UNROLL for (int i = 0; i < 16; ++i) destination[i] = c[i];", ""),  # what is not zeroed
        *(
            pytest.param(*fault, marks=pytest.mark.metal_full)
            for fault in (
                ("return KEYS / 2 * r; }", "return 0; }"),  # which keys a lane has of v
                ("        to[i] = T(0.0f);\n", ""),  # what lies beyond a row
                ("if (is_seen(sees, fragment_of(i), element_of(i))) reached[r] |= of_key;", ""),  # NaN that they see
                ("false, OF_K, false,", "false, !OF_K, false,"),  # a transposed operand
            )
        ),
    ],
)
def test_the_proof_finds_planted_faults(old, new):
    spec = Spec([(40, 70)], (13, 13), torch.float16, "varlen", window=(-1, 0))
    (s,) = specializations([(draw(spec).problem, *KERNEL)])
    source = s.source()
    assert old in source
    library = compiler.compile_shader(source.replace(old, new))
    assert s.kernel.proof(s, library.attention_tensorops) is not None


@pytest.mark.metal_full
@pytest.mark.parametrize("layout", tensorops.LAYOUTS)
def test_every_specialization_of_the_grid_passes_its_proof(layout, monkeypatch):
    monkeypatch.setenv("METAL_HOST_LAYOUT", "7" if layout == "generic" else layout)
    monkeypatch.setenv(proved.PROVE, "always")
    every = specializations(launch_of for n, case in DEFAULT for launch_of in problems(n, case))
    for s in every:
        if s.variant.layout == tensorops.LAYOUTS[layout]:
            assert compiler.kernel(s) is not None, compiler.failures


@pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice of a CUDA toolkit")
@pytest.mark.parametrize("dim", [64, 128])
def test_the_default_fits_the_registers(dim):
    """Of a block that nothing hides a key of. Those with an edge, a few for each tile of queries, need some more."""
    q = torch.empty(1, 64, 2, dim).half()
    variant = tensorops.default(2, dim, dim)._replace(layout=tensorops.LAYOUTS["apple10"])
    p = dense(q, q, q, CallOptions(causal=True, want_lse=True))
    (s,) = specializations([(p, tensorops.FORWARD, variant)])
    live = compiler.compile_shader(s.source(), kernels=[]).live_registers(tensorops.FORWARD.entry)
    expected = tensorops.live_registers(variant, dim, dim)
    assert expected <= tensorops.MAX_REGISTERS
    assert expected <= live <= expected + 28


@pytest.mark.metal_full
@pytest.mark.parametrize(("number", "case"), numbered([*DEFAULT, *FULL]))
def test_whole_grid(number, case):
    if variant_of(case) is None:
        pytest.skip("no variant has room for these head dims")
    run(number, case, SEEDS)


def counted(seqlen_q, seqlen_k, dim, **how):
    q, k, v = (torch.randn(1, n, 1, dim).half() for n in (seqlen_q, seqlen_k, seqlen_k))
    p = dense(q, k, v, CallOptions(**how))
    variant = tensorops.default(2, dim, dim)._replace(layout=tensorops.LAYOUTS["apple10"])
    with observe(layout="apple10") as launches:
        launch.run(p, tensorops.FORWARD, variant)
    return launches[0].counters, variant


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_what_it_does_is_what_has_to_be_done(dim):
    """Of every tile of 16 queries and 32 keys: k and v once, a product of each 16 columns and 16 x 32 scores.

    Queries are read once. Each lane has two rows whose sum may be rescaled.
    """
    tiles, key_tiles = 8, 6
    counters, variant = counted(16 * tiles, 32 * key_tiles, dim)
    assert counters["device_bytes_read"] == 2 * dim * 16 * tiles + tiles * key_tiles * 2 * 2 * 32 * dim
    assert counters["matrix_products"] == tiles * key_tiles * 2 * dim // 16 * 16  # of 8x8x8
    exponentials = tiles * key_tiles * 16 * 32
    assert exponentials <= counters["transcendentals"] <= exponentials * 9 / 8
    assert counters["simdgroup_barriers"] <= tiles * key_tiles
    assert counters["threadgroup_barriers"] == 0
    q_again = tiles * key_tiles * 2 * 16 * dim if variant.shared_q else 0
    assert counters["threadgroup_bytes_read"] == q_again


def test_tiles_that_nobody_sees_are_skipped():
    """Causal: a tile of 16 queries goes to its last key, in steps of 32."""
    counters, _ = counted(128, 128, 64, causal=True)
    tiles = sum(-(-(16 * n) // 32) for n in range(1, 9))
    assert counters["matrix_products"] == tiles * 2 * 64 // 16 * 16


@pytest.mark.metal_full
@pytest.mark.skipif(not SOURCES.is_dir(), reason="METAL_HOST_SOURCES is not a folder")
@pytest.mark.parametrize("mask", tensorops_counters.MASKS)
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_no_more_than_mlxs_kernel(dim, length, mask):
    shares = {name: (mine, theirs) for name, (mine, theirs) in tensorops_counters.compared(length, dim, mask).items()}
    for name in ("matrix_products", "transcendentals", "simdgroup_barriers", "threadgroup_barriers", "shuffles"):
        mine, theirs = shares[name]
        assert mine <= theirs, name
    mine, theirs = shares["device_bytes_read"]
    q_once = length * dim * 2
    assert mine - q_once <= 0.8 * theirs
