"""The FlashAttention-3 functions: their argument order, seqused, page_table and upstream's newest return convention."""

import pytest
import torch

from flash_attn_mps import checks
from flash_attn_mps.frontends import fa3_private
from flash_attn_mps.frontends.fa3 import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

from . import oracle
from .layouts import randn, random_dout
from .pairwise import case_id, pairwise
from .rule import assert_lse, assert_within_rule, verify
from .test_dense import DTYPES, MASKS
from .test_varlen import cumulative, paged

DENSE_CASES = pairwise(
    lengths=[(1, 1), (1, 113), (64, 113), (113, 64), (7, 7)],
    dims=[(64, 64), (192, 128), (64, 512), (40, 40)],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    scale=[None, 0.25],
    chunk=[0, 1, 16, 50],
    qv=[False, True],
    hints=[{}, {"num_splits": 2, "pack_gqa": True, "sm_margin": 4, "deterministic": True}],
    probs=[False, True],
)


@pytest.mark.parametrize("case", DENSE_CASES, ids=case_id)
def test_dense(case):
    (seqlen_q, seqlen_k), (dim, dim_v), (heads, heads_k) = case["lengths"], case["dims"], case["heads"]
    rules = {**MASKS[case["mask"]], "softcap": case["softcap"], "softmax_scale": case["scale"]}
    rules["attention_chunk"] = case["chunk"]
    tensors = {
        "q": randn(2, seqlen_q, heads, dim, dtype=case["dtype"]),
        "k": randn(2, seqlen_k, heads_k, dim, dtype=case["dtype"]),
        "qv": randn(2, seqlen_q, heads, dim_v, dtype=case["dtype"]) / 4,
        "v": randn(2, seqlen_k, heads_k, dim_v, dtype=case["dtype"]),
    }
    if not case["qv"]:
        del tensors["qv"]

    def call(q, k, *qv_and_v):
        *qv, v = qv_and_v
        qv = qv[0] if qv else None
        return flash_attn_func(q, k, v, qv=qv, return_attn_probs=case["probs"], **rules, **case["hints"])

    def reference(q, k, *qv_and_v):
        *qv, v = qv_and_v
        return oracle.dense(q, k, v, *qv, **rules)

    result = verify(call, reference, tensors, dout=random_dout("contiguous"))
    if case["probs"]:
        assert isinstance(result, tuple)
        assert len(result) == 2
    else:
        assert isinstance(result, torch.Tensor)


def test_dense_by_position():
    """(q, k, v, softmax_scale, causal): no dropout_p in between."""
    verify(
        lambda *qkv: flash_attn_func(*qkv, 0.3, True),
        lambda *qkv: oracle.dense(*qkv, softmax_scale=0.3, causal=True),
        {name: randn(1, 20, 2, 16, dtype=torch.float32) for name in "qkv"},
        dout=random_dout("contiguous"),
    )


