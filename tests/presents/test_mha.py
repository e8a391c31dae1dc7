"""`modules.mha` against attention written out in fp64, with gradients, caches and heads over processes."""

import copy
import math
import pickle

import pytest
import torch

from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    ParallelMHA,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

from . import reference
from .reference import assert_close

BOOLS = [False, True]


def attention(q, k, v, causal=False, window=(-1, -1), slopes=None, mask=None, scale=None):
    """`(batch, seqlen, heads, head_dim)` in fp64; `mask` `(batch, seqlen_k)` is True for keys to attend to."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    distance = row - torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - torch.as_tensor(slopes, dtype=torch.float64)[:, None, None] * distance.abs()
    hidden = (distance < 0) & torch.tensor(causal)
    if window[0] >= 0:
        hidden = hidden | (distance > window[0])
    if window[1] >= 0:
        hidden = hidden | (distance < -window[1])
    scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def same(got, want, inputs, scale=8):
    assert_close(got, want, torch.float32, scale=scale)
    weight = torch.randn(want.shape, dtype=torch.float64)
    gots = torch.autograd.grad(got.double(), inputs, weight)
    wants = torch.autograd.grad(want, inputs, weight)
    for g, w in zip(gots, wants, strict=True):
        assert_close(g, w, torch.float32, scale=10 * scale)


@pytest.mark.parametrize("nheads", [1, 2, 8, 12, 20])
def test_alibi_slopes(nheads):
    slopes = get_alibi_slopes(nheads)
    assert len(slopes) == nheads
    n = 2 ** int(math.log2(nheads))
    assert slopes[:n] == pytest.approx([2 ** (-8 * i / n) for i in range(1, n + 1)])
    twice = [2 ** (-8 * i / (2 * n)) for i in range(1, 2 * n + 1)]
    assert slopes[n:] == pytest.approx(twice[0::2][: nheads - n])


@pytest.mark.parametrize("causal", BOOLS)
@pytest.mark.parametrize("cls", [FlashSelfAttention, SelfAttention])
def test_self_attention(cls, causal):
    qkv = leaf(2, 9, 3, 2, 16)
    inner = cls(causal=not causal, softmax_scale=0.3)
    want = attention(*qkv.unbind(2), causal=causal, scale=0.3)
    same(inner(qkv, causal=causal), want, [qkv])
    assert inner.state_dict() == {}
    for other in (copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
        assert torch.equal(other(qkv), inner(qkv))


@pytest.mark.parametrize("causal", BOOLS)
@pytest.mark.parametrize("cls", [FlashCrossAttention, CrossAttention])
def test_cross_attention(cls, causal):
    q, kv = leaf(2, 5, 4, 16), leaf(2, 9, 2, 2, 16)
    same(cls(causal=causal)(q, kv), attention(q, *kv.unbind(2), causal=causal), [q, kv])


def test_windows_and_alibi():
    slopes = torch.tensor(get_alibi_slopes(2))
    qkv, kv = leaf(2, 9, 3, 2, 16), leaf(2, 11, 2, 2, 16)
    for causal, window in ((True, (-1, -1)), (True, (3, 0)), (False, (2, 4))):
        own = FlashSelfAttention(causal=causal, window_size=window, alibi_slopes=slopes)
        same(own(qkv), attention(*qkv.unbind(2), causal, window, slopes), [qkv])
        cross = FlashCrossAttention(causal=causal, window_size=window, alibi_slopes=slopes)
        q = qkv[:, :, 0]
        assert_close(cross(q, kv), attention(q, *kv.unbind(2), causal, window, slopes), scale=8)
    assert own.state_dict() == {}
    assert own.half().alibi_slopes.dtype == torch.float16


def test_packed():
    lengths, lengths_k = [3, 5], [6, 2]
    cu, cu_k = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0, 6, 8], dtype=torch.int32)
    qkv, q, kv = leaf(8, 3, 2, 16), leaf(8, 4, 16), leaf(8, 2, 2, 16)
    parts = [attention(*t[None].unbind(2))[0] for t in qkv.split(lengths)]
    same(FlashSelfAttention()(qkv, cu_seqlens=cu, max_seqlen=5), torch.cat(parts), [qkv])
    pairs = zip(q.split(lengths), kv.split(lengths_k), strict=True)
    parts = [attention(a[None], *b[None].unbind(2))[0] for a, b in pairs]
    out = FlashCrossAttention()(q, kv, cu_seqlens=cu, max_seqlen=5, cu_seqlens_k=cu_k, max_seqlen_k=6)
    same(out, torch.cat(parts), [q, kv])


@pytest.mark.parametrize("causal", BOOLS)
def test_key_padding_mask(causal):
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    qkv = leaf(2, 9, 3, 2, 16)
    want = attention(*qkv.unbind(2), causal=causal, mask=mask)
    same(SelfAttention(causal=causal)(qkv, key_padding_mask=mask), want, [qkv])
    q, kv = leaf(2, 4, 2, 16), leaf(2, 9, 2, 2, 16)
    # Causality counts from the last key that is kept.
    rows = [attention(q[i : i + 1], *kv[i : i + 1, :n].unbind(2), causal=causal) for i, n in enumerate((9, 6))]
    same(CrossAttention(causal=causal)(q, kv, key_padding_mask=mask), torch.cat(rows), [q, kv])


def test_dropout():
    torch.manual_seed(0)
    qkv = torch.randn(1, 64, 3, 2, 16)
    for cls in (SelfAttention, FlashSelfAttention):
        inner = cls(attention_dropout=0.5)
        assert not torch.allclose(inner(qkv), inner(qkv))
        inner.eval()
        assert_close(inner(qkv), attention(*qkv.unbind(2)), scale=8)


def layer_reference(mha, x, x_kv=None, mask=None, window=(-1, -1), slopes=None, subset=None):
    """`MHA.forward` in fp64 from the layer's own weights."""
    w = {name: p.double() for name, p in mha.named_parameters()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def convolve(name, x):
        if not mha.dwconv:
            return x
        kernel, bias = w[f"{name}.weight"][:, 0], w[f"{name}.bias"]
        padded = torch.cat([torch.zeros_like(x[:, :2]), x], dim=1)
        return sum(padded[:, i : i + x.shape[1]] * kernel[:, i] for i in range(3)) + bias

    x = x.double()
    d = mha.head_dim
    if mha.cross_attn:
        q = convolve("dwconv_q", linear("Wq", x if subset is None else x[:, subset]))
        kv = convolve("dwconv_kv", linear("Wkv", x if x_kv is None else x_kv.double()))
    else:
        qkv = linear("Wqkv", x)
        if mha.num_heads_kv == mha.num_heads:
            qkv = convolve("dwconv_qkv", qkv)
            q, kv = qkv[..., : mha.embed_dim], qkv[..., mha.embed_dim :]
        else:
            q = convolve("dwconv_q", qkv[..., : mha.embed_dim])
            kv = convolve("dwconv_kv", qkv[..., mha.embed_dim :])
    q = q.unflatten(-1, (-1, d))
    k, v = kv.unflatten(-1, (2, -1, d)).unbind(2)
    if mha.rotary_emb_dim:
        rotary = mha.rotary_emb
        r = mha.rotary_emb_dim
        i, p = torch.arange(0, r, 2).double(), torch.arange(x.shape[1]).double()[:, None]
        angle = p * rotary.base ** (-i / r)
        scale = 1.0
        if rotary.scale_base:
            scale = ((i + 0.4 * r) / (1.4 * r)) ** (p / rotary.scale_base)
        turn = lambda x, s: torch.stack(  # noqa: E731
            [reference.rotary(t, angle.cos() * s, angle.sin() * s, torch.arange(len(t)), rotary.interleaved) for t in x]
        )
        q, k = turn(q, scale), turn(k, 1 / scale)
    context = attention(q, k, v, mha.causal, window, slopes, mask)
    return linear("out_proj", context.flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "rotary_emb_dim": 8, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
        {"causal": True, "rotary_emb_dim": 6, "rotary_emb_scale_base": 512},
        {"num_heads_kv": 2, "causal": True, "rotary_emb_dim": 16},
        {"dwconv": True, "qkv_proj_bias": False, "out_proj_bias": False},
        {"dwconv": True, "num_heads_kv": 1, "causal": True, "checkpointing": True},
        {"cross_attn": True},
        {"cross_attn": True, "num_heads_kv": 2, "dwconv": True, "fused_bias_fc": True},
    ],
)
@pytest.mark.parametrize("use_flash_attn", BOOLS)
def test_mha(options, use_flash_attn):
    mha = MHA(64, 4, use_flash_attn=use_flash_attn, **options)
    x = leaf(2, 9, 64)
    same(mha(x), layer_reference(mha, x), [x, *mha.parameters()], scale=20)
    fresh = MHA(64, 4, use_flash_attn=use_flash_attn, **options)
    fresh.load_state_dict(mha.state_dict())
    for other in (fresh, copy.deepcopy(mha), pickle.loads(pickle.dumps(mha))):
        assert torch.equal(other(x), mha(x))


