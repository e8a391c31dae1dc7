"""flash_attn_with_kvcache: lengths, append, rotary, pages, batch indices, left padding; also the caches afterwards."""

import pytest
import torch

from flash_attn_mps.describe import CallOptions
from flash_attn_mps.frontends.cache_call import CacheCall
from flash_attn_mps.frontends.cache_plan import describe, run
from flash_attn_mps.frontends.fa2 import flash_attn_with_kvcache

from . import oracle
from .layouts import randn
from .pairwise import case_id, pairwise
from .rule import assert_accumulated_in_fp32, assert_lse, assert_within_rule, largest, same_bits
from .test_dense import DTYPES, MASKS, alibi_slopes

BATCH, CAPACITY = 3, 96

CASES = pairwise(
    seqlen_q=[1, 5, 33],
    seqlen_new=[None, 1, 5],
    lengths=["tensor", "int", "none", "zero"],
    rotary=[None, "interleaved", "halves", "partial-interleaved", "partial-halves"],
    where=[
        "rows",
        "batch_idx",
        "leftpad",
        "batch_idx+leftpad",
        "pages16",
        "pages32",
        "pages16+batch_idx",
        "pages32+leftpad",
        "pages16+batch_idx+leftpad",
    ],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    dims=[(64, 64), (32, 32), (128, 64), (256, 256)],
    mask=["none", "causal", "left", "both", "self", "causal-left"],
    softcap=[0.0, 1.5],
    alibi=[None, "H", "BH"],
    scale=[None, 0.25],
    num_splits=[0, 1, 3],
    lse=[False, True],
    strides=["contiguous", "transposed", "packed"],
)


def rotary_tables(length, dim, dtype):
    angles = torch.arange(length)[:, None] * 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def build(case):
    """q and the caches, what the oracle needs, and the beginning and end of the valid tokens of each sequence."""
    (heads, heads_k), (dim, dim_v), dtype = case["heads"], case["dims"], case["dtype"]
    q = randn(BATCH, case["seqlen_q"], heads, dim, dtype=dtype, layout=case["strides"])
    call = {**MASKS[case["mask"]], "softcap": case["softcap"], "softmax_scale": case["scale"]}
    call["alibi_slopes"] = alibi_slopes(case["alibi"], BATCH, heads)

    new = case["seqlen_new"]
    lengths = {"tensor": [40, 7, 64], "int": [50] * 3, "none": [CAPACITY] * 3, "zero": [0, 13, 0]}[case["lengths"]]
    if new is not None and case["lengths"] == "none":  # an append says where
        lengths = [CAPACITY - new] * 3
        call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    elif case["lengths"] == "int":
        call["cache_seqlens"] = 50
    elif case["lengths"] != "none":
        call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)

    if new is not None:
        call["k"] = randn(BATCH, new, heads_k, dim, dtype=dtype, layout=case["strides"])
        call["v"] = randn(BATCH, new, heads_k, dim_v, dtype=dtype, layout=case["strides"])
        if case["rotary"] is not None:
            turned = dim // 2 if case["rotary"].startswith("partial") else dim
            call["rotary_cos"], call["rotary_sin"] = rotary_tables(CAPACITY + 33, turned, dtype)
            call["rotary_interleaved"] = case["rotary"].endswith("interleaved")

    where = case["where"]
    entries = BATCH + 2 if "batch_idx" in where else BATCH
    shape = (entries, CAPACITY)
    if where.startswith("pages"):
        page_size = int(where.partition("+")[0].removeprefix("pages"))
        blocks = CAPACITY // page_size
        order = torch.randperm(entries * blocks + 2, generator=torch.Generator().manual_seed(2))
        call["block_table"] = order[: entries * blocks].view(entries, blocks).to(torch.int32)
        shape = (entries * blocks + 2, page_size)
    if "batch_idx" in where:
        call["cache_batch_idx"] = torch.tensor([3, 0, 4], dtype=torch.int32)
    if "leftpad" in where:
        call["cache_leftpad"] = torch.tensor(
            [min(at, n) for at, n in zip((21, 2, 0), lengths, strict=True)], dtype=torch.int32
        )
    k_cache = randn(*shape, heads_k, dim, dtype=dtype, layout=case["strides"])
    v_cache = randn(*shape, heads_k, dim_v, dtype=dtype, layout=case["strides"])
    return q, k_cache, v_cache, call, lengths


def in_double(call):
    wide = {}
    for name, value in call.items():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        wide[name] = value.double() if floating else value
    return wide