VARLEN_CASES = pairwise(
    used=[(None, None), ([3, 12, 0], None), (None, [20, 0, 4]), ([1, 10, 7], [20, 12, 1])],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    dims=[(64, 64), (64, 96)],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    chunk=[0, 3, 8],
    probs=[False, True],
    poison=[False, True],
)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=case_id)
def test_varlen(case):
    """Tokens beyond seqused_q get zeros and no gradient; tokens beyond seqused_k, NaN or not, are never read."""
    lengths_q, lengths_k = [5, 12, 7], [20, 14, 4]
    (used_q, used_k), (dim, dim_v), (heads, heads_k) = case["used"], case["dims"], case["heads"]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    tensors = {
        "q": randn(24, heads, dim, dtype=case["dtype"]),
        "k": randn(38, heads_k, dim, dtype=case["dtype"]),
        "v": randn(38, heads_k, dim_v, dtype=case["dtype"]),
    }
    if case["poison"]:
        for name, used, starts in (("q", used_q, cu_q), ("k", used_k, cu_k), ("v", used_k, cu_k)):
            for b in range(3 if used is not None else 0):
                tensors[name][int(starts[b]) + used[b] : int(starts[b + 1])] = float("nan")
    used = {
        "seqused_q": None if used_q is None else torch.tensor(used_q, dtype=torch.int32),
        "seqused_k": None if used_k is None else torch.tensor(used_k, dtype=torch.int32),
    }
    rules = {**MASKS[case["mask"]], "softcap": case["softcap"], "attention_chunk": case["chunk"], **used}

    def reference(q, k, v):
        return oracle.varlen(q, k, v, cu_q, cu_k, **rules)

    result = verify(
        lambda *qkv: flash_attn_varlen_func(*qkv, cu_q, cu_k, 12, 20, return_attn_probs=case["probs"], **rules),
        reference,
        tensors,
        dout=random_dout("contiguous"),
    )
    assert isinstance(result, tuple) == case["probs"]
    assert not case["probs"] or len(result) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_kvcache(dtype, causal):
    q = randn(2, 4, 4, 64, dtype=dtype)
    k_cache, v_cache = randn(2, 40, 2, 64, dtype=dtype), randn(2, 40, 2, 32, dtype=dtype)
    k, v = randn(2, 4, 2, 64, dtype=dtype), randn(2, 4, 2, 32, dtype=dtype)
    call = {"cache_seqlens": torch.tensor([10, 36], dtype=torch.int32), "causal": causal}
    call["cache_leftpad"] = torch.tensor([2, 0], dtype=torch.int32)
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), k.double(), v.double(), **call)
    plain = oracle.kvcache(q, k_cache, v_cache, k, v, **call)
    copies = k_cache.clone(), v_cache.clone()
    out, lse, *_ = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, return_softmax_lse=True, **call)
    assert_within_rule("out", out, plain.out, exact.out)
    assert_lse(lse, exact.lse)
    assert torch.equal(k_cache, plain.k_cache)
    assert torch.equal(v_cache, plain.v_cache)
    assert torch.equal(flash_attn_with_kvcache(q, *copies, k, v, **call), out)


@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("with_qv", [False, True])
@pytest.mark.parametrize("chunk", [0, 7, 64])
def test_kvcache_chunks_and_qv(chunk, with_qv, leftpad):
    q, qv = randn(3, 4, 4, 64, dtype=torch.float32), randn(3, 4, 4, 32, dtype=torch.float32)
    k_cache, v_cache = randn(3, 40, 2, 64, dtype=torch.float32), randn(3, 40, 2, 32, dtype=torch.float32)
    call = {"cache_seqlens": torch.tensor([10, 36, 3], dtype=torch.int32), "attention_chunk": chunk, "causal": True}
    if leftpad:
        call["cache_leftpad"] = torch.tensor([2, 0, 1], dtype=torch.int32)
    exact_qv = qv.double() if with_qv else None
    exact = oracle.kvcache(q.double(), k_cache.double(), v_cache.double(), qv=exact_qv, **call)
    out, lse, *_ = flash_attn_with_kvcache(
        q, k_cache, v_cache, qv=qv if with_qv else None, return_softmax_lse=True, **call
    )
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-5, atol=1e-5)
    assert_lse(lse, exact.lse)


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_varlen_qv(mask):
    cu_q, cu_k = cumulative([5, 12, 0]), cumulative([20, 4, 7])
    verify(
        lambda q, k, qv, v: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 12, 20, qv=qv, return_attn_probs=True, **MASKS[mask]
        ),
        lambda q, k, qv, v: oracle.varlen(q, k, v, cu_q, cu_k, qv=qv, **MASKS[mask]),
        {
            "q": randn(17, 4, 64, dtype=torch.float16),
            "k": randn(31, 2, 64, dtype=torch.float16),
            "qv": randn(17, 4, 32, dtype=torch.float16),
            "v": randn(31, 2, 32, dtype=torch.float16),
        },
        dout=random_dout("contiguous"),
    )


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_kvcache_page_table(page_size):
    lengths = [70, 13]
    k, v = (randn(83, 2, 32, dtype=torch.bfloat16) for _ in range(2))
    (k_pages, table), (v_pages, _) = paged(k, lengths, page_size), paged(v, lengths, page_size)
    q = randn(2, 3, 4, 32, dtype=torch.bfloat16)
    rules = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "causal": True}
    exact = oracle.kvcache(q.double(), k_pages.double(), v_pages.double(), block_table=table, **rules)
    plain = oracle.kvcache(q, k_pages, v_pages, block_table=table, **rules)
    out = flash_attn_with_kvcache(q, k_pages, v_pages, page_table=table, **rules)
    assert_within_rule("out", out, plain.out, exact.out)


