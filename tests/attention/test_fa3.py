"""The FlashAttention-3 functions: their argument order, seqused, page_table and upstream's newest return convention."""

import pytest
import torch

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


@pytest.mark.parametrize("rotary_seqlens", [None, [0, 30]])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("seqlens", ["tensor", "int"])
@pytest.mark.parametrize("where", ["rows", "pages"])
def test_kvcache_of_packed_queries(where, seqlens, append, rotary_seqlens):
    """cu_seqlens_q, cu_seqlens_k_new: each sequence as if alone. rotary_seqlens: where its rotation begins."""
    lengths_q, lengths_new = [5, 2], [3, 4]
    cached = [11, 40] if seqlens == "tensor" else [20, 20]
    cache_seqlens = torch.tensor(cached, dtype=torch.int32) if seqlens == "tensor" else 20
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32) if where == "pages" else None
    shape = (6, 16) if where == "pages" else (2, 48)
    k_cache, v_cache = randn(*shape, 2, 32, dtype=torch.float32), randn(*shape, 2, 32, dtype=torch.float32)
    q = randn(7, 4, 32, dtype=torch.float32)
    call = {"causal": True, "cu_seqlens_q": cumulative(lengths_q), "max_seqlen_q": 5, "page_table": table}
    new = {}
    if append:
        new = {name: randn(7, 2, 32, dtype=torch.float32) for name in ("k", "v")}
        call |= {**new, "cu_seqlens_k_new": cumulative(lengths_new)}
        angles = torch.arange(96)[:, None] * 0.5 ** torch.arange(16)
        call |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        if rotary_seqlens is not None:
            call["rotary_seqlens"] = torch.tensor(rotary_seqlens, dtype=torch.int32)

    expected, k_exact, v_exact = [], k_cache.double(), v_cache.double()
    for b in range(2):
        rows_q = slice(sum(lengths_q[:b]), sum(lengths_q[: b + 1]))
        rows_new = slice(sum(lengths_new[:b]), sum(lengths_new[: b + 1]))
        alone = {"causal": True, "cache_seqlens": cached[b]}
        if where == "rows":
            alone["cache_batch_idx"] = torch.tensor([b])
        else:
            alone["block_table"] = table[b : b + 1]
        q_b, k_b = q[None, rows_q].double(), None
        if append:
            # Turned here, so that the rotation may begin elsewhere than the cache ends.
            begin = cached[b] if rotary_seqlens is None else rotary_seqlens[b]
            tables = angles.cos().double(), angles.sin().double()
            q_b = oracle.rotate(q_b[0], *tables, range(begin, begin + lengths_q[b]), True)[None]
            k_b = oracle.rotate(new["k"][rows_new].double(), *tables, range(begin, begin + lengths_new[b]), True)[None]
            alone["k"], alone["v"] = k_b, new["v"][None, rows_new].double()
        out, _, k_exact, v_exact = oracle.kvcache(q_b, k_exact, v_exact, **alone)
        expected.append(out[0])

    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens, **call)
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k_cache.double(), k_exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(v_cache.double(), v_exact)


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
