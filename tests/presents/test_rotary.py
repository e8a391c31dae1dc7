"""`flash_attn.layers.rotary` and `flash_attn.ops.triton.rotary` against rotation by complex numbers in fp64."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from flash_attn.layers.rotary import (
    ApplyRotaryEmb,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_mps import trace
from tests.metal_tiers import metal_on

from . import reference
from .reference import assert_close, assert_rounded_once

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOOLS = [False, True]


def tables(rows, rotary_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(rows, rotary_dim // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    return angle.cos().to(dtype), angle.sin().to(dtype)


def batch_reference(x, cos, sin, offsets, **options):
    offsets = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * len(x)
    rows = [
        reference.rotary(one, cos, sin, torch.arange(one.shape[0]) + offset, **options)
        for one, offset in zip(x, offsets, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", ["zero", "int", "tensor"])
@pytest.mark.parametrize(("interleaved", "conjugate", "inplace"), [*itertools.product(BOOLS, BOOLS, BOOLS)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (48, 20)])
def test_batch(dtype, offset, interleaved, conjugate, inplace, head_dim, rotary_dim):
    x = torch.randn(3, 17, 2, head_dim).to(dtype)
    cos, sin = tables(40, rotary_dim, dtype)
    offsets = {"zero": 0, "int": 23, "tensor": torch.tensor([5, 0, 23], dtype=torch.int32)}[offset]
    expected = batch_reference(x, cos, sin, offsets, interleaved=interleaved, conjugate=conjugate)
    before = x.clone()
    out = apply_rotary(
        x, cos, sin, seqlen_offsets=offsets, interleaved=interleaved, inplace=inplace, conjugate=conjugate
    )
    assert out.dtype == dtype
    assert_rounded_once(out, expected)
    if inplace:
        assert out is x
    else:
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_offsets", BOOLS)
@pytest.mark.parametrize(("interleaved", "inplace"), [*itertools.product(BOOLS, BOOLS)])
def test_packed(dtype, with_offsets, interleaved, inplace):
    lengths = [7, 0, 13, 1, 0]
    cu_seqlens = torch.tensor([0, 7, 7, 20, 21, 21], dtype=torch.int32)
    offsets = torch.tensor([3, 1, 0, 19, 4]) if with_offsets else 2
    x = torch.randn(24, 3, 32).to(dtype)  # three tokens after the last sequence
    cos, sin = tables(20, 24, dtype)
    expected = x.double()
    for i, length in enumerate(lengths):
        start = int(cu_seqlens[i])
        positions = torch.arange(length) + (int(offsets[i]) if with_offsets else 2)
        part = slice(start, start + length)
        expected[part] = reference.rotary(x[part], cos, sin, positions, interleaved)
    out = apply_rotary(
        x, cos, sin, offsets, cu_seqlens=cu_seqlens, max_seqlen=13, interleaved=interleaved, inplace=inplace
    )
    assert (out is x) == inplace
    assert_rounded_once(out, expected)


def test_positions_past_the_tables_are_not_rotated():
    x = torch.randn(2, 5, 1, 8)
    cos, sin = tables(6, 8, torch.float32)
    out = apply_rotary(x, cos, sin, torch.tensor([0, 3]))
    assert torch.equal(out[1, 3:], x[1, 3:])
    assert not torch.equal(out[1, :3], x[1, :3])


def test_views_and_strides():
    qkv = torch.randn(2, 9, 3, 4, 16)
    cos, sin = tables(9, 16, torch.float32)
    q = qkv[:, :, 1]
    expected = batch_reference(q, cos, sin, 0)
    others = qkv[:, :, [0, 2]].clone()
    apply_rotary(q, cos, sin, inplace=True)
    assert_close(qkv[:, :, 1], expected)
    assert torch.equal(qkv[:, :, [0, 2]], others)
    transposed = torch.randn(2, 4, 9, 16).transpose(1, 2)
    assert_close(apply_rotary(transposed, cos, sin), batch_reference(transposed, cos, sin, 0))


def test_tables_of_another_dtype():
    x = torch.randn(1, 5, 2, 8).bfloat16()
    cos, sin = tables(5, 8, torch.float32)
    assert_close(apply_rotary(x, cos, sin), batch_reference(x, cos, sin, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 2, 8)}, "x must be"),
        ({"x": torch.zeros(1, 5, 2, 8, dtype=torch.int32)}, "x must be of a floating dtype"),
        ({"sin": torch.randn(5, 3)}, "cos and sin must both be"),
        ({"x": torch.randn(1, 5, 2, 6)}, "head_dim of at least"),
        ({"x": torch.randn(1, 6, 2, 8)}, "5 rows"),
        ({"seqlen_offsets": 1}, "5 rows"),
        ({"seqlen_offsets": -1}, "seqlen_offsets must not be negative"),
        ({"seqlen_offsets": torch.tensor([0, 0])}, "seqlen_offsets must be"),
        ({"seqlen_offsets": torch.tensor([0.0])}, "seqlen_offsets must be"),
        ({"x": torch.randn(5, 2, 8), "cu_seqlens": torch.tensor([0, 5])}, "max_seqlen must be given"),
        ({"x": torch.randn(5, 2, 8), "cu_seqlens": torch.tensor([0]), "max_seqlen": 5}, "cu_seqlens must be"),
        ({"x": torch.randn(9, 2, 8), "cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 9}, "5 rows"),
        ({"cos": torch.ones(5, 4, dtype=torch.complex64)}, "floating dtype"),
        ({"sin": torch.ones(5, 4, dtype=torch.int32)}, "floating dtype"),
    ],
)
def test_malformed_calls(changes, message):
    cos, sin = tables(5, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        apply_rotary(**{"x": torch.randn(1, 5, 2, 8), "cos": cos, "sin": sin} | changes)


def test_nothing_waits_for_the_device():
    """Meta tensors hold no numbers: reading a length, an offset or a position of one raises."""
    meta = torch.device("meta")
    cos = torch.empty(9, 4, device=meta)
    offsets = torch.empty(2, dtype=torch.int32, device=meta)
    bounds = torch.empty(3, dtype=torch.int32, device=meta)
    x = torch.empty(2, 9, 3, 8, device=meta, dtype=torch.float16)
    assert apply_rotary(x, cos, cos, offsets).shape == x.shape
    longest = torch.empty((), dtype=torch.int32, device=meta)
    assert apply_rotary(x[0], cos, cos, offsets, cu_seqlens=bounds, max_seqlen=longest).shape == x[0].shape


@pytest.mark.parametrize(("interleaved", "inplace", "packed"), [*itertools.product(BOOLS, BOOLS, BOOLS)])
def test_gradient_of_apply_rotary_emb(interleaved, inplace, packed):
    cos, sin = tables(12, 12, torch.float64)
    options = {"interleaved": interleaved}
    if packed:
        x = torch.randn(10, 2, 16, dtype=torch.float64, requires_grad=True)
        options |= {"cu_seqlens": torch.tensor([0, 4, 10]), "max_seqlen": 6, "seqlen_offsets": torch.tensor([6, 2])}
    else:
        x = torch.randn(2, 5, 2, 16, dtype=torch.float64, requires_grad=True)
        options |= {"seqlen_offsets": torch.tensor([7, 1])}

    def expected(x):
        parts = [(x[:4], 6), (x[4:], 2)] if packed else [(x[0], 7), (x[1], 1)]
        rows = [reference.rotary(p, cos, sin, torch.arange(len(p)) + o, interleaved) for p, o in parts]
        return torch.cat(rows) if packed else torch.stack(rows)

    weight = torch.randn_like(x)
    (want,) = torch.autograd.grad((expected(x) * weight).sum(), x)
    out = apply_rotary_emb(x, cos, sin, inplace=inplace, **options)
    (got,) = torch.autograd.grad((out * weight).sum(), x)
    assert_close(got, want)
    # The gradient of sum() is expanded and shared: it must not be written to.
    out = apply_rotary_emb(x, cos, sin, inplace=inplace, **options)
    shared = torch.ones_like(out)
    (got,) = torch.autograd.grad(out, x, shared)
    assert torch.equal(shared, torch.ones_like(out))


def test_second_derivative():
    cos, sin = tables(5, 8, torch.float64)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary_emb(x, cos, sin, True, seqlen_offsets=0), x)


def test_gradient_of_parts_rotated_one_after_the_other():
    """q and k are views of one tensor: the second rotation must not spoil the gradient of the first."""
    cos, sin = tables(5, 8, torch.float64)
    leaf = torch.randn(1, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    qkv = leaf * 1
    q = apply_rotary_emb(qkv[:, :, :4], cos, sin, inplace=True)
    k = apply_rotary_emb(qkv[:, :, 4:5], cos, sin, inplace=True)
    weight = torch.randn(1, 5, 5, 8, dtype=torch.float64)
    (got,) = torch.autograd.grad((torch.cat([q, k], 2) * weight).sum(), leaf)
    assert_close(got[:, :, :5], batch_reference(weight, cos, sin, 0, conjugate=True))
    assert torch.equal(torch.cat([q, k], 2), qkv[:, :, :5])


def test_gradient_is_refused_where_the_tensor_is_still_needed():
    cos, sin = tables(5, 8, torch.float32)
    x = torch.randn(1, 5, 6, 8, requires_grad=True)
    out = apply_rotary_emb(torch.tanh(x), cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_compatible_name():
    assert apply_rotary_emb_func is apply_rotary_emb


@pytest.mark.parametrize("interleaved", BOOLS)
def test_apply_rotary_emb_torch(interleaved):
    x = torch.randn(2, 6, 3, 20, dtype=torch.float64)
    cos, sin = tables(6, 16, torch.float64)
    expected = batch_reference(x, cos, sin, 0, interleaved=interleaved)
    assert_close(apply_rotary_emb_torch(x, cos, sin, interleaved), expected)
    per_batch = (cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    assert_close(apply_rotary_emb_torch(x, *per_batch, interleaved), expected)


def qkv_reference(q, k, v, cos, sin, cos_k, sin_k, offsets, interleaved):
    q = batch_reference(q, cos, sin, offsets, interleaved=interleaved)
    k = batch_reference(k, cos_k, sin_k, offsets, interleaved=interleaved)
    return q, k, v.double()


@pytest.mark.parametrize("layout", ["3 heads", "q + 2 k heads", "slice of a larger tensor"])
@pytest.mark.parametrize(("interleaved", "own_k"), [*itertools.product(BOOLS, BOOLS)])
@pytest.mark.parametrize("offsets", [0, 4, torch.tensor([2, 5])], ids=["0", "4", "tensor"])
def test_qkv_in_place(layout, interleaved, own_k, offsets):
    dtype = torch.float64
    cos, sin = tables(16, 12, dtype)
    cos_k, sin_k = tables(16, 12, dtype, seed=1) if own_k else (cos, sin)
    k_tables = (cos_k, sin_k) if own_k else (None, None)
    if layout == "q + 2 k heads":
        leaf = torch.randn(2, 7, 8, 16, dtype=dtype, requires_grad=True)
        num_heads_q = 4
        split = lambda t: (t[:, :, :4], t[:, :, 4:6], t[:, :, 6:])  # noqa: E731
        join = lambda parts: torch.cat(parts, 2)  # noqa: E731
    else:
        leaf = torch.randn(2, 7, 3, 4, 16, dtype=dtype, requires_grad=True)
        num_heads_q = None
        split = lambda t: t.unbind(2)  # noqa: E731
        join = lambda parts: torch.stack(parts, 2)  # noqa: E731
    expected = join(qkv_reference(*split(leaf), cos, sin, cos_k, sin_k, offsets, interleaved))
    weight = torch.randn_like(leaf)
    (want,) = torch.autograd.grad((expected * weight).sum(), leaf)

    qkv = leaf * 1
    if layout == "slice of a larger tensor":
        wide = torch.cat([leaf, leaf], dim=-1).detach()
        wide[..., :16] = leaf.detach()
        qkv = wide[..., :16].requires_grad_()
    source = qkv
    out = apply_rotary_emb_qkv_(qkv, cos, sin, *k_tables, interleaved, offsets, num_heads_q)
    assert out.data_ptr() == source.data_ptr()
    assert_close(out, expected)
    (got,) = torch.autograd.grad((out * weight).sum(), leaf if layout != "slice of a larger tensor" else source)
    assert_close(got, want)


@pytest.mark.parametrize("interleaved", BOOLS)
@pytest.mark.parametrize("offsets", [3, torch.tensor([2, 5])], ids=["3", "tensor"])
def test_kv_in_place(interleaved, offsets):
    cos, sin = tables(16, 16, torch.float64)
    leaf = torch.randn(2, 7, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    k = batch_reference(leaf[:, :, 0], cos, sin, offsets, interleaved=interleaved)
    expected = torch.stack([k, leaf[:, :, 1]], 2)
    weight = torch.randn_like(leaf)
    (want,) = torch.autograd.grad((expected * weight).sum(), leaf)
    kv = leaf * 1
    out = apply_rotary_emb_kv_(kv, cos, sin, interleaved=interleaved, seqlen_offsets=offsets)
    assert out.data_ptr() == kv.data_ptr()
    assert_close(out, expected)
    (got,) = torch.autograd.grad((out * weight).sum(), leaf)
    assert_close(got, want)


@pytest.mark.parametrize("function", [apply_rotary_emb_qkv_, apply_rotary_emb_kv_])
def test_backward_pass_leaves_the_gradient_it_is_given(function):
    cos, sin = tables(7, 8, torch.float32)
    leaf = torch.randn(2, 7, 3 if function is apply_rotary_emb_qkv_ else 2, 3, 8, requires_grad=True)
    out = function(leaf * 1, cos, sin)
    given = torch.randn_like(out)
    before = given.clone()
    out.backward(given)
    assert torch.equal(given, before)
    # That of sum() is one number, expanded.
    assert_close(torch.autograd.grad(function(leaf * 1, cos, sin).sum(), leaf)[0][:, :, -1], torch.ones(2, 7, 3, 8))


def test_malformed_packed_tensors():
    cos, sin = tables(7, 8, torch.float32)
    with pytest.raises(ValueError, match="qkv must be"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 2, 3, 8), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q must be given"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 6, 8), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 6, 8), cos, sin, num_heads_q=3)
    with pytest.raises(ValueError, match="kv must be"):
        apply_rotary_emb_kv_(torch.randn(2, 7, 3, 3, 8), cos, sin)


def module_tables(dim, rows, base=10000.0, scale_base=None):
    """The tables in fp64 from the definition: `(cos, sin)` for q and for k, before any cast."""
    i = torch.arange(dim // 2, dtype=torch.float64)
    p = torch.arange(rows, dtype=torch.float64)[:, None]
    angle = p * base ** (-2 * i / dim)
    if scale_base is None:
        return angle.cos(), angle.sin(), angle.cos(), angle.sin()
    scale = ((2 * i + 0.4 * dim) / (1.4 * dim)) ** ((p - rows // 2) / scale_base)
    return angle.cos() * scale, angle.sin() * scale, angle.cos() / scale, angle.sin() / scale


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("form", ["qkv", "num_heads_q", "q + kv"])
@pytest.mark.parametrize(("interleaved", "offset"), [(False, 0), (True, 3), (False, torch.tensor([1, 4]))])
def test_module(scale_base, form, interleaved, offset):
    rotary = RotaryEmbedding(12, base=500.0, interleaved=interleaved, scale_base=scale_base)
    rows = 20 if isinstance(offset, torch.Tensor) else 9 + offset
    max_seqlen = rows if isinstance(offset, torch.Tensor) else None
    cos, sin, cos_k, sin_k = module_tables(12, rows, 500.0, scale_base)
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    if form == "qkv":
        q = q[:, :, :2]
    expected = qkv_reference(q, k, v, cos, sin, cos_k, sin_k, offset, interleaved)
    if form == "qkv":
        out = rotary(torch.stack([q, k, v], 2), seqlen_offset=offset, max_seqlen=max_seqlen).unbind(2)
    elif form == "num_heads_q":
        out = rotary(torch.cat([q, k, v], 2), seqlen_offset=offset, max_seqlen=max_seqlen, num_heads_q=4)
        out = out.split([4, 2, 2], dim=2)
    else:
        out, kv = rotary(q.clone(), torch.stack([k, v], 2), seqlen_offset=offset, max_seqlen=max_seqlen)
        out = (out, *kv.unbind(2))
    for got, want in zip(out, expected, strict=True):
        assert_close(got, want, scale=5)  # fp32 angles


def test_module_gradient():
    rotary = RotaryEmbedding(8)
    leaf = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    weight = torch.randn(1, 5, 3, 2, 8)
    (got,) = torch.autograd.grad((rotary(leaf * 1) * weight).sum(), leaf)
    cos, sin, *_ = module_tables(8, 5)
    for i, conjugate in ((0, True), (1, True)):
        assert_close(got[:, :, i], batch_reference(weight[:, :, i], cos, sin, 0, conjugate=conjugate), scale=5)
    assert torch.equal(got[:, :, 2], weight[:, :, 2])


def test_tables_grow_and_follow_dtype():
    rotary = RotaryEmbedding(8)
    rotary(torch.randn(1, 6, 3, 1, 8))
    first = rotary._cos_cached
    rotary(torch.randn(1, 4, 3, 1, 8))
    assert rotary._cos_cached is first
    rotary(torch.randn(1, 7, 3, 1, 8))
    assert rotary._cos_cached.shape == (12, 4)  # doubled
    assert torch.equal(rotary._cos_cached[:6], first)
    rotary(torch.randn(1, 3, 3, 1, 8).half())
    assert rotary._cos_cached.dtype == torch.float16
    with torch.inference_mode():
        rotary = RotaryEmbedding(8)
        rotary(torch.randn(1, 6, 3, 1, 8))
    x = torch.randn(1, 6, 3, 1, 8, requires_grad=True)
    rotary(x * 1).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_base", [None, 512])
def test_positions_stay_in_fp32_when_the_module_is_cast(dtype, scale_base):
    rotary = RotaryEmbedding(16, scale_base=scale_base).to(dtype)
    rotary(torch.zeros(1, 3001, 3, 1, 16, dtype=dtype))
    tables = module_tables(16, 3001, scale_base=scale_base)
    cached = [rotary._cos_cached, rotary._sin_cached, rotary._cos_k_cached, rotary._sin_k_cached]
    for got, want in zip(cached[: 4 if scale_base else 2], tables, strict=False):
        assert got.dtype == dtype
        assert_rounded_once(got[-1], want[-1], noise=3e-4)  # of fp32 angles up to 3000


def test_tensor_offset_needs_tables():
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        RotaryEmbedding(8)(torch.randn(2, 6, 3, 1, 8), seqlen_offset=torch.tensor([1, 2]))


def test_module_state_copies_and_pickles():
    rotary = RotaryEmbedding(8, scale_base=512, interleaved=True)
    assert rotary.state_dict() == {}
    assert dict(rotary.named_buffers()).keys() == {"inv_freq", "scale"}
    x = torch.randn(1, 6, 3, 1, 8)
    want = rotary(x.clone())
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(other(x.clone()), want)
    assert RotaryEmbedding.__module__ == "flash_attn.layers.rotary"
    assert pickle.loads(pickle.dumps(apply_rotary_emb)) is apply_rotary_emb
    assert issubclass(ApplyRotaryEmb, torch.autograd.Function)


def test_relative_positions():
    """What rotary embedding is for: q k depends on the distance alone, in both flavours and with xPos."""
    for interleaved, scale_base in itertools.product(BOOLS, (None, 64)):
        rotary = RotaryEmbedding(16, interleaved=interleaved, scale_base=scale_base)
        q, k = torch.randn(2, 1, 1, 1, 16)
        qkv = torch.stack([q.expand(1, 30, 1, 16), k.expand(1, 30, 1, 16), k.expand(1, 30, 1, 16)], 2)
        q, k, _ = rotary(qkv).unbind(2)
        scores = torch.einsum("bihd,bjhd->ij", q, k)
        torch.testing.assert_close(scores[10:20, 5:15], scores[15:25, 10:20], rtol=1e-4, atol=1e-4)


def test_packed_qkv_through_a_subclass():
    """The pattern of ModernBERT in transformers 4.57: a subclass that rotates packed q and k through a view."""

    class Unpadded(RotaryEmbedding):
        def __init__(self, dim, max_seqlen):
            super().__init__(dim=dim, base=160000.0, device=torch.device("cpu"), interleaved=False)
            self._update_cos_sin_cache(max_seqlen, device=torch.device("cpu"), dtype=torch.float32)

        def forward(self, qkv, cu_seqlens, max_seqlen):
            qk = qkv[:, :2].view(qkv.shape[0], -1, qkv.shape[-1])
            lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            apply_rotary(qk, self._cos_cached, self._sin_cached, seqlen_offsets=0, **lengths, inplace=True)
            return qkv

    qkv = torch.randn(9, 3, 2, 16)
    before = qkv.clone()
    Unpadded(16, 32)(qkv, torch.tensor([0, 5, 9], dtype=torch.int32), 5)
    cos, sin, *_ = module_tables(16, 5, base=160000.0)
    for part in (slice(5), slice(5, 9)):
        for i in range(2):
            tokens = before[part, i]
            assert_close(qkv[part, i], reference.rotary(tokens, cos, sin, torch.arange(len(tokens))), scale=5)
    assert torch.equal(qkv[:, 2], before[:, 2])


@pytest.mark.parametrize("interleaved", BOOLS)
def test_compiles_without_a_break_for_any_length(interleaved):
    """Also in place of parts, and what else reads the memory sees it."""
    rotary = RotaryEmbedding(16, interleaved=interleaved)
    rotary(torch.zeros(1, 40, 3, 1, 16))  # the tables

    def step(x):
        qkv = rotary(x * 1)
        parts = x * 1
        q = apply_rotary_emb(parts[:, :, 0], rotary._cos_cached, rotary._sin_cached, interleaved, inplace=True)
        k = apply_rotary_emb(parts[:, :, 1], rotary._cos_cached, rotary._sin_cached, interleaved, inplace=True)
        return qkv + torch.stack([q, k, k], 2) + parts.detach()

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for length in (9, 8, 17, 30):
        x = torch.randn(2, length, 3, 2, 16, requires_grad=True)
        want, got = step(x), compiled(x)
        assert_close(got, want.double(), scale=2)
        weight = torch.randn_like(x)
        assert_close(*(torch.autograd.grad(out, x, weight)[0] for out in (got, want)), scale=2)
    assert len(graphs) <= 2


def test_the_kernel_rotates_forward_and_backward(monkeypatch):
    """The layer's functions on the Metal kernel, which stands for that of a Mac: no operation of torch rotates."""
    monkeypatch.setattr(trace, "enabled", True)
    trace.clear()
    cos, sin = tables(12, 16, torch.float32)
    x, qkv = torch.randn(2, 9, 3, 16), torch.randn(2, 9, 3, 2, 16)
    dout = torch.randn(2, 9, 3, 16)
    with metal_on():
        leaf, packed = x.clone().requires_grad_(), qkv.clone().requires_grad_()
        rotated = apply_rotary_emb(leaf, cos, sin, seqlen_offsets=torch.tensor([3, 1]))
        (dx,) = torch.autograd.grad(rotated, leaf, dout)
        both = apply_rotary_emb_qkv_(packed.clone(), cos, sin, interleaved=True)
        (dqkv,) = torch.autograd.grad(both, packed, qkv)
    assert trace.steps == {("rotary embedding", "Metal"): 4}
    trace.clear()
    assert_close(rotated, batch_reference(x, cos, sin, torch.tensor([3, 1])))
    assert_close(dx, batch_reference(dout, cos, sin, torch.tensor([3, 1]), conjugate=True))
    for got, conjugate in ((both, False), (dqkv, True)):
        turned = batch_reference(qkv[:, :, :2].flatten(2, 3), cos, sin, 0, interleaved=True, conjugate=conjugate)
        assert_close(got[:, :, :2].flatten(2, 3), turned)
        assert torch.equal(got[:, :, 2], qkv[:, :, 2])
