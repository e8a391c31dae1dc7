"""`utils.testing` against attention computed query by query in fp64."""

import pytest
import torch

from flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.utils.testing import (
    attention_ref,
    construct_chunk_mask,
    construct_local_mask,
    generate_qkv,
    generate_random_padding_mask,
)

from .reference import assert_close

B, SQ, SK, H, HK, D = 2, 5, 7, 4, 2, 8


def lengths(mask, seqlen):
    return [seqlen] * B if mask is None else mask.sum(-1).tolist()


def visible(i, j, n_q, n_k, window=(None, None), chunk=0, sinks=0, leftpad=0):
    """Does query i of n_q see key j of n_k?"""
    diagonal = i + n_k - n_q
    j = j - leftpad
    if j < 0 or j >= n_k:
        return False
    left, right = window
    if right is not None and j > diagonal + right:
        return False
    if left is not None and j < diagonal - left and j >= sinks:
        return False
    return not chunk or j // chunk == diagonal // chunk


def attention(q, k, v, see, extra=lambda b, h, i, j: 0.0, softcap=0.0, sink=None, qv=None):
    out = torch.zeros(B, q.shape[1], H, v.shape[-1], dtype=torch.float64)
    weights = torch.zeros(B, H, q.shape[1], k.shape[1], dtype=torch.float64)
    scale = (q.shape[-1] + (0 if qv is None else v.shape[-1])) ** -0.5
    for b in range(B):
        for h in range(H):
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if see(b, i, j)]
                if not keys:
                    continue
                g = h // (H // HK)
                s = k[b, keys, g].double() @ q[b, i, h].double() * scale
                if qv is not None:
                    s = s + v[b, keys, g].double() @ qv[b, i, h].double() * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                s = s + torch.tensor([extra(b, h, i, j) for j in keys], dtype=torch.float64)
                e = s.exp()
                p = e / (e.sum() + (0 if sink is None else sink[h].double().exp()))
                weights[b, h, i, keys] = p
                out[b, i, h] = p @ v[b, keys, g].double()
    return out, weights


def inputs(seqlen_k=SK, dim_v=D):
    return torch.randn(B, SQ, H, D), torch.randn(B, seqlen_k, HK, D), torch.randn(B, seqlen_k, HK, dim_v)


QUERIES = torch.arange(SQ) < torch.tensor([[5], [3]])
KEYS = torch.arange(SK) < torch.tensor([[4], [7]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 1)},
        {"window_size": (1, 0), "sink_token_length": 2},
        {"window_size": (None, 1)},
        {"attention_chunk": 3},
        {"causal": True, "attention_chunk": 2},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_masks_and_attention(options, padded):
    q, k, v = inputs(dim_v=6)
    masks = {"query_padding_mask": QUERIES, "key_padding_mask": KEYS} if padded else {}
    n_q, n_k = lengths(masks.get("query_padding_mask"), SQ), lengths(masks.get("key_padding_mask"), SK)
    window = options.get("window_size", (None, None))
    window = (window[0], 0) if options.get("causal") else window
    chunk, sinks = options.get("attention_chunk", 0), options.get("sink_token_length", 0)

    def see(b, i, j):
        return i < n_q[b] and visible(i, j, n_q[b], n_k[b], window, chunk, sinks)

    want = attention(q, k, v, see)
    for got, expected in zip(attention_ref(q, k, v, **masks, **options), want, strict=True):
        assert_close(got, expected, scale=8)
    # The masks by themselves, where there is a valid query and key.
    hidden = torch.zeros(B, 1, SQ, SK, dtype=torch.bool)
    hidden = hidden | construct_local_mask(SQ, SK, window, sinks, **masks)
    if chunk:
        hidden = hidden | construct_chunk_mask(SQ, SK, chunk, **masks)
    for b in range(B):
        for i in range(n_q[b]):
            for j in range(n_k[b]):
                assert hidden[b, 0, i, j] == (not see(b, i, j))


def test_features():
    q, k, v = inputs()
    everything = lambda b, i, j: True  # noqa: E731
    bias = torch.randn(1, H, SQ, SK)
    want, _ = attention(q, k, v, everything, lambda b, h, i, j: float(bias[0, h, i, j]), softcap=2.0)
    for reorder in (False, True):
        out, _ = attention_ref(q, k, v, attn_bias=bias, softcap=2.0, reorder_ops=reorder)
        assert_close(out, want, scale=8)
    sink, qv = torch.randn(H), torch.randn(B, SQ, H, D)
    want = attention(q, k, v, everything, sink=sink, qv=qv)
    for got, expected in zip(attention_ref(q, k, v, qv=qv, learnable_sink=sink), want, strict=True):
        assert_close(got, expected, scale=8)
    scales = [torch.rand(B, HK) + 0.5 for _ in range(3)]
    wide = scales[0].repeat_interleave(H // HK, dim=1)[:, None, :, None]
    scaled = [q * wide, k * scales[1][:, None, :, None], v * scales[2][:, None, :, None]]
    want, _ = attention(*scaled, everything)
    out, _ = attention_ref(q, k, v, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2])
    assert_close(out, want, scale=8)
    leftpad = torch.tensor([2, 0])
    want, _ = attention(q, k, v, lambda b, i, j: visible(i, j, SQ, SK, (None, 0), leftpad=int(leftpad[b])))
    assert_close(attention_ref(q, k, v, causal=True, key_leftpad=leftpad)[0], want, scale=8)
    keep = torch.rand(B, H, SQ, SK) > 0.3
    _, weights = attention(q, k, v, everything)
    out, got = attention_ref(q, k, v, dropout_p=0.3, dropout_mask=keep)
    values = v.double().repeat_interleave(H // HK, dim=2)
    assert_close(out, torch.einsum("bhij,bjhd->bihd", weights * keep / 0.7, values), scale=8)
    assert_close(got, weights, scale=8)
    half = [t.bfloat16() for t in (q, k, v)]
    out, _ = attention_ref(*half, intermediate_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert_close(out, attention(*half, everything)[0], scale=8)
    assert_close(attention_ref(*half, upcast=False)[0], attention(*half, everything)[0], scale=16)


def test_a_query_without_keys_gives_zeros_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in inputs(seqlen_k=3))
    out, _ = attention_ref(q, k, v, causal=True)
    assert not out[:, :2].any()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :2].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["qkvpacked", "kvpacked", "apart"])