PACKED_CASES = pairwise(
    where=["rows", "pages"],
    entries=[False, True],
    leftpad=[False, True],
    seqlens=["tensor", "int"],
    new=[None, [3, 4], [0, 8]],
    rotary=[False, True],
    rotary_seqlens=[None, [0, 30]],
    mask=["none", "causal", "left"],
    chunk=[0, 7],
    used=[None, [2, 0], [5, 1]],
)


@pytest.mark.parametrize("case", PACKED_CASES, ids=case_id)
def test_kvcache_of_packed_queries(case):
    packed_queries_against_the_oracle(case)


@pytest.mark.parametrize("seqlens", ["tensor", "int"])
@pytest.mark.parametrize("rotary_seqlens", [None, [0, 30]])
@pytest.mark.parametrize("where", ["rows", "pages"])
def test_packed_queries_that_see_all_rotate_by_the_place_of_their_sequence(where, rotary_seqlens, seqlens):
    case = {"where": where, "rotary_seqlens": rotary_seqlens, "seqlens": seqlens, "new": [3, 4], "rotary": True}
    packed_queries_against_the_oracle(dict(PACKED_CASES[0], **case, mask="none", chunk=0, used=None))


def packed_queries_against_the_oracle(case):
    """cu_seqlens_q, cu_seqlens_k_new: each sequence as if alone. The rotary table is as long as the cache.

    rotary_seqlens, where the rotation begins, has no effect without a table. used: seqused_q, which the private
    function alone has.
    """
    lengths_q, lengths_new, room = [5, 2], case["new"], 48
    used = lengths_q if case["used"] is None else case["used"]
    slots = [2, 0] if case["entries"] else [0, 1]
    table = torch.tensor([[5, 0, 3], [1, 4, 2], [8, 6, 7]], dtype=torch.int32) if case["where"] == "pages" else None
    shape = (9, 16) if case["where"] == "pages" else (3 if case["entries"] else 2, room)
    k_cache, v_cache = randn(*shape, 2, 32, dtype=torch.float32), randn(*shape, 2, 32, dtype=torch.float32)
    q = randn(7, 4, 32, dtype=torch.float32)
    cached = [11, 40] if case["seqlens"] == "tensor" else [20, 20]

    how = {**MASKS[case["mask"]], "attention_chunk": case["chunk"]}
    left, right = how.pop("window_size", (-1, -1))
    call = {"cu_seqlens_q": cumulative(lengths_q), "max_seqlen_q": 5, "page_table": table}
    call["seqused_k"] = torch.tensor(cached, dtype=torch.int32) if case["seqlens"] == "tensor" else 20
    each = [{"cache_seqlens": n, "window_size": (left, right), **how} for n in cached]
    for b, alone in enumerate(each):
        alone["cache_batch_idx"], alone["block_table"] = torch.tensor([slots[b]]), table
    if table is not None and not case["entries"]:
        call["page_table"] = table[:2]
    if case["entries"]:
        call["kv_batch_idx"] = torch.tensor(slots, dtype=torch.int32)
    if case["leftpad"]:
        call["leftpad_k"] = torch.tensor([3, 20], dtype=torch.int32)
        for alone, row in zip(each, call["leftpad_k"], strict=True):
            alone["cache_leftpad"] = row[None]
    if case["used"] is not None:
        call["seqused_q"] = torch.tensor(used, dtype=torch.int32)
    if case["rotary_seqlens"] is not None:
        call["seqlens_rotary"] = torch.tensor(case["rotary_seqlens"], dtype=torch.int32)
    if lengths_new is not None:
        new = {name: randn(sum(lengths_new), 2, 32, dtype=torch.float32) for name in ("k", "v")}
        call |= {f"{name}_new": value for name, value in new.items()}
        call["cu_seqlens_k_new"] = cumulative(lengths_new)
        for b, alone in enumerate(each):
            rows = slice(sum(lengths_new[:b]), sum(lengths_new[: b + 1]))
            alone |= {name: value[None, rows].double() for name, value in new.items()}
        if case["rotary"]:
            angles = torch.arange(room)[:, None] * 0.5 ** torch.arange(16)
            call |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
            for b, alone in enumerate(each):
                alone |= {"rotary_cos": angles.cos().double(), "rotary_sin": angles.sin().double()}
                if case["rotary_seqlens"] is not None:
                    alone["rotary_seqlens"] = call["seqlens_rotary"][b : b + 1]

    out_exact, lse_exact = torch.zeros(7, 4, 32, dtype=torch.float64), torch.full((4, 7), -torch.inf).double()
    k_exact, v_exact = k_cache.double(), v_cache.double()
    for b, alone in enumerate(each):
        rows = slice(sum(lengths_q[:b]), sum(lengths_q[:b]) + used[b])
        out, lse, k_exact, v_exact = oracle.kvcache(q[None, rows].double(), k_exact, v_exact, **alone)
        out_exact[rows], lse_exact[:, rows] = out[0], lse[0]

    if case["used"] is None:
        result = flash_attn_with_kvcache(
            q, k_cache, v_cache, window_size=(left, right), return_softmax_lse=True, **as_public(call), **how
        )
    else:
        window = {"window_size_left": left, "window_size_right": right}
        result = fa3_private._flash_attn_forward(q, k_cache, v_cache, **window, **call, **how)
    torch.testing.assert_close(result[0].double(), out_exact, rtol=1e-5, atol=1e-5)
    assert_lse(result[1], lse_exact)
    torch.testing.assert_close(k_cache.double(), k_exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(v_cache.double(), v_exact)


def as_public(call):
    """Arguments of the private function under the names of the public one."""
    names = {"seqused_k": "cache_seqlens", "kv_batch_idx": "cache_batch_idx", "leftpad_k": "cache_leftpad"}
    names |= {"seqlens_rotary": "rotary_seqlens", "k_new": "k", "v_new": "v"}
    return {names.get(name, name): value for name, value in call.items()}


def seqused_q_of_dense_queries(**call):
    """Queries beyond seqused_q, NaN here, are not looked at; their rows are zero, their log-sum-exp -inf."""
    used, lengths = [3, 0, 5], [20, 9, 2]
    q = randn(3, 5, 4, 32, dtype=torch.float32)
    for b, n in enumerate(used):
        q[b, n:] = float("nan")
    k_cache, v_cache = (randn(3, 24, 2, 32, dtype=torch.float32) for _ in range(2))
    lengths_k, lengths_q = (torch.tensor(n, dtype=torch.int32) for n in (lengths, used))
    out, lse, *_ = fa3_private._flash_attn_forward(
        q, k_cache, v_cache, seqused_q=lengths_q, seqused_k=lengths_k, **call
    )
    out_exact, lse_exact = torch.zeros(3, 5, 4, 32).double(), torch.full((3, 4, 5), -torch.inf).double()
    for b, n in enumerate(used):
        caches = k_cache[b : b + 1].double(), v_cache[b : b + 1].double()
        exact = oracle.kvcache(q[b : b + 1, :n].double(), *caches, cache_seqlens=lengths[b], **call)
        out_exact[b, :n], lse_exact[b, :, :n] = exact.out[0], exact.lse[0]
    torch.testing.assert_close(out.double(), out_exact, rtol=1e-5, atol=1e-5)
    assert_lse(lse, lse_exact)


@pytest.mark.parametrize("causal", [False, True])
def test_seqused_q_with_a_cache(causal):
    seqused_q_of_dense_queries(causal=causal)


@pytest.mark.parametrize("used", [[6, 1], [-1, 1], [1]])
def test_malformed_seqused_q_with_a_cache(used):
    q, cache = randn(2, 5, 2, 16, dtype=torch.float32), randn(2, 8, 2, 16, dtype=torch.float32)
    lengths = {"seqused_q": torch.tensor(used, dtype=torch.int32), "seqused_k": torch.tensor([8, 8]).int()}
    with pytest.raises(ValueError, match="seqused_q: got"):
        fa3_private._flash_attn_forward(q, cache, cache, **lengths)


def test_a_longest_query_that_only_the_device_knows_asks_for_no_longer_table(monkeypatch):
    """The bound of a max_seqlen_q in a tensor, the number of all queries, says nothing about positions."""
    monkeypatch.setattr(checks, "readable", lambda tensor: False)
    q, new = randn(20, 2, 16, dtype=torch.float32), randn(20, 2, 16, dtype=torch.float32)
    cache = randn(4, 12, 2, 16, dtype=torch.float32)
    cos, sin = torch.randn(2, 12, 8)
    cu = cumulative([5, 5, 5, 5])
    call = {"cu_seqlens_q": cu, "cu_seqlens_k_new": cu, "cache_seqlens": 7, "causal": True}
    outs = [
        flash_attn_with_kvcache(q, cache.clone(), cache.clone(), new, new, None, cos, sin, max_seqlen_q=n, **call)
        for n in (5, torch.tensor(5))
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("heads_k", [None, 2, 1])
def test_qkvpacked(heads_k):
    """Five dimensions, or four with the query heads first and their number given."""
    if heads_k is None:
        verify(
            lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True),
            lambda qkv: oracle.dense(*qkv.unbind(2), causal=True),
            {"qkv": randn(2, 20, 3, 4, 16, dtype=torch.float32)},
            dout=random_dout("contiguous"),
        )
        return
    verify(
        lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4),
        lambda qkv: oracle.dense(*qkv.split([4, heads_k, heads_k], dim=2), causal=True),
        {"qkv": randn(2, 20, 4 + 2 * heads_k, 16, dtype=torch.float32)},
        dout=random_dout("contiguous"),
    )


