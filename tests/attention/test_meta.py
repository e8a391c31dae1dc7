"""Meta tensors: shapes, dtypes and devices without data. Any `.item()` or `.tolist()` on the way would raise here."""

import pytest
import torch

from flash_attn_mps.frontends import fa2, fa3


def meta(*shape, dtype=torch.float16, requires_grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def ints(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def assert_is(tensor, shape, dtype=torch.float16):
    assert tensor.device.type == "meta"
    assert tensor.dtype == dtype
    assert tensor.shape == shape
    assert tensor.is_contiguous()


HOWS = [{}, {"causal": True}, {"softcap": 1.0, "window_size": (3, 3)}, {"alibi_slopes": torch.empty(4, device="meta")}]


@pytest.mark.parametrize("how", HOWS, ids=range(len(HOWS)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense(dtype, how):
    q, k, v = (meta(2, s, h, d, dtype=dtype, requires_grad=True) for s, h, d in ((9, 4, 16), (13, 2, 16), (13, 2, 24)))
    out = fa2.flash_attn_func(q, k, v, **how)
    assert_is(out, (2, 9, 4, 24), dtype)
    for gradient, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert_is(gradient, x.shape, dtype)
    out, lse, s_dmask = fa2.flash_attn_func(q, k, v, return_attn_probs=True, **how)
    assert_is(out, (2, 9, 4, 24), dtype)
    assert_is(lse, (2, 4, 9), torch.float32)
    assert s_dmask.numel() == 0


def test_dense_dropout():
    q = meta(2, 9, 4, 16)
    out, lse, s_dmask = fa2.flash_attn_func(q, q, q, dropout_p=0.5, return_attn_probs=True)
    assert_is(out, (2, 9, 4, 16))
    assert_is(lse, (2, 4, 9), torch.float32)
    assert s_dmask.shape == (2, 4, 9, 9)
    assert s_dmask.device.type == "meta"


def test_packed():
    cu = ints(4)
    assert_is(fa2.flash_attn_qkvpacked_func(meta(2, 9, 3, 4, 16)), (2, 9, 4, 16))
    assert_is(fa2.flash_attn_kvpacked_func(meta(2, 5, 4, 16), meta(2, 9, 2, 2, 16)), (2, 5, 4, 16))
    assert_is(fa2.flash_attn_varlen_qkvpacked_func(meta(20, 3, 4, 16), cu, 9), (20, 4, 16))
    out = fa2.flash_attn_varlen_kvpacked_func(meta(20, 4, 16), meta(30, 2, 2, 16), cu, cu, 9, 12)
    assert_is(out, (20, 4, 16))


@pytest.mark.parametrize("max_seqlen", [9, "tensor"])
@pytest.mark.parametrize("how", HOWS, ids=range(len(HOWS)))
def test_varlen(how, max_seqlen):
    longest = ints() if max_seqlen == "tensor" else 9
    q, k, v = (meta(n, h, d, requires_grad=True) for n, h, d in ((20, 4, 16), (30, 2, 16), (30, 2, 24)))
    out, lse, _ = fa2.flash_attn_varlen_func(q, k, v, ints(4), ints(4), longest, longest, return_attn_probs=True, **how)
    assert_is(out, (20, 4, 24))
    assert_is(lse, (4, 20), torch.float32)
    for gradient, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert_is(gradient, x.shape)


def test_varlen_block_table():
    pages = meta(7, 16, 2, 16)
    out = fa2.flash_attn_varlen_func(meta(20, 4, 16), pages, pages, ints(4), ints(4), 9, 40, block_table=ints(3, 3))
    assert_is(out, (20, 4, 16))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("append", [False, True])
def test_kvcache(append, paged):
    cache = meta(9, 16, 2, 16) if paged else meta(3, 64, 2, 16)
    call = {"cache_seqlens": ints(3), "causal": True}
    if paged:
        call["block_table"] = ints(3, 4)
    if append:
        call.update(k=meta(3, 2, 2, 16), v=meta(3, 2, 2, 16), rotary_cos=meta(64, 8), rotary_sin=meta(64, 8))
    out, lse = fa2.flash_attn_with_kvcache(meta(3, 2, 4, 16), cache, cache, return_softmax_lse=True, **call)
    assert_is(out, (3, 2, 4, 16))
    assert_is(lse, (3, 4, 2), torch.float32)


def test_fa3():
    q, k = meta(2, 9, 4, 16), meta(2, 13, 2, 16)
    assert_is(fa3.flash_attn_func(q, k, k), (2, 9, 4, 16))
    flat, used = meta(20, 4, 16), ints(3)
    out = fa3.flash_attn_varlen_func(flat, flat, flat, ints(4), ints(4), 9, 9, seqused_q=used, seqused_k=used)
    assert_is(out, (20, 4, 16))
    assert_is(fa3.flash_attn_with_kvcache(meta(3, 2, 4, 16), meta(3, 64, 2, 16), meta(3, 64, 2, 16)), (3, 2, 4, 16))