def test_generate_qkv(form, masked):
    if form == "qkvpacked":
        q, k, v = (torch.randn(B, SK, H, D) for _ in range(3))
        masks = {"query_padding_mask": KEYS, "key_padding_mask": KEYS} if masked else {}
        qkv, bounds, longest, padded, pad_out, pad_grad = generate_qkv(q, k, v, **masks, qkvpacked=True)
        out = flash_attn_varlen_qkvpacked_func(qkv, bounds, longest, causal=True)
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        q, k, v = padded.unbind(2)
        leaves, grads = [padded], [pad_grad(grad)]
    else:
        q, k, v = inputs()
        masks = {"query_padding_mask": QUERIES, "key_padding_mask": KEYS} if masked else {}
        if form == "kvpacked":
            qp, kvp, *bounds, q, kv, pad_out, pad_q, pad_kv = generate_qkv(q, k, v, **masks, kvpacked=True)
            out = flash_attn_varlen_kvpacked_func(qp, kvp, *bounds, causal=True)
            gq, gkv = torch.autograd.grad(out.sum(), (qp, kvp))
            k, v = kv.unbind(2)
            leaves, grads = [q, kv], [pad_q(gq), pad_kv(gkv)]
        else:
            qv = torch.randn(B, SQ, H, D)
            packed = generate_qkv(q, k, v, **masks, qv=qv)
            qp, kp, vp, qvp, bq, bk, used_q, used_k, long_q, long_k, q, k, v, qv2, pad_out, pad_q, pad_k = packed
            assert torch.equal(qv2, qv)
            assert torch.equal(pad_q(qvp), qv * masks.get("query_padding_mask", torch.ones(B, SQ))[..., None, None])
            for used, mask in ((used_q, QUERIES), (used_k, KEYS)):
                assert used.tolist() == mask.sum(-1).tolist() if masked else used is None
            out = flash_attn_varlen_func(qp, kp, vp, bq, bk, long_q, long_k, causal=True)
            gq, gk, gv = torch.autograd.grad(out.sum(), (qp, kp, vp))
            leaves, grads = [q, k, v], [pad_q(gq), pad_k(gk), pad_k(gv)]
    want, _ = attention_ref(q, k, v, **masks, causal=True)
    assert_close(pad_out(out), want, scale=8)
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        assert_close(got, expected, scale=30)


def test_unused_tokens():
    q, k, v = inputs()
    unused = torch.zeros_like(KEYS)
    unused[0, 4] = True
    packed = generate_qkv(q, k, v, QUERIES, KEYS, key_unused_mask=unused)
    assert packed[1].shape[0] == 12
    assert packed[5].tolist() == [0, 5, 12]
    assert packed[7].tolist() == [4, 7]
    with pytest.raises(ValueError, match="key_unused_mask need"):
        generate_qkv(q, k, v, QUERIES, KEYS, key_unused_mask=unused, kvpacked=True)
    with pytest.raises(ValueError, match="exclude each other"):
        generate_qkv(q, k, v, kvpacked=True, qkvpacked=True)
    with pytest.raises(ValueError, match="qkvpacked needs q and k of one shape"):
        generate_qkv(q, k, v, qkvpacked=True)


@pytest.mark.parametrize(("mode", "least"), [("full", 40), ("random", 20), ("third", 13)])
@pytest.mark.parametrize("zero_lengths", [False, True])
def test_random_padding(mode, least, zero_lengths):
    mask = generate_random_padding_mask(40, 12, "cpu", mode=mode, zero_lengths=zero_lengths)
    n = mask.sum(-1)
    assert torch.equal(mask, torch.arange(40) < n[:, None])
    empty = [0, 5, 10, 11] if zero_lengths else []
    assert not n[empty].any()
    others = n[[i for i in range(12) if i not in empty]]
    assert others.min() >= least
    assert (len(others.unique()) > 1) == (mode != "full")
    with pytest.raises(ValueError, match="mode must be 'full', 'random' or 'third', got 'half'"):
        generate_random_padding_mask(4, 2, "cpu", mode="half")