def poison_beyond(cache, call, lengths, new):
    """NaN where no sequence is: beyond the ends, before the begins, in rows and pages that nobody reads."""
    kept = torch.zeros(cache.shape[:2], dtype=torch.bool)
    table = call.get("block_table")
    for b, length in enumerate(lengths):
        begin = int(call["cache_leftpad"][b]) if "cache_leftpad" in call else 0
        row = int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b
        for t in range(begin, length + new):
            if table is None:
                kept[row, t] = True
            else:
                kept[int(table[row, t // cache.shape[1]]), t % cache.shape[1]] = True
    cache[~kept] = float("nan")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case):
    q, k_cache, v_cache, call, lengths = build(case)
    for cache in (k_cache, v_cache):
        poison_beyond(cache, call, lengths, case["seqlen_new"] or 0)
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **in_double(call))
    plain = oracle.kvcache(q, k_cache, v_cache, **call)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    q_before = q.clone()

    result = flash_attn_with_kvcache(
        q, k_cache, v_cache, **call, num_splits=case["num_splits"], return_softmax_lse=case["lse"]
    )

    assert isinstance(result, tuple) == case["lse"]
    out = result[0] if case["lse"] else result
    assert out.is_contiguous()
    assert_within_rule("out", out, plain.out, exact.out)
    if "rotary_cos" not in call:
        assert_accumulated_in_fp32(out, exact.out, torch.nan_to_num(exact.v_cache).to(v_cache.dtype))
        if case["lse"]:
            assert len(result) == 2
            assert_lse(result[1], exact.lse)
    for name, cache, cache_plain, cache_exact in (
        ("k_cache", k_cache, plain.k_cache, exact.k_cache),
        ("v_cache", v_cache, plain.v_cache, exact.v_cache),
    ):
        assert torch.equal(cache.isnan(), cache_exact.isnan()), f"{name}: written outside of its sequence"
        assert_within_rule(name, *(torch.nan_to_num(x) for x in (cache, cache_plain, cache_exact)))
    if "rotary_cos" not in call:
        assert same_bits(k_cache, plain.k_cache)
    assert same_bits(v_cache, plain.v_cache)
    assert torch.equal(q, q_before)
    for name, value in before.items():
        assert torch.equal(call[name], value), f"{name} was changed"


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary_turns_in_fp32(interleaved, causal):
    """Keys in the cache are off by no more than one rounding."""
    case = dict(CASES[0], seqlen_q=5, seqlen_new=5, lengths="tensor", where="rows", dtype=torch.bfloat16)
    case.update(rotary="interleaved" if interleaved else "halves", mask="causal" if causal else "none")
    q, k_cache, v_cache, call, _ = build(case)
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **in_double(call))
    flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((k_cache.double() - exact.k_cache).abs() <= half_ulp * exact.k_cache.abs() * 1.001 + 1e-6).all()


def test_decoding_step_by_step_equals_prefill():
    """Forty appended tokens, one a call, give what one causal call over all gives."""
    from flash_attn_mps.frontends.fa2 import flash_attn_func

    q, k, v = (randn(2, 40, h, 32, dtype=torch.float32) for h in (4, 2, 2))
    k_cache, v_cache = torch.zeros(2, 64, 2, 32), torch.zeros(2, 64, 2, 32)
    steps = []
    lengths = torch.zeros(2, dtype=torch.int32)
    for t in range(40):
        now = slice(t, t + 1)
        steps.append(
            flash_attn_with_kvcache(
                q[:, now], k_cache, v_cache, k[:, now], v[:, now], cache_seqlens=lengths, causal=True
            )
        )
        lengths += 1
    assert torch.equal(k_cache[:, :40], k)
    assert torch.equal(v_cache[:, :40], v)
    assert not k_cache[:, 40:].any()
    torch.testing.assert_close(torch.cat(steps, dim=1), flash_attn_func(q, k, v, causal=True), rtol=1e-5, atol=1e-5)


def test_pages_of_256():
    """The one page size that FlashAttention-2 on CUDA takes, and a call as nano-vllm makes it."""
    k_cache, v_cache = (randn(5, 256, 2, 64, dtype=torch.float16) for _ in range(2))
    q = randn(2, 1, 4, 64, dtype=torch.float16)
    call = {
        "cache_seqlens": torch.tensor([300, 256], dtype=torch.int32),
        "block_table": torch.tensor([[4, 1], [0, 0]], dtype=torch.int32),
        "softmax_scale": 0.125,
        "causal": True,
    }
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **call)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    assert_within_rule("out", out, oracle.kvcache(q, k_cache, v_cache, **call).out, exact.out)


def test_negative_entries_of_unused_pages():
    """Serving code fills the table's unused entries with -1."""
    k_cache, v_cache = (randn(4, 16, 2, 32, dtype=torch.float32) for _ in range(2))
    q = randn(2, 1, 2, 32, dtype=torch.float32)
    lengths = torch.tensor([20, 9], dtype=torch.int32)
    full = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32)
    holes = torch.tensor([[3, 1, -1], [2, -1, -1]], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=holes)
    assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=full))


@pytest.mark.parametrize("append", [False, True])
def test_pages_in_front_of_a_sequence_are_not_looked_at(append):
    """Pages that left padding fills need not exist, nor those of entries that no sequence uses; the others must."""
    k_cache, v_cache = (randn(6, 4, 2, 32, dtype=torch.float32) for _ in range(2))
    q, new = randn(2, 2, 2, 32, dtype=torch.float32), randn(2, 2, 2, 32, dtype=torch.float32)
    holes = torch.tensor([[-1, -1, -1, -1], [-1, 5, 3, -1], [-1, -1, 2, 0]], dtype=torch.int32)
    call = {
        "cache_seqlens": torch.tensor([10, 9], dtype=torch.int32),
        "cache_leftpad": torch.tensor([8, 6], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([2, 1], dtype=torch.int32),
        "causal": True,
    }
    if append:
        call |= {"k": new, "v": new}
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), block_table=holes, **in_double(call))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, block_table=holes, **call)
    assert largest(out - exact.out) < 1e-5
    assert torch.equal(k_cache, exact.k_cache.float())
    with pytest.raises(ValueError, match=r"block_table: got values from -1"):
        call["cache_leftpad"] = torch.tensor([8, 3], dtype=torch.int32)
        flash_attn_with_kvcache(q, k_cache, v_cache, block_table=holes, **call)


