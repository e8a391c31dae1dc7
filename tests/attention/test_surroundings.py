"""What a program has set around the call: autocast, default dtype, default device, fake tensors, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_mps.frontends import fa2

from . import oracle
from .layouts import randn
from .test_varlen import cumulative

CU = cumulative([9, 11])
LENGTHS = torch.tensor([7, 10], dtype=torch.int32)
TABLE = torch.tensor([[1], [0]], dtype=torch.int32)


def flat(*tensors):
    return [x.flatten(0, 1) for x in tensors]


CALLS = {
    "plain": fa2.flash_attn_func,
    "causal": lambda q, k, v: fa2.flash_attn_func(q, k, v, causal=True),
    "features": lambda q, k, v: fa2.flash_attn_func(
        q, k, v, softcap=2.0, window_size=(4, 2), alibi_slopes=SLOPES, softmax_scale=0.3
    ),
    "lse": lambda q, k, v: fa2.flash_attn_func(q, k, v, return_attn_probs=True)[0],
    "dropout": lambda q, k, v: fa2.flash_attn_func(q, k, v, dropout_p=0.3),
    "varlen": lambda q, k, v: fa2.flash_attn_varlen_func(*flat(q, k, v), CU, CU, 11, 11, causal=True),
    "varlen-pages": lambda q, k, v: fa2.flash_attn_varlen_func(
        q.flatten(0, 1), k, v, CU, CU, 11, 11, block_table=PAGES
    ),
    "kvpacked": lambda q, k, v: fa2.flash_attn_kvpacked_func(q, torch.stack((k, v), 2)),
    "kvcache": lambda q, k, v: fa2.flash_attn_with_kvcache(
        q, k.clone(), v.clone(), k[:, :2], v[:, :2], cache_seqlens=LENGTHS - 2, causal=True
    ),
    "kvcache-pages": lambda q, k, v: fa2.flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS, block_table=TABLE),
    "kvcache-rotary": lambda q, k, v: fa2.flash_attn_with_kvcache(
        q, k.clone(), v.clone(), k[:, :2], v[:, :2], COS.to(q.dtype), COS.to(q.dtype), cache_seqlens=3, causal=True
    ),
}
SLOPES = torch.tensor([0.5, 0.25])
PAGES = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
COS = torch.linspace(0, 1, 128).view(16, 8)
DIFFERENTIABLE = [name for name in CALLS if "kvcache" not in name]


def leaves(dtype=torch.float32):
    return [randn(2, 10, 2, 16, dtype=dtype).requires_grad_() for _ in range(3)]


def forward_and_backward(name, qkv):
    torch.manual_seed(7)
    out = CALLS[name](*qkv)
    if name not in DIFFERENTIABLE:
        return (out,)
    return out, *torch.autograd.grad(out.square().sum(), qkv)


# torch.stack, which makes the packed tensor, is itself subject to autocast.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "kvpacked"])
@pytest.mark.parametrize(("dtype", "inner"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_autocast_changes_nothing(name, dtype, inner):
    """FlashAttention's ops compute in the dtype of their inputs; autocast would take the fp32 accumulation away."""
    qkv = leaves(dtype)
    expected = forward_and_backward(name, qkv)
    with torch.autocast("cpu", dtype=inner):
        got = forward_and_backward(name, qkv)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(name, default):
    qkv = leaves()
    expected = forward_and_backward(name, qkv)
    torch.set_default_dtype(default)
    try:
        got = forward_and_backward(name, qkv)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == wanted.dtype
        if name != "dropout":  # random numbers may be drawn in another dtype
            torch.testing.assert_close(mine, wanted)


def test_drop_rate_under_a_bf16_default():
    """Uniform numbers drawn in bf16 know only 256 values: a rate of 0.001 would become 1 / 256."""
    q = torch.zeros(1, 700, 2, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, _, s_dmask = fa2.flash_attn_func(q, q, q, dropout_p=0.001, return_attn_probs=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.signbit(s_dmask).float().mean().item() == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("name", CALLS)
def test_default_device_changes_nothing(name):
    """`torch.set_default_device("mps")` is common on Macs, and CPU tensors must still work. Meta stands for it."""
    qkv = leaves()
    expected = forward_and_backward(name, qkv)
    with torch.device("meta"):
        got = forward_and_backward(name, qkv)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.device.type == "cpu"
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_parameters(name):
    """nn.Parameter is what a learned query or a prompt is."""
    qkv = leaves()
    expected = forward_and_backward(name, qkv)
    got = forward_and_backward(name, [torch.nn.Parameter(x.detach()) for x in qkv])
    for mine, wanted in zip(got, expected, strict=True):
        assert type(mine) is torch.Tensor
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", [n for n in CALLS if "pages" not in n])
def test_fake_tensors_have_the_right_shapes(name):
    qkv = leaves()
    expected = forward_and_backward(name, qkv)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in qkv]
        got = forward_and_backward(name, fakes)
    for mine, wanted in zip(got, expected, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (wanted.shape, wanted.dtype, wanted.device)


def test_fake_tables():
    """All tensors fake, the tables of pages too: nobody can look into them."""
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.detach()) for x in leaves())
        table, lengths, cu = (mode.from_tensor(x) for x in (TABLE, LENGTHS, CU))
        out = fa2.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)
        packed = fa2.flash_attn_varlen_func(q.flatten(0, 1), k, v, cu, cu, 11, 11, block_table=table)
    assert out.shape == (2, 10, 2, 16)
    assert packed.shape == (20, 2, 16)


@pytest.mark.parametrize("name", ["plain", "causal", "features", "varlen", "kvpacked", "kvcache"])
def test_compiled(name):
    """As Hugging Face models are compiled; a graph break is allowed, another number is not."""
    qkv = leaves()
    expected = forward_and_backward(name, qkv)
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], backend="aot_eager")
    out = compiled(*qkv)
    got = (out, *torch.autograd.grad(out.square().sum(), qkv)) if name in DIFFERENTIABLE else (out,)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_threads():
    """Eight threads that attend at once get what one gets alone."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [[randn(1, 60, 2, 16, dtype=torch.float32) for _ in range(3)] for _ in range(8)]
    expected = [fa2.flash_attn_func(*qkv, causal=True, softcap=3.0) for qkv in batches]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda qkv: fa2.flash_attn_func(*qkv, causal=True, softcap=3.0), batches))
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(got, expected, strict=True))


def test_learned_scale_and_slopes_are_not_silently_constant():
    """Neither gets a gradient from the kernels: a call that asks for one is refused, or right."""
    q, k, v = (x.detach() for x in leaves())
    for name, learned in (("softmax_scale", torch.tensor(0.3)), ("alibi_slopes", torch.tensor([0.5, 0.1]))):
        learned.requires_grad_()
        try:
            (mine,) = torch.autograd.grad(fa2.flash_attn_func(q, k, v, **{name: learned}).sum(), learned)
        except (ValueError, NotImplementedError) as refusal:
            assert name in str(refusal)
            continue
        step = 1e-3
        moved = [
            oracle.dense(q.double(), k.double(), v.double(), **{name: learned.detach() + sign * step}).out.sum()
            for sign in (1, -1)
        ]
        assert mine.sum().item() == pytest.approx((moved[0] - moved[1]).item() / (2 * step), rel=1e-2)
