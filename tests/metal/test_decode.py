"""The decode kernel and the one that puts splits together: over a grid, instrumented, and what they read and start.

As `test_kernels.py`: right by the error rule, no race, no access outside a buffer, no read of threadgroup memory that
nobody wrote, no barrier that some threads miss; what no query sees holds NaN or infinity.
"""

import dataclasses
import math

import pytest
import torch

from flash_attn_mps import dispatch
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import compiler, decode, gpu, launch, simdgroup
from flash_attn_mps.tiers.metal import few as few_queries
from flash_attn_mps.tiers.metal.decode import Variant
from metal_host import observe
from tests.attention.pairwise import case_id, pairwise

from . import grid
from .calls import STORAGES, Spec, draw, int32
from .precompile import precompile

KEYS = [(300,), (65, 0, 700), (31, 257), (129, 7, 64), (1, 513)]  # of each sequence, by turns
FACTORS = {
    "dims": [(64, 64), (128, 128), (40, 40), (192, 128), (512, 512), (100, 72), (13, 13), (8, 40), (320, 256)],
    "dtype": grid.DTYPES,
    "storage": STORAGES,
    "queries": (1, 3, 8, 17),
    "heads": ((2, 2), (8, 2), (6, 2), (8, 1)),
    "small": (False, True),  # blocks of 8 keys, two units: as many splits, edges and turns as there can be
    "splits": (1, 2, 5),
    "window": tuple(grid.WINDOWS),
    "mask": (None, "bool", "same", "float32"),
    "mask_layout": ("rows", "offset", "columns"),
    "one": ("", "q", "k", "qk"),
    "softcap": (0.0, 3.0),
    "alibi": (None, "H", "BH"),
    "sinks": (False, True),
    "lse": (True, False),
    "scale": ("number", "float16", "float32"),
    "aligned": (True, False),
    "codes": (None, torch.float8_e4m3fn, torch.int8, torch.float8_e5m2),
}
MORE_DIMS = [(80, 80), (96, 96), (256, 256), (72, 72), (250, 250), (384, 384), (1, 1), (3, 200), (257, 512)]
SHAPES = pairwise(
    turn=tuple(range(len(KEYS))),
    q=grid.LAYOUTS,
    k=grid.LAYOUTS,
    v=grid.LAYOUTS,
    broadcast=grid.BROADCASTS,
    left=(0, 5, 100),
    right=(0, 3, 17),
    scale=(None, 0.3, -0.2, 0.0),
    poison=(math.nan, math.inf),
    page_size=(1, 16, 50, 256),
)
ALL = list(enumerate(pairwise(**FACTORS)))
MORE = list(
    enumerate(pairwise(**{**FACTORS, "dims": MORE_DIMS, "queries": (2, 4, 9, 32), "heads": ((3, 3), (5, 1), (32, 2))}))
)


def numbered(cases):
    return [pytest.param(n, case, id=f"{n}-{case_id(case)}") for n, case in cases]


def specs(case, number, shapes=2):
    """The next shapes of the `number`th case."""
    for turn in range(number * shapes, (number + 1) * shapes):
        shape = SHAPES[turn % len(SHAPES)]
        keys = KEYS[shape["turn"]]
        if case["storage"] == "dense":
            keys = keys[:1] * len(keys)
        queries = [case["queries"]] * len(keys)
        if case["storage"] not in ("dense", "cache", "paged-cache"):
            queries[1:] = [0, 2][: len(keys) - 1]
        left, right = grid.WINDOWS[case["window"]]
        scale = shape["scale"]
        if case["scale"] != "number":
            scale = torch.tensor(0.25 if scale is None else scale, dtype=getattr(torch, case["scale"]))
        yield Spec(
            list(zip(queries, keys, strict=True)),
            case["dims"],
            case["dtype"],
            case["storage"],
            case["heads"],
            (shape["left"] if left else -1, (0 if case["window"] == "causal" else shape["right"]) if right else -1),
            case["softcap"],
            case["alibi"],
            case["sinks"],
            case["mask"],
            shape["broadcast"] + case["one"],
            case["mask_layout"],
            scale,
            case["lse"],
            (shape["q"], shape["k"], shape["v"]) if case["aligned"] else ("offset",) * 3,
            shape["poison"],
            shape["page_size"],
            codes=case["codes"],
        )


def variant_of(p: AttentionProblem, small: bool) -> Variant:
    variant = next(decode.variants(p))
    return variant._replace(units=min(2, variant.units), keys=8) if small else variant