def test_parameter_names():
    assert list(MHA(8, 2).state_dict()) == ["Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"]
    names = {name.split(".")[0] for name in MHA(8, 2, 1, cross_attn=True, dwconv=True).state_dict()}
    assert names == {"Wq", "Wkv", "dwconv_q", "dwconv_kv", "out_proj"}
    assert "dwconv_qkv.weight" in MHA(8, 2, dwconv=True).state_dict()


def test_mha_forms():
    x, x_kv = leaf(2, 9, 64), leaf(2, 5, 64)
    cross = MHA(64, 4, cross_attn=True, return_residual=True)
    out, residual = cross(x, x_kv, mixer_subset=slice(0, 2))
    assert residual is x
    same(out, layer_reference(cross, x, x_kv, subset=slice(0, 2)), [x, x_kv], scale=20)
    flash = MHA(64, 4, use_flash_attn=True, use_alibi=True, window_size=(3, 3))
    want = layer_reference(flash, x, window=(3, 3), slopes=get_alibi_slopes(4))
    same(flash(x), want, [x], scale=20)
    plain = MHA(64, 4)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    same(plain(x, key_padding_mask=mask), layer_reference(plain, x, mask=mask), [x], scale=20)
    packed = MHA(64, 4, use_flash_attn=True)
    tokens = x.flatten(0, 1)
    out = packed(tokens, cu_seqlens=torch.tensor([0, 9, 18], dtype=torch.int32), max_seqlen=9)
    same(out, layer_reference(packed, x).flatten(0, 1), [x], scale=20)


