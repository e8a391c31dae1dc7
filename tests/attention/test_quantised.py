"""Quantised caches in flash_attn_with_kvcache: values, what appending leaves in the caches, refusals, graphs."""

import pytest
import torch

from flash_attn_mps import quantised
from flash_attn_mps.frontends import fa2, fa3, fa3_private
from tests.compiled import compiled

from . import oracle
from .layouts import randn
from .pairwise import case_id, pairwise
from .rule import assert_accumulated_in_fp32, assert_lse, assert_within_rule

CODES = (torch.float8_e4m3fn, torch.uint8, torch.float8_e5m2, torch.int8)
BATCH, ROOM, PAGE = 2, 48, 16
CASES = pairwise(
    codes=CODES,
    dtype=(torch.float16, torch.bfloat16, torch.float32),
    where=("rows", "batch_idx", "pages", "pages+batch_idx"),
    new=(0, 1, 5),
    seqlen_q=(1, 5),
    heads=((2, 2), (6, 2)),
    dims=((64, 64), (32, 40)),
    causal=(True, False),
    descales=("both", "k", "none"),
)


def floats(codes):
    """What codes stand for, in float64, by torch."""
    return (codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes).double()


def nearest(x, descale, dtype):
    """The codes of x / descale, by torch's own conversions."""
    x = (x.float() / descale).float()
    if dtype == torch.int8:
        return x.round().clamp(-128, 127).to(dtype)
    dtype = torch.float8_e4m3fn if dtype == torch.uint8 else dtype
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def build(case):
    (heads, heads_k), dims, codes = case["heads"], case["dims"], case["codes"]
    q = randn(BATCH, case["seqlen_q"], heads, dims[0], dtype=case["dtype"])
    call = {"cache_seqlens": torch.tensor([30, 7], dtype=torch.int32), "causal": case["causal"]}
    entries = BATCH + 1 if "batch_idx" in case["where"] else BATCH
    shape = (entries, ROOM)
    if case["where"].startswith("pages"):
        call["page_table"] = torch.randperm(entries * ROOM // PAGE).view(entries, -1).to(torch.int32)
        shape = (entries * ROOM // PAGE, PAGE)
    if "batch_idx" in case["where"]:
        call["cache_batch_idx"] = torch.tensor([2, 0], dtype=torch.int32)
    unit = 1 / 30 if codes == torch.int8 else 1.0
    caches = [nearest(torch.randn(*shape, heads_k, d), torch.tensor(unit), codes).view(codes) for d in dims]
    names = {"both": ("k_descale", "v_descale"), "k": ("k_descale",), "none": ()}[case["descales"]]
    call |= {name: unit * (0.5 + torch.rand(BATCH, heads_k)) for name in names}
    if case["new"]:
        call["k"], call["v"] = (randn(BATCH, case["new"], heads_k, d, dtype=case["dtype"]) for d in dims)
    return q, *caches, call


def rows_of(cache, call, sequence, first, last):
    """Indices of a sequence's rows in the first two dimensions of the cache."""
    entry = sequence if call.get("cache_batch_idx") is None else int(call["cache_batch_idx"][sequence])
    rows = torch.arange(first, last)
    if call.get("page_table") is None:
        return torch.full_like(rows, entry), rows
    return call["page_table"][entry].long()[rows // PAGE], rows % PAGE


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case):
    q, k_cache, v_cache, call = build(case)
    ones = torch.ones(BATCH, k_cache.shape[2])
    descales = [call.get(name, ones) for name in ("k_descale", "v_descale")]
    expected = [k_cache.view(torch.uint8).clone(), v_cache.view(torch.uint8).clone()]
    for b, length in enumerate(call["cache_seqlens"].tolist() if case["new"] else ()):
        for codes, new, descale in zip(expected, (call["k"], call["v"]), descales, strict=True):
            at = rows_of(k_cache, call, b, length, length + case["new"])
            codes[at] = nearest(new[b], descale[b, :, None], case["codes"]).view(torch.uint8)

    out, lse, *_ = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call, return_softmax_lse=True)

    for cache, codes in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), codes)
    for b, length in enumerate(call["cache_seqlens"].tolist()):
        at = rows_of(k_cache, call, b, 0, length + case["new"])
        k, v = (floats(x[at]) * d[b, :, None].double() for x, d in zip((k_cache, v_cache), descales, strict=True))
        how = {"window_size": (-1, 0 if case["causal"] else -1)}
        exact = oracle.one_sequence(q[b].double(), k, v, **how)
        plain = oracle.one_sequence(q[b], k.to(q.dtype), v.to(q.dtype), **how)
        assert_within_rule("out", out[b], plain[0], exact[0])
        assert_accumulated_in_fp32(out[b], exact[0], v.to(q.dtype))
        assert_lse(lse[b], exact[1])


