"""torch.jit.trace: a graph holds for other lengths, values and derivatives; what it would not hold for raises."""

import pytest
import torch

from flash_attn_mps import dispatch, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.problem import with_mask, with_sinks

pytestmark = pytest.mark.filterwarnings(
    "ignore:Converting a tensor:torch.jit.TracerWarning", "ignore::DeprecationWarning"
)

HEADS, HEADS_K, DIM = 4, 2, 8
CALLS = [
    {},
    {"causal": True},
    {"window_size": (6, 1)},  # open on the left at the traced lengths
    {"softcap": 2.0, "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    {"softmax_scale": 0.3, "deterministic": True},
]


def truth(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, softmax_scale=None, **_):
    """In float64, one query at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // HEADS_K, 2) for x in (k, v))
    left, right = window_size[0], 0 if causal else window_size[1]
    out = torch.zeros_like(q)
    for i in range(q.shape[1]):
        place = i + k.shape[1] - q.shape[1]
        keys = [j for j in range(k.shape[1]) if (left < 0 or j >= place - left) and (right < 0 or j <= place + right)]
        if not keys:
            continue
        s = torch.einsum("bhd,bnhd->bhn", q[:, i], k[:, keys]) * (softmax_scale or DIM**-0.5)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            s = s - alibi_slopes.double()[:, None] * (torch.tensor(keys) - place).abs()
        out[:, i] = torch.einsum("bhn,bnhd->bhd", s.softmax(-1), v[:, keys])
    return out


class Attention(torch.nn.Module):
    """With parameters that require gradients."""

    def __init__(self, **arguments):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.arguments = arguments

    def forward(self, q, k, v):
        return flash_attn_func(q * self.scale, k, v, **self.arguments)


def tensors(batch, seqlen_q, seqlen_k, dtype=torch.float32):
    shapes = (seqlen_q, HEADS), (seqlen_k, HEADS_K), (seqlen_k, HEADS_K)
    return [torch.randn(batch, *shape, DIM, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: "+".join(arguments) or "plain")
def test_a_trace_holds_for_other_lengths(arguments):
    torch.manual_seed(0)
    module = Attention(**arguments)
    traced = torch.jit.trace(module, tensors(2, 5, 5))
    for sizes in ((2, 5, 5), (1, 13, 13), (3, 4, 9), (2, 9, 4), (1, 1, 30)):
        q, k, v = tensors(*sizes)
        out, right = traced(q, k, v), truth(q * module.scale, k, v, **arguments)
        assert torch.allclose(out.double(), right, atol=1e-5), sizes
        weight = torch.randn_like(out)
        inputs = (q, k, v, module.scale)
        grads = torch.autograd.grad((out * weight).sum(), inputs)
        for grad, expected in zip(grads, torch.autograd.grad((right * weight).sum(), inputs), strict=True):
            assert torch.allclose(grad, expected, atol=1e-4, rtol=1e-4), sizes


def test_the_dtype_of_a_trace():
    q, k, v = tensors(2, 5, 7, torch.float16)
    traced = torch.jit.trace(lambda q, k, v: flash_attn_func(q, k, v, causal=True), (q, k, v))
    out = traced(*tensors(1, 3, 6, torch.float16))
    assert out.dtype == torch.float16
    assert out.is_contiguous()


def test_what_a_trace_would_get_wrong_raises():
    q = torch.randn(6, HEADS, DIM)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    cache, lengths = torch.randn(2, 8, HEADS, DIM), torch.tensor([3, 5], dtype=torch.int32)
    calls = {
        "varlen": (lambda q, cu: flash_attn_varlen_func(q, q, q, cu, cu, 4, 4), (q, bounds)),
        "dropout": (lambda q: flash_attn_func(q, q, q, dropout_p=0.5), (q[None],)),
        "seqused": (lambda q, n: flash_attn_with_kvcache(q, cache, cache, cache_seqlens=n), (cache[:, :1], lengths)),
    }
    for name, (function, arguments) in calls.items():
        with pytest.raises(
            NotImplementedError, match=rf"{name} cannot be recorded by torch\.jit\.trace.*torch\.export"
        ):
            torch.jit.trace(function, arguments)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_and_sinks(kind):
    torch.manual_seed(0)

    def attend(q, k, v, mask, sinks):
        result = dispatch.attention(with_sinks(with_mask(dense(q, k, v, CallOptions(want_lse=True)), mask), sinks))
        return result.out, result.lse

    def example(batch, seqlen_q, seqlen_k):
        mask = torch.rand(batch, 1, seqlen_q, seqlen_k) > 0.4
        mask[:, :, 0] = False  # a query that sees no key
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return *tensors(batch, seqlen_q, seqlen_k), mask if kind is torch.bool else added, torch.randn(HEADS)

    traced = torch.jit.trace(attend, example(2, 5, 5))
    for sizes in ((1, 3, 7), (3, 8, 2)):
        q, k, v, mask, sinks = example(*sizes)
        out, lse = traced(q, k, v, mask, sinks)
        hidden = ~mask if kind is torch.bool else mask == -torch.inf
        k, v = (x.repeat_interleave(HEADS // HEADS_K, 2).double() for x in (k, v))
        s = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / DIM**0.5
        s = torch.cat([s.masked_fill(hidden, -torch.inf), sinks.double()[:, None, None].expand(*s.shape[:3], 1)], -1)
        right = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1)[..., :-1], v)
        assert torch.allclose(out.double(), right, atol=1e-5)
        assert torch.allclose(lse.double(), s.logsumexp(-1), atol=1e-5)
