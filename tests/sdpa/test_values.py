"""What this package computes in the place of torch: torch's semantics, by the error rule, on both tiers of a Mac."""

import math

import pytest
import torch
import torch.nn.functional as F

from flash_attn_mps import sdpa
from flash_attn_mps.sdpa.measured import NEVER
from flash_attn_mps.sdpa.settings import GIB
from tests.sdpa.exact import assert_right, in_dtype

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
ORIGINAL = F.scaled_dot_product_attention


def qkv(q, k=None, v=None, dtype=HALF):
    k = q if k is None else k
    return [torch.randn(shape).to(dtype) for shape in (q, k, k if v is None else v)]


def called(tensors, **how):
    """The result with the kernel registered, of which no part may be torch's."""
    with sdpa.installed():
        out = F.scaled_dot_product_attention(*tensors, **how)
    stats = sdpa.stats()
    assert (len(stats["taken"]), stats["left"], stats["fell through"]) == (1, {}, {})
    return out


def bool_mask(*shape):
    """Some keys hidden from all, some queries blind."""
    mask = torch.rand(shape) > 0.4
    if shape[-1] > 1:
        mask[..., 3] = False
    if shape[-2] > 1:
        mask[..., 2, :] = False
    return mask


def added(mask, dtype, hidden=-math.inf):
    return torch.randn(mask.shape).to(dtype).masked_fill(~mask, hidden)


SHAPES = {
    "4-D": qkv((2, 4, 37, 64)),
    "3-D": qkv((4, 37, 64)),
    "5-D": qkv((2, 2, 3, 20, 64)),
    "more keys": qkv((1, 2, 19, 64), (1, 2, 50, 64)),
    "more queries": qkv((1, 2, 50, 64), (1, 2, 19, 64)),
    "one query": qkv((1, 2, 1, 64), (1, 2, 39, 64)),
    "uneven head dims": qkv((1, 2, 33, 40), (1, 2, 33, 40), (1, 2, 33, 24)),
    "one batch of keys": qkv((3, 2, 20, 64), (1, 2, 30, 64)),
    "one head of keys": qkv((2, 4, 20, 64), (2, 1, 30, 64)),
    "float32": qkv((2, 2, 37, 64), dtype=FP32),
    "bfloat16": qkv((2, 2, 37, 64), dtype=BF16),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(tier, name, is_causal):
    out = called(SHAPES[name], is_causal=is_causal)
    assert_right(out, SHAPES[name], {"is_causal": is_causal})


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": bool_mask(6, 21, 30)}])
def test_grouped_heads(tier, how):
    tensors = qkv((2, 6, 21, 64), (2, 2, 30, 64))
    assert_right(called(tensors, enable_gqa=True, **how), tensors, {"enable_gqa": True, **how})
    tensors = qkv((6, 21, 64), (2, 30, 64))
    sdpa.reset()
    assert_right(called(tensors, enable_gqa=True, **how), tensors, {"enable_gqa": True, **how})


MASKS = [
    (21, 30),
    (1, 30),
    (21, 1),
    (4, 21, 30),
    (1, 1, 30),
    (2, 4, 21, 30),
    (2, 1, 1, 30),
    (2, 1, 21, 30),
    (1, 4, 1, 1),
]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
def test_masks(tier, shape, kind):
    tensors = qkv((2, 4, 21, 64), (2, 4, 30, 64))
    mask = bool_mask(*shape)
    mask = {"bool": mask, "same": added(mask, HALF), "float32": added(mask, FP32)}[kind]
    out = called(tensors, attn_mask=mask)
    assert_right(out, tensors, {"attn_mask": mask})


@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
@pytest.mark.parametrize("kind", ["bool", "-inf", "min"])
def test_a_query_that_sees_nothing_gives_what_torch_gives(tier, dtype, kind):
    """Zeros; but the mean of all values where the mask is the least finite number."""
    tensors = [tensor.to(dtype) for tensor in qkv((1, 2, 9, 64))]
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    hidden = {"bool": None, "-inf": -math.inf, "min": torch.finfo(FP32).min}[kind]
    if hidden is not None:
        mask = torch.zeros(9, 9).masked_fill(~mask, hidden)
    row, theirs = called(tensors, attn_mask=mask)[:, :, 4], ORIGINAL(*tensors, attn_mask=mask)[:, :, 4]
    assert torch.equal(theirs, torch.zeros_like(theirs)) is (kind != "min"), "this torch has it otherwise"
    torch.testing.assert_close(row, theirs, atol=0 if kind != "min" else 2 * torch.finfo(dtype).eps, rtol=0)


def test_views_are_not_copied_or_changed(tier):
    packed = torch.randn(2, 37, 3, 4, 64).half()
    tensors = [t.transpose(1, 2) for t in packed.unbind(2)]
    before = packed.clone()
    assert_right(called(tensors, is_causal=True), tensors, {"is_causal": True})
    assert torch.equal(packed, before)


def test_the_layout_is_that_of_fused_kernels_on_other_devices(tier):
    """`(batch, seqlen, heads, head_dim)` in memory: the model's transpose and reshape after it cost nothing."""
    assert called(qkv((2, 4, 37, 64))).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"attn_mask": bool_mask(2, 1, 21, 30)}])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_gradients(as_mps, given, how, heads_k):
    given(budget=0)  # with gradients, memory and known errors alone are reasons
    tensors = [t.requires_grad_() for t in qkv((2, 4, 21, 64), (2, heads_k, 30, 64), dtype=FP32)]
    how = {**how, "enable_gqa": heads_k != 4}
    out = called(tensors, **how)
    dout = torch.randn_like(out)
    assert_right(out, tensors, how)
    ours = torch.autograd.grad(out, tensors, dout)
    exact = torch.autograd.grad(in_dtype(torch.float64, tensors, how), tensors, dout.double())
    plain = torch.autograd.grad(in_dtype(FP32, tensors, how), tensors, dout)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        allowed = 2 * (theirs.double() - true).abs().max() + 1e-5
        assert (mine.double() - true).abs().max() <= allowed