def test_formats_are_read_and_written_as_torch_does():
    for codes in CODES[2:] + CODES[:1]:
        every = torch.arange(256).to(torch.uint8).view(codes)
        values = quantised.decoded(every)
        assert torch.equal(values.nan_to_num(1e9, 2e9, -2e9), every.float().nan_to_num(1e9, 2e9, -2e9))
        finite = values[values.isfinite()].unique()
        ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
        x = torch.cat([finite, ties, torch.randn(20_000) * torch.randn(20_000).mul(4).exp(), finite.new_tensor([1e30])])
        x = torch.cat([x, x.nextafter(finite.new_tensor(1e38)), x.nextafter(finite.new_tensor(-1e38)), -x])
        expected = nearest(x, torch.tensor(1.0), codes).view(torch.uint8)
        assert torch.equal(quantised.encoded(x, codes), expected)
        ends = quantised.encoded(torch.tensor([torch.nan, torch.inf, -torch.inf]), codes).view(codes).float()
        assert ends[0].isnan() or codes == torch.int8
        assert torch.equal(ends[1:].abs(), torch.tensor([finite.max(), -finite.min()]))


def test_bytes_are_e4m3():
    case = dict(CASES[0], codes=torch.float8_e4m3fn, new=1)
    q, k_cache, v_cache, call = build(case)
    as_bytes = [x.view(torch.uint8).clone() for x in (k_cache, v_cache)]
    expected = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    assert torch.equal(fa3.flash_attn_with_kvcache(q, *as_bytes, **call), expected)
    assert torch.equal(as_bytes[0], k_cache.view(torch.uint8))


def test_one_descale_for_all():
    """As vLLM has it, expanded from a single number."""
    q, k_cache, v_cache, call = build(dict(CASES[0], descales="none"))
    one = torch.tensor(0.5).expand(BATCH, 2)
    out = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call, k_descale=one, v_descale=one)
    assert torch.equal(
        out, fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call, k_descale=one + 0, v_descale=one + 0)
    )


@pytest.mark.parametrize("codes", CODES)
def test_in_a_graph(codes):
    case = dict(CASES[0], codes=codes, new=1, where="pages")
    q, k_cache, v_cache, call = build(case)
    copies = k_cache.view(torch.uint8).clone().view(codes), v_cache.view(torch.uint8).clone().view(codes)
    expected = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    fast, _ = compiled(lambda q, k_cache, v_cache: fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call))
    assert torch.equal(fast(q, *copies), expected)
    assert torch.equal(copies[0].view(torch.uint8), k_cache.view(torch.uint8))


def test_the_private_function_takes_them_too():
    q, k_cache, v_cache, call = build(dict(CASES[0], where="pages", new=0, descales="both"))
    out = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    how = {"seqused_k": call["cache_seqlens"], "page_table": call["page_table"], "causal": call["causal"]}
    descales = {name: call[name] for name in ("k_descale", "v_descale")}
    assert torch.equal(fa3_private._flash_attn_forward(q, k_cache, v_cache, **how, **descales)[0], out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_descale": torch.ones(2, 3)}, ValueError, r"k_descale: got a tensor \(2, 3\).*\(2, 2\)"),
        ({"v_descale": torch.ones(2, 2).half()}, ValueError, "v_descale: .*float32"),
        ({"v_descale": 2.0}, ValueError, "v_descale: got 2.0"),
        ({"q_descale": torch.ones(2, 2)}, NotImplementedError, "q_descale"),
        ({"qv": torch.ones(2, 1, 2, 64)}, NotImplementedError, "qv: .*quantised"),
        (
            {"v_cache": torch.zeros(2, 48, 2, 64, dtype=torch.int8)},
            ValueError,
            "v_cache: got dtype torch.int8.*float8_e4m3fn",
        ),
        (
            {"k": torch.zeros(2, 1, 2, 64).to(torch.float8_e4m3fn)},
            ValueError,
            "k: got dtype torch.float8_e4m3fn; .*float16",
        ),
        (
            {"k_cache": torch.zeros(2, 48, 2, 64, dtype=torch.int16), "k_descale": None, "v_descale": None},
            ValueError,
            "k_cache: got dtype torch.int16",
        ),
        (
            {"q": torch.zeros(2, 1, 2, 64, dtype=torch.float16, device="meta")},
            ValueError,
            "k_cache: .*torch.uint8.*int8",
        ),
    ],
    ids=["shape", "dtype", "number", "q_descale", "qv", "mixed", "codes", "int16", "device"],
)
def test_refusals(change, error, message):
    q, k_cache, v_cache, call = build(dict(CASES[0], where="rows", new=1, heads=(2, 2), dims=(64, 64), seqlen_q=1))
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **call, **change}
    with pytest.raises(error, match=message):
        fa3.flash_attn_with_kvcache(**call)


def test_who_has_no_descales_has_no_quantised_caches():
    q, k_cache, v_cache, call = build(dict(CASES[0], where="rows", new=0, descales="none"))
    with pytest.raises(ValueError, match=r"k_cache: got dtype torch\.float8_e4m3fn"):
        fa2.flash_attn_with_kvcache(q, k_cache, v_cache, **call)
    with pytest.raises(NotImplementedError, match=r"v_descale: .*float16"):
        fa3.flash_attn_with_kvcache(q, *(x.to(q.dtype) for x in (k_cache, v_cache)), v_descale=torch.ones(2, 2))