def test_padding_alone_needs_no_page():
    """cache_leftpad == cache_seqlens: the sequence has no key, and none of its pages is looked at."""
    pages, q = randn(2, 4, 2, 32, dtype=torch.float32), randn(1, 2, 2, 32, dtype=torch.float32)
    five = torch.tensor([5], dtype=torch.int32)
    table = torch.full((1, 2), -1, dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q, pages, pages, cache_seqlens=five, cache_leftpad=five, block_table=table, return_softmax_lse=True
    )
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_no_sequences_in_pages():
    pages, none = randn(2, 4, 2, 32, dtype=torch.float32), torch.zeros(0, dtype=torch.int32)
    out = flash_attn_with_kvcache(
        pages[:0], pages, pages, cache_seqlens=none, cache_leftpad=none, block_table=torch.zeros(0, 2).int()
    )
    assert out.shape == (0, 4, 2, 32)


def test_one_row_of_the_table_for_many_sequences():
    """As in beam search: the sequences share their pages, and the table has rows that nobody uses."""
    k_cache, v_cache = (randn(6, 8, 2, 16, dtype=torch.float32) for _ in range(2))
    q = randn(3, 2, 4, 16, dtype=torch.float32)
    table = torch.tensor([[5, 0, 1], [3, 4, 2]], dtype=torch.int32)
    call = {"cache_batch_idx": torch.tensor([1, 1, 0], dtype=torch.int32), "cache_seqlens": 20, "block_table": table}
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **call)
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True, **call)
    assert largest(out - exact.out) < 1e-5
    assert_lse(lse, exact.lse)


def test_five_positional_arguments():
    """transformers calls (q, k_cache, v_cache, k, v, ...) and reads the cache afterwards."""
    k_cache, v_cache = torch.zeros(1, 8, 1, 16), torch.zeros(1, 8, 1, 16)
    q, k, v = (randn(1, 3, 1, 16, dtype=torch.float32) for _ in range(3))
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.zeros(1, dtype=torch.int32), causal=True
    )
    torch.testing.assert_close(out, oracle.dense(q, k, v, causal=True).out)
    assert torch.equal(k_cache[:, :3], k)


def test_append_through_a_view():
    """A layer's cache is often a slice of one large tensor: the append lands there and nowhere else."""
    whole = torch.zeros(2, 4, 2, 16, 2, 8)  # (k or v, layer, B, S, H, D)
    k_cache, v_cache = whole[0, 2], whole[1, 2]
    q, k, v = (randn(2, 1, 2, 8, dtype=torch.float32) for _ in range(3))
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor([3, 7], dtype=torch.int32))
    expected = torch.zeros_like(whole)
    expected[0, 2, 0, 3], expected[0, 2, 1, 7] = k[0, 0], k[1, 0]
    expected[1, 2, 0, 3], expected[1, 2, 1, 7] = v[0, 0], v[1, 0]
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("where", ["rows", "pages16"])
def test_a_plan_is_carried_out_by_run_alone(where):
    """Describing a call writes nothing; running the plan does what the function does."""
    case = dict(CASES[0], seqlen_q=2, seqlen_new=2, lengths="tensor", where=where, rotary="halves", mask="causal")
    q, k_cache, v_cache, call, _ = build(case)
    mask = {name: call.pop(name) for name in ("causal", "window_size") if name in call}
    rules = {name: call.pop(name) for name in ("softcap", "softmax_scale", "alibi_slopes")}
    copies = k_cache.clone(), v_cache.clone()
    plan = describe(CacheCall(q, *copies, CallOptions(**mask, **rules), **call))
    assert same_bits(copies[0], k_cache)
    assert same_bits(copies[1], v_cache)
    with pytest.raises(AttributeError):
        plan.rotary = None
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, **call, **mask, **rules)
    assert same_bits(run(plan).out, expected)
    assert same_bits(copies[0], k_cache)
    assert same_bits(copies[1], v_cache)


def test_one_cache_row_for_many_sequences():
    """cache_batch_idx need not be distinct when nothing is appended."""
    k_cache, v_cache = (randn(2, 24, 2, 16, dtype=torch.float32) for _ in range(2))
    q = randn(3, 2, 4, 16, dtype=torch.float32)
    call = {"cache_batch_idx": torch.tensor([1, 1, 0], dtype=torch.int32), "cache_seqlens": 20, "causal": True}
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), **call)
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True, **call)
    assert largest(out - exact.out) < 1e-5
    assert_lse(lse, exact.lse)