def calls(case, number):
    """The calls of a case, and the variant of each."""
    for spec in specs(case, number):
        print(spec)
        call = draw(spec)
        call.problem = dataclasses.replace(call.problem, num_splits=case["splits"])
        yield call, variant_of(call.problem, case["small"])


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """The kernels of the chosen tests of the grid, compiled side by side."""
    chosen = [
        item.callspec.params
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    cases = [how for how in chosen if "case" in how]
    precompile(((call.problem, variant) for how in cases for call, variant in calls(**how)), run=decode.run)


def run(number, case):
    for seed, (call, variant) in enumerate(calls(case, number)):
        print(variant)
        with observe(seed=seed):
            result = decode.run(call.problem, variant)
        call.check(result)


@pytest.mark.parametrize(("number", "case"), numbered(ALL[::4]))
def test_grid(number, case):
    run(number, case)


@pytest.mark.metal_full
@pytest.mark.parametrize(("number", "case"), numbered(ALL + MORE))
def test_whole_grid(number, case):
    run(number, case)


def served(p, **how):
    """(result, launches) of the decode tier."""
    with observe(**how) as launched:
        result = decode.TIER.run(p)
    return result, launched


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("group", "dim", "queries"), [(8, 64, 1), (8, 64, 4), (4, 128, 2), (2, 512, 1)])
@pytest.mark.parametrize("storage", ["dense", "paged-cache", "packed-cache"])
def test_keys_and_values_are_read_once_for_all_heads_and_queries(storage, group, dim, queries, splits):
    keys = 2048
    spec = Spec([(queries, keys)], (dim, dim), torch.float16, storage, (group, 1), (-1, 0), lse=False, page_size=48)
    p = dataclasses.replace(draw(spec).problem, num_splits=splits)
    _, (first, *_) = served(p)
    numbers = 4 * 8 * 256 * splits  # lengths and indices, which each thread of a group reads for itself
    assert keys * dim * 2 * 2 <= first.counters["device_bytes_read"] <= 1.05 * keys * dim * 2 * 2 + numbers