def generate(mha, x, steps, params):
    """Run `mha` on `x` piece by piece, through the cache."""
    outs = []
    for piece in x.split(steps, dim=1):
        outs.append(mha(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(
    ("options", "window", "alibi"),
    [
        ({}, (-1, -1), False),
        ({"rotary_emb_dim": 16}, (-1, -1), False),
        ({"rotary_emb_dim": 6, "rotary_emb_interleaved": True, "num_heads_kv": 2}, (-1, -1), False),
        ({"rotary_emb_dim": 16, "rotary_emb_scale_base": 512}, (-1, -1), False),
        ({"num_heads_kv": 1}, (3, 0), False),
        ({"rotary_emb_dim": 8}, (-1, -1), True),
    ],
)
@pytest.mark.parametrize("use_flash_attn", BOOLS)
def test_cache(options, window, alibi, use_flash_attn):
    if not use_flash_attn and (alibi or window != (-1, -1)):
        with pytest.raises(NotImplementedError, match="needs use_flash_attn=True"):
            MHA(64, 4, use_alibi=alibi, window_size=window)
        return
    mha = MHA(
        64, 4, causal=True, layer_idx=3, use_flash_attn=use_flash_attn, window_size=window, use_alibi=alibi, **options
    ).eval()
    x = torch.randn(2, 12, 64)
    want = layer_reference(mha, x, window=window, slopes=get_alibi_slopes(4) if alibi else None)
    params = InferenceParams(max_seqlen=16, max_batch_size=2)
    with torch.no_grad():
        got = generate(mha, x, [5, 1, 1, 3, 2], params)
    assert_close(got, want, scale=20)
    assert params.key_value_memory_dict[3].shape == (2, 16, 2, options.get("num_heads_kv", 4), 16)
    # The second of two sequences, in a cache that was allocated before.
    cache = {3: mha.allocate_inference_cache(2, 16)}
    params = InferenceParams(16, 2, batch_size_offset=1, key_value_memory_dict=cache)
    with torch.no_grad():
        assert_close(generate(mha, x[1:], [4, 8], params), want[1:], scale=20)


def test_cache_that_is_too_small():
    for use_flash_attn in BOOLS:
        mha = MHA(64, 4, causal=True, layer_idx=0, use_flash_attn=use_flash_attn)
        params = InferenceParams(16, 2)
        with pytest.raises(ValueError, match="the cache holds 2 sequences of 16 tokens"):
            mha(torch.randn(2, 17, 64), inference_params=params)
        with pytest.raises(ValueError, match="the cache holds 2 sequences of 16 tokens"):
            mha(torch.randn(3, 4, 64), inference_params=params)
        with torch.no_grad(), pytest.raises(ValueError):
            generate(mha, torch.randn(2, 18, 64), [16, 2], params)


def test_cache_with_lengths_of_their_own():
    mha = MHA(64, 4, causal=True, layer_idx=0, use_flash_attn=True, rotary_emb_dim=16).eval()
    x = torch.randn(2, 8, 64)
    lengths = torch.tensor([5, 3], dtype=torch.int32)
    params = InferenceParams(16, 2)
    with torch.no_grad():
        mha(x[:, :5], inference_params=params)
        params.seqlen_offset, params.lengths_per_sample = 5, lengths
        token = torch.randn(2, 1, 64)
        got = mha(token, inference_params=params)
    for i, length in enumerate(lengths.tolist()):
        row = torch.cat([x[i : i + 1, :length], token[i : i + 1]], dim=1)
        assert_close(got[i], layer_reference(mha, row)[0, -1:], scale=20)
    params.reset(16, 2)
    assert params.seqlen_offset == 0
    assert not params.lengths_per_sample.any()
    plain = MHA(64, 4, causal=True, layer_idx=0)
    params.seqlen_offset = 5
    with pytest.raises(NotImplementedError, match="lengths_per_sample"):
        plain(token, inference_params=params)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens needs use_flash_attn"),
        ({"use_flash_attn": True, "rotary_emb_dim": 8}, {"cu_seqlens": torch.tensor([0, 9])}, "rotary_emb_dim"),
        ({"use_flash_attn": True, "dwconv": True}, {"cu_seqlens": torch.tensor([0, 9])}, "dwconv"),
        ({"use_flash_attn": True}, {"key_padding_mask": torch.ones(2, 9) > 0}, "key_padding_mask needs"),
        ({}, {"x_kv": torch.randn(2, 9, 64)}, "x_kv needs cross_attn"),
        ({}, {"mixer_subset": slice(1)}, "mixer_subset needs cross_attn"),
        ({"dwconv": True}, {"inference_params": InferenceParams(9, 2)}, "inference_params with dwconv"),
    ],
)
def test_refusals(options, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        MHA(64, 4, **options)(torch.randn(2, 9, 64), **arguments)


def test_malformed_layers():
    with pytest.raises(ValueError, match="num_heads must be divisible by num_heads_kv, got 4 and 3"):
        MHA(64, 4, 3)
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got 65 and 4"):
        MHA(65, 4)
    with pytest.raises(NotImplementedError, match="rotary_emb_dim with cross_attn"):
        MHA(64, 4, cross_attn=True, rotary_emb_dim=8)
    with pytest.raises(NotImplementedError, match="dwconv with cross_attn"):
        MHA(64, 4, cross_attn=True, dwconv=True)
    with pytest.raises(ValueError, match="layer_idx must be given"):
        MHA(64, 4)(torch.randn(2, 9, 64), inference_params=InferenceParams(9, 2))


def parallel_layer(rank, group, whole, x, options, sequence_parallel):
    """`ParallelMHA` with this rank's heads of `whole`: its result, and the gradient for its input."""
    n = group.size()
    layer = ParallelMHA(whole.embed_dim, whole.num_heads, group, sequence_parallel=sequence_parallel, **options)
    d, kv = whole.head_dim, layer.num_heads_kv_per_rank
    counts = [whole.num_heads_kv // n + (r < whole.num_heads_kv % n) for r in range(n)]
    assert kv == counts[rank]
    first, ratio = sum(counts[:rank]), whole.num_heads // whole.num_heads_kv
    q_rows = torch.arange(first * ratio * d, (first + kv) * ratio * d)
    kv_rows = torch.arange(first * d, (first + kv) * d)
    width = whole.num_heads_kv * d
    start = whole.embed_dim
    rows = torch.cat([q_rows, start + kv_rows, start + width + kv_rows])
    with torch.no_grad():
        layer.Wqkv.weight.copy_(whole.Wqkv.weight[rows])
        layer.Wqkv.bias.copy_(whole.Wqkv.bias[rows])
        layer.out_proj.weight.copy_(whole.out_proj.weight[:, q_rows])
        if rank == 0:
            layer.out_proj.bias.copy_(whole.out_proj.bias)
    batch, seqlen = x.shape[:2]
    tokens = x.flatten(0, 1)
    tokens = (tokens.chunk(n)[rank] if sequence_parallel else tokens).clone().requires_grad_()
    out = layer(tokens, seqlen=seqlen)
    out.sum().backward()
    cache = layer.allocate_inference_cache(batch, seqlen)
    assert cache.shape == (batch, seqlen, 2, kv, d)
    return out.detach(), tokens.grad


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("num_heads", "options"),
    [
        (4, {"causal": True, "rotary_emb_dim": 8}),
        (8, {"num_heads_kv": 4, "causal": True}),
        (8, {"use_flash_attn": True, "use_alibi": True}),
    ],
)
@pytest.mark.parametrize("sequence_parallel", BOOLS)
def test_heads_over_processes(pool, world_size, num_heads, options, sequence_parallel):
    whole = MHA(64, num_heads, **options)
    x = leaf(2, 6, 64)
    slopes = get_alibi_slopes(num_heads) if "use_alibi" in options else None
    want = layer_reference(whole, x, slopes=slopes).flatten(0, 1)
    (want_grad,) = torch.autograd.grad(want.sum(), x)
    results = pool.run(world_size, parallel_layer, whole, x.detach(), options, sequence_parallel)
    for rank, (out, grad) in enumerate(results):
        for got, expected in ((out, want), (grad, want_grad.flatten(0, 1))):
            expected = expected.chunk(world_size)[rank] if sequence_parallel else expected
            assert_close(got, expected, scale=20)


def test_uneven_heads_over_processes(pool):
    """Six heads of which three keys are read: two and one of these a rank, and the heads with them."""
    x = torch.randn(2, 6, 96)
    options = {"num_heads_kv": 3, "causal": True, "use_flash_attn": True, "use_alibi": True}
    whole = MHA(96, 6, **options)
    want = layer_reference(whole, x, slopes=get_alibi_slopes(6)).flatten(0, 1)
    for out, _ in pool.run(2, parallel_layer, whole, x, options, False):
        assert_close(out, want, scale=20)
