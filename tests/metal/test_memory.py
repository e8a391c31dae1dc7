"""Memory of both passes on the kernels: what goes in and comes out, and little more, whatever the length.

A stub stands for each kernel: all memory is the host's, and none of it depends on what kernels compute.
"""

import functools

import pytest
import torch

from flash_attn_mps.frontends import fa2, fa3
from tests.attention.test_memory import allocations
from tests.attention.test_varlen import cumulative

from .test_host import Watch, kernel, lengths_on_device, on_device

__all__ = ["kernel"]  # the fixture: a kernel that does nothing
HEADS, HEADS_K, DIM = 8, 2, 64


def tensors(rows, dtype):
    return [torch.zeros(*rows, h, DIM, dtype=dtype, requires_grad=True) for h in (HEADS, HEADS_K, HEADS_K)]


def dense(length, dtype, **how):
    qkv = tensors((1, length), dtype)
    return qkv, lambda: fa2.flash_attn_func(*qkv, **how)


def varlen(length, dtype, **how):
    qkv, cu = tensors((length,), dtype), cumulative([length // 2, length // 2 - 3, 3])
    return qkv, lambda: fa2.flash_attn_varlen_func(*qkv, cu, cu, length // 2, length // 2, **how)


def step(function, qkv, dout):
    torch.autograd.grad(function(), qkv, dout)


def bytes_of(*some):
    return sum(t.numel() * t.itemsize for t in some)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "how", [{}, {"causal": True}, {"dropout_p": 0.1}, {"softcap": 5.0, "window_size": (99, 0)}], ids=str
)
@pytest.mark.parametrize("call", [dense, varlen], ids=lambda call: call.__name__)
def test_little_more_than_inputs_outputs_and_gradients(call, how, dtype, tmp_path):
    """Forward and backward of 16384 tokens; half as many take half as much."""
    peaks = []
    for length in (16384, 8192):
        qkv, function = call(length, dtype, **how)
        dout = torch.zeros_like(qkv[0]).view(function().shape)
        _, beyond = allocations(functools.partial(step, function, qkv, dout), tmp_path / "trace.json")
        peak = bytes_of(*qkv, dout) + beyond
        assert peak <= 1.3 * bytes_of(*qkv, *qkv, dout, dout)
        peaks.append(peak)
    assert peaks[0] == pytest.approx(2 * peaks[1], rel=1e-3)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("form", ["dense", "varlen", "used"])
def test_no_wait_and_no_tensor_but_gradients_and_terms(kernel, form, batch):
    """The backward pass: what *rows* finds out of each query is all that it makes besides gradients."""
    rows = (batch, 40) if form == "dense" else (batch * 40,)
    q, k, v, dout = (on_device(*rows, h, DIM).requires_grad_() for h in (HEADS, HEADS, HEADS, HEADS))
    cu, used = (lengths_on_device(x) for x in ([40 * n for n in range(batch + 1)], [9] * batch))
    if form == "dense":
        out = fa2.flash_attn_func(q, k, v, causal=True)
    elif form == "varlen":
        out = fa2.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, softcap=3.0)
    else:
        out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, used, used)
    before = kernel.call_count
    with Watch() as watch:
        torch.autograd.grad(out, (q, k, v), dout.detach())
    assert kernel.call_count - before == 3
    terms = (batch, HEADS, 40, 4) if form == "dense" else (HEADS, 40 * batch, 4)
    assert sorted(shape for _, shape in watch.created) == sorted([terms, *3 * [(*rows, HEADS, DIM)]])
