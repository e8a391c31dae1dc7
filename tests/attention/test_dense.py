"""flash_attn_func over dtypes, lengths, head dims, heads, masks, features and strides, forward and backward."""

import pytest
import torch

from flash_attn_mps.frontends.fa2 import flash_attn_func

from . import oracle
from .layouts import laid_out, randn, random_dout
from .pairwise import case_id, pairwise
from .rule import verify

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MASKS = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window_size": (16, -1)},
    "right": {"window_size": (-1, 9)},
    "both": {"window_size": (20, 5)},
    "self": {"window_size": (0, 0)},
    "open": {"window_size": (-1, -1)},
    "wider-than-all": {"window_size": (10**6, 10**6)},
    "causal-left": {"causal": True, "window_size": (12, -1)},
    "causal-wins": {"causal": True, "window_size": (12, 7)},
}

CASES = pairwise(
    lengths=[(1, 1), (7, 7), (64, 64), (113, 113), (1, 113), (113, 1), (7, 64), (64, 7), (64, 113), (113, 64)],
    dims=[(d, d) for d in (1, 8, 40, 64, 72, 96, 128, 192, 256, 512)] + [(192, 128), (8, 40), (64, 1), (1, 512)],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    alibi=[None, "H", "BH"],
    scale=[None, 0.25, "tensor"],
    layout=["contiguous", "transposed", "packed", "expanded", "offset", "strided_last"],
    dout=["contiguous", "transposed", "expanded", "strided_last"],
    wanted=["qkv", "q", "k", "v", "kv"],
    probs=[False, True],
)

LONG_CASES = pairwise(
    lengths=[(1000, 1000), (113, 1000), (1000, 113), (1, 1000), (1000, 64)],
    dims=[(64, 64), (128, 128), (72, 40)],
    dtype=DTYPES,
    heads=[(1, 1), (2, 1)],
    mask=["none", "causal", "both", "causal-left"],
    softcap=[0.0, 30.0],
    alibi=[None, "H"],
    layout=["contiguous", "transposed"],
    probs=[False, True],
)


def alibi_slopes(kind, batch, heads):
    slopes = 2.0 ** -(1 + torch.arange(batch * heads).float() % 7)
    return {None: None, "H": slopes[:heads], "BH": slopes.view(batch, heads)}[kind]


def run(case, batch):
    (seqlen_q, seqlen_k), (dim, dim_v), (heads, heads_k) = case["lengths"], case["dims"], case["heads"]
    dtype, layout = case["dtype"], case["layout"]
    tensors = {
        "q": randn(batch, seqlen_q, heads, dim, dtype=dtype, layout=layout),
        "k": randn(batch, seqlen_k, heads_k, dim, dtype=dtype, layout=layout),
        "v": randn(batch, seqlen_k, heads_k, dim_v, dtype=dtype, layout=layout),
    }
    how = {
        **MASKS[case["mask"]],
        "softcap": case["softcap"],
        "alibi_slopes": alibi_slopes(case["alibi"], batch, heads),
        "softmax_scale": torch.tensor(0.125) if case.get("scale") == "tensor" else case.get("scale"),
    }
    result = verify(
        lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=case["probs"], **how),
        lambda q, k, v: oracle.dense(q, k, v, **how),
        tensors,
        dout=random_dout(case.get("dout", "contiguous")),
        wanted=case.get("wanted", "qkv"),
    )
    assert isinstance(result, tuple) == case["probs"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_and_backward(case):
    run(case, batch=2)


@pytest.mark.parametrize("case", LONG_CASES, ids=case_id)
def test_forward_and_backward_at_length(case):
    run(case, batch=1)


@pytest.mark.parametrize("window_size", [[3, 2], torch.tensor([3, 2]), (torch.tensor(3), torch.tensor(2))], ids=type)
def test_window_size_may_be_any_pair(window_size):
    tensors = {name: randn(1, 20, 2, 16, dtype=torch.float32) for name in "qkv"}
    verify(
        lambda *qkv: flash_attn_func(*qkv, window_size=window_size),
        lambda *qkv: oracle.dense(*qkv, window_size=(3, 2)),
        tensors,
        dout=random_dout("contiguous"),
    )


def test_arguments_by_position():
    """Callers pass up to seven arguments by position: (q, k, v, dropout_p, softmax_scale, causal, window_size)."""
    tensors = {name: randn(1, 20, 2, 16, dtype=torch.float32) for name in "qkv"}
    verify(
        lambda *qkv: flash_attn_func(*qkv, 0, 0.3, True, (5, 0), 2.0, None, True),
        lambda *qkv: oracle.dense(*qkv, softmax_scale=0.3, causal=True, window_size=(5, 0), softcap=2.0),
        tensors,
        dout=random_dout("contiguous"),
    )


@pytest.mark.parametrize("layout_q", ["contiguous", "strided_last", "transposed"])
@pytest.mark.parametrize("layout_k", ["packed", "expanded"])
@pytest.mark.parametrize("layout_v", ["offset", "transposed"])
def test_each_tensor_has_its_own_strides(layout_q, layout_k, layout_v):
    tensors = {
        "q": randn(2, 33, 4, 24, dtype=torch.bfloat16, layout=layout_q),
        "k": randn(2, 45, 2, 24, dtype=torch.bfloat16, layout=layout_k),
        "v": randn(2, 45, 2, 24, dtype=torch.bfloat16, layout=layout_v),
    }
    verify(
        lambda *qkv: flash_attn_func(*qkv, causal=True),
        lambda *qkv: oracle.dense(*qkv, causal=True),
        tensors,
        dout=random_dout("transposed"),
    )


def test_one_tensor_as_query_key_and_value():
    x = randn(1, 30, 2, 16, dtype=torch.float32).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, true = flash_attn_func(x, x, x, causal=True), oracle.dense(exact, exact, exact, causal=True).out
    dout = torch.randn_like(out)
    (dx,), (exact_dx,) = torch.autograd.grad(out, x, dout), torch.autograd.grad(true, exact, dout.double())
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beyond_the_dtype_range(dtype):
    """q . k = 128 * 40 * 40 = 204800 overflows fp16; neither may its exponential overflow fp32."""
    q = torch.full((1, 5, 1, 128), 40.0, dtype=dtype)
    k = laid_out(torch.full((1, 9, 1, 128), 40.0, dtype=dtype), "transposed")
    k[:, 1::2] = -40.0
    v = randn(1, 9, 1, 128, dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=1.0, return_attn_probs=True)
    exact = oracle.dense(q.double(), k.double(), v.double(), softmax_scale=1.0)
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(flash_attn_func(q, k, v, softmax_scale=1.0), out, rtol=1e-2, atol=1e-2)


def test_zero_scale_averages():
    q, k, v = (randn(1, 6, 1, 8, dtype=torch.float32) for _ in range(3))
    out = flash_attn_func(q, k, v, softmax_scale=0.0)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand(out.shape))