def test_combine():
    """Attention over parts of the keys merges into attention over all; a part that is not seen counts nothing."""
    q, k, v = (randn(2, s, 3, 16, dtype=torch.float32) for s in (9, 40, 40))
    outs, lses = [], []
    for part in (slice(0, 13), slice(13, 40)):
        out, lse = flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)
        outs.append(out)
        lses.append(lse.transpose(1, 2))
    outs.append(torch.zeros_like(outs[0]))
    lses.append(torch.full_like(lses[0], float("-inf")))
    out, lse = flash_attn_combine(torch.stack(outs), torch.stack(lses))
    exact = oracle.dense(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.transpose(1, 2).double(), exact.lse, rtol=1e-5, atol=1e-5)
    nothing, lse = flash_attn_combine(torch.stack(outs[2:] * 2), torch.stack(lses[2:] * 2))
    assert (nothing == 0).all()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("function", ["dense", "varlen", "kvcache"])
def test_what_only_hopper_has_is_refused_by_name(function, name):
    q, extra = randn(1, 8, 2, 16, dtype=torch.float16), {name: torch.ones(1, 2)}
    with pytest.raises(NotImplementedError, match=rf"(?<!\w){name}(?!\w)"):
        fa3(function, q, extra)


@pytest.mark.parametrize("function", ["dense", "varlen", "kvcache"])
@pytest.mark.parametrize(
    "extra",
    [
        {"attention_chunk": -1},
        {"attention_chunk": 1.5},
        {"attention_chunk": None},
        {"attention_chunk": "4"},
        {"qv": [1.0]},
        {"qv": torch.ones(3)},
        {"qv": torch.ones(1, 8, 2, 16)},  # fp32 with fp16
        {"qv": torch.ones(1, 7, 2, 16, dtype=torch.float16)},
        {"qv": torch.ones(1, 8, 2, 8, dtype=torch.float16)},
        {"qv": torch.ones(1, 8, 1, 16, dtype=torch.float16)},
        {"qv": torch.ones(1, 8, 2, 16, dtype=torch.float16, device="meta")},
    ],
    ids=range(11),
)
def test_malformed_chunks_and_qv(function, extra):
    (name,) = extra
    if function == "varlen" and isinstance(extra[name], torch.Tensor):
        extra = {name: extra[name][0]}
    with pytest.raises((ValueError, NotImplementedError), match=rf"(?<!\w){name}(?!\w)"):
        fa3(function, randn(1, 8, 2, 16, dtype=torch.float16), extra)


def test_a_malformed_call_appends_nothing():
    q, k_cache, k = (randn(1, rows, 2, 16, dtype=torch.float32) for rows in (2, 8, 2))
    before = k_cache.clone()
    with pytest.raises(ValueError, match="qv: got"):
        flash_attn_with_kvcache(q, k_cache, k_cache, k, k, qv=q[:, :1], cache_seqlens=3)
    assert torch.equal(k_cache, before)


def fa3(function, q, extra):
    """A call of that FlashAttention-3 function on q (1, 8, H, D) as queries, keys and values."""
    if function == "dense":
        return flash_attn_func(q, q, q, **extra)
    if function == "varlen":
        cu = cumulative([8])
        return flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 8, 8, **extra)
    return flash_attn_with_kvcache(q, q.clone(), q.clone(), **extra)