BIASES = {"heads": (4, 21, 30), "keys": (1, 30), "batch and queries": (2, 1, 21, 1), "all": (2, 4, 21, 30)}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("leading", [(2,), ()], ids=["4-D", "3-D"])
def test_gradient_of_a_bias(tier, given, shape, alone, leading):
    """Of its shape, also where nothing else needs one."""
    given(budget=0)
    shape = shape if leading else shape[-3:]
    tensors = [t.requires_grad_(not alone) for t in qkv((*leading, 4, 21, 64), (*leading, 4, 30, 64), dtype=FP32)]
    bias = torch.randn(shape).masked_fill_(torch.rand(shape) < 0.1, -math.inf).requires_grad_()
    out = called(tensors, attn_mask=bias)
    wanted = [bias] if alone else [*tensors, bias]
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, wanted, dout)
    exact = torch.autograd.grad(ORIGINAL(*(t.double() for t in tensors), bias.double()), wanted, dout.double())
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_bias_under_autocast(as_mps, given):
    """Autocast casts the bias, as torch does; its gradient has the dtype of the parameter."""
    given(budget=0)
    tensors, bias = qkv((2, 4, 21, 64), dtype=FP32), torch.randn(4, 21, 21, requires_grad=True)
    with torch.autocast("cpu", BF16):
        out = called(tensors, attn_mask=bias)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), bias)
    (expected,) = torch.autograd.grad(ORIGINAL(*tensors, attn_mask=bias).square().sum(), bias)
    assert gradient.dtype == FP32
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.1)


def test_dropout_is_seeded_and_unbiased(as_mps, given):
    given(budget=0)
    tensors = qkv((1, 2, 64, 16), dtype=FP32)
    tensors[2] = torch.ones_like(tensors[2])

    def drawn(seed):
        torch.manual_seed(seed)
        sdpa.reset()
        return called(tensors, dropout_p=0.25)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    mean = torch.stack([drawn(seed)[..., 0] for seed in range(20)]).mean()
    assert abs(mean - 1) < 0.02
    assert drawn(1).std() > 0.01


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_dropout_drops_probabilities_and_scales_the_rest(as_mps, given, in_a_graph):
    given(budget=0)
    query, key, _ = qkv((1, 2, 64, 16), dtype=FP32)
    probabilities = (query @ key.mT / 4).softmax(-1)
    identity = torch.eye(64).expand(1, 2, 64, 64)  # then the output is what probabilities have become

    def attend(value):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.25)

    with sdpa.installed(), torch.no_grad():
        out = (torch.compile(attend, backend="eager", fullgraph=True) if in_a_graph else attend)(identity)
    assert len(sdpa.stats()["taken"]) == 1
    kept = out != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(out, kept * probabilities / 0.75)


def test_autocast_casts_as_torch_does(tier):
    tensors = qkv((2, 4, 37, 64), dtype=FP32)
    mask = added(bool_mask(37, 37), FP32)
    with torch.autocast("cpu", BF16):
        out = called(tensors, attn_mask=mask)
        assert ORIGINAL(*tensors, attn_mask=mask).dtype == out.dtype == BF16
    assert_right(out, [t.to(BF16) for t in tensors], {"attn_mask": mask.to(BF16)})


def test_inference_mode(tier):
    with torch.inference_mode():
        tensors = qkv((2, 4, 37, 64))
        assert_right(called(tensors), tensors, {})


def test_the_plain_function_needs_no_installation(tier):
    tensors = qkv((2, 4, 37, 64))
    assert_right(sdpa.scaled_dot_product_attention(*tensors, is_causal=True), tensors, {"is_causal": True})
    assert not sdpa.is_installed()
    assert sum(sdpa.stats()["taken"].values()) == 1


def test_a_hazard_is_taken_even_where_no_metal_kernel_serves(metal, given):
    given(torch=(2, 11), budget=NEVER, min_seq=NEVER, fast_min_seq=NEVER)
    tensors = qkv((1, 1, 20, 300), (1, 1, 20, 300), (1, 1, 20, 20))
    assert_right(called(tensors), tensors, {})
    assert sdpa.stats()["taken"] == {"pytorch#176767": 1}


def test_beyond_the_budget_in_memory_proportional_to_the_length(as_mps, given):
    given(torch=(2, 12), budget=GIB // 1024, min_seq=NEVER)
    tensors = qkv((1, 1, 512, 16), dtype=FP32)
    assert_right(called(tensors), tensors, {})
    assert sdpa.stats()["taken"] == {"memory": 1}