def products_needed(p, variant, visible):
    """8x8x8 products of a dense problem whose tile sees `visible` keys."""
    blocks = -(-visible // variant.keys)
    each = sum(variant.fragments(x.shape[-1]) for x in (p.q, p.v)) * variant.slices
    tiles = -(-p.max_seqlen_q * variant.heads_in_tile // variant.rows)
    return p.batch * p.heads_k * tiles * blocks * variant.keys // 8 * variant.rows // 8 * each


@pytest.mark.parametrize("splits", [0, 1, 4])
@pytest.mark.parametrize(("window", "visible"), [((-1, -1), 3000), ((200, 0), 202), ((-1, 0), 3000)])
def test_no_block_is_computed_and_no_threadgroup_started_for_keys_that_nobody_sees(window, visible, splits):
    spec = Spec([(2, 3000)] * 2, (64, 64), torch.float16, heads=(4, 2), window=window)
    p = dataclasses.replace(draw(spec).problem, num_splits=splits)
    variant = next(decode.variants(p))
    _, (first, *_) = served(p)
    assert first.counters["matrix_products"] == products_needed(p, variant, visible)
    assert decode.splits_of(p, variant) <= -(-visible // (variant.units * variant.keys))


def test_keys_that_a_mask_hides_are_not_read():
    """As of a static cache, most of which is empty."""
    mask = torch.zeros(1, 1, 1, 4096, dtype=torch.bool)
    mask[..., :100] = True
    spec = Spec([(1, 4096)], (64, 64), torch.float16, heads=(8, 2), mask=mask, poison=0.0)
    call = draw(spec)
    result, (first, *_) = served(call.problem)
    call.check(result)
    variant = next(decode.variants(call.problem))
    assert first.counters["matrix_products"] == products_needed(call.problem, variant, 100)
    assert first.counters["device_bytes_read"] < 4096 * 64 * 2 * 2 / 2


def test_up_to_the_default_of_few_queries_no_more_is_multiplied_and_read_than_by_the_tiled_kernel():
    """`few.DEFAULT`: with twice as many queries more is read."""
    for queries, more in ((few_queries.DEFAULT, False), (2 * few_queries.DEFAULT, True)):
        p = draw(Spec([(queries, 512)], (64, 64), torch.float16, heads=(4, 1))).problem
        with observe() as launched:
            decode.run(dataclasses.replace(p, num_splits=1), next(decode.variants(p)))
            launch.run(p, simdgroup.FORWARD, simdgroup.default(2, 64, 64)._replace(staged=True))
        mine, tiled = (launch.counters for launch in launched)
        assert mine["matrix_products"] == tiled["matrix_products"]
        assert (mine["device_bytes_read"] > tiled["device_bytes_read"]) == more


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("storage", ["cache", "paged-cache", "packed-cache"])
def test_with_one_split_a_sequence_does_not_depend_on_its_batch(storage):
    lengths = [(3, 700), (3, 65), (3, 0), (3, 3000)]
    if storage == "packed-cache":
        lengths = [(1, 700), (40, 65), (0, 5), (3, 1500)]
    spec = Spec(lengths, (64, 64), torch.float16, storage, (8, 2), (-1, 0), poison=0.0)
    p = dataclasses.replace(draw(spec).problem, num_splits=1)
    whole = dispatch.attention(p)
    for b in range(len(lengths)):
        alone = dispatch.attention(one_of(p, b, lengths))
        rows = slice(None) if p.cu_seqlens_q is None else slice(*p.cu_seqlens_q[b : b + 2].tolist())
        out, lse = (whole.out[b], whole.lse[b]) if p.cu_seqlens_q is None else (whole.out[rows], whole.lse[:, rows])
        if alone is not None and out.numel():
            assert torch.equal(bits(alone.out.reshape(out.shape)), bits(out))
            assert torch.equal(bits(alone.lse.reshape(lse.shape)), bits(lse))


def one_of(p, b, lengths):
    """Sequence b of `p` as a batch of its own."""
    queries, keys = lengths[b]
    own = {"batch": 1, "max_seqlen_q": queries, "max_seqlen_k": max(keys, 1), "seqused_k": p.seqused_k[b : b + 1]}
    for name in ("kv_batch_idx", "leftpad_k", "block_table"):
        value = getattr(p, name)
        own[name] = None if value is None else value[b : b + 1]
    if p.cu_seqlens_q is None:
        return dataclasses.replace(p, q=p.q[b : b + 1], **own)
    start, end = p.cu_seqlens_q[b : b + 2].tolist()
    return dataclasses.replace(p, q=p.q[start:end], cu_seqlens_q=int32([0, queries]), **own)


@pytest.mark.parametrize(
    ("groups", "rounds", "places", "expected"),
    [
        (1, 1, 20, 1),  # nothing to divide
        (1, 1000, 20, 20),
        (8, 1000, 20, 5),  # two turns of 20
        (16, 1000, 20, 1),  # nearly full
        (30, 1000, 20, 2),  # three turns of half the work, not two of the whole
        (3, 2, 20, 1),  # a second launch costs more
        (3, 8, 20, 4),  # the fifth to seventh shorten no threadgroup
        (64, 9, 20, 1),
        (1, 1000, 1000, 125),
    ],
)
def test_as_many_splits_as_fill_the_gpu(groups, rounds, places, expected):
    assert decode.cheapest(groups, rounds, places, 64, 64) == expected


def test_splits_whose_results_cost_more_than_they_save_are_not_made():
    counts = [decode.cheapest(4, 64, 528, 32, beside) for beside in (0, 64, 1000, 10000)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 32
    assert counts[-1] < 16


def few(batch=1, queries=1, keys=4096, dim=64, **fields):
    q, k = torch.zeros(batch, queries, 8, dim), torch.zeros(1, 1, 2, dim).expand(batch, keys, 2, dim)
    return AttentionProblem(q, k, k, batch, queries, keys, 1.0, **fields)


def test_a_batch_that_fills_the_gpu_takes_one_launch_and_no_memory_beside_the_output(monkeypatch):
    entries = []
    monkeypatch.setattr(compiler, "kernel", lambda s: entries.append(s.kernel.entry) or (lambda *_, **__: None))
    decode.TIER.run(few(batch=64))
    assert entries == ["attention_decode"]
    decode.TIER.run(few())
    assert entries[1:] == ["attention_decode", "attention_combine"]


def test_more_cores_more_splits(monkeypatch):
    variant = next(decode.variants(few()))
    counts = []
    for cores in (8, 40):
        monkeypatch.setattr(gpu, "cores", lambda cores=cores: cores)
        counts.append(decode.splits_of(few(keys=65536), variant))
    assert counts == [16, 79]
    assert decode.splits_of(few(keys=65536, num_splits=3), variant) == 3
    rounds = -(-300 // (variant.units * variant.keys))
    assert decode.splits_of(few(keys=300, num_splits=100), variant) == rounds


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (few(), None),
        (few(queries=32), None),
        (few(queries=33), "more than 32 queries"),
        (few(keys=64), "less than 65 keys"),
        (few(keys=64, num_splits=1), None),
        (few(queries=100, dim=264), None),
        (few(dim=520), "head_dim above 512"),
    ],
)
def test_the_tiled_kernel_computes_the_rest(p, reason):
    reasons = decode.TIER.unsupported_reasons(p)
    assert (reasons == []) == (reason is None)
    assert reason is None or reason in reasons[0]


def test_many_queries_of_a_wide_head_are_served():
    """No other kernel has head dims above 256."""
    call = draw(Spec([(70, 90), (70, 40)], (320, 264), torch.float16, "cache", (4, 2), (-1, 0)))
    result, launched = served(call.problem)
    call.check(result)
    assert {launch.kernel for launch in launched} <= {"attention_decode", "attention_combine"}


def test_a_shape_that_does_not_compile_leaves_the_next_one(monkeypatch):
    """As on a GPU whose pipelines have fewer threads than the first shape."""
    call = draw(Spec([(2, 500)], (64, 64), torch.float16, heads=(4, 2)))
    first, second, *_ = decode.variants(call.problem)
    assert second.simdgroups < first.simdgroups
    real = compiler.kernel
    monkeypatch.setattr(compiler, "kernel", lambda s: None if s.variant == first else real(s))
    result, _ = served(call.problem)
    call.check(result)
