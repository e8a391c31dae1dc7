"""Memory of forward and backward grows with L * D, not with L * L.

PyTorch's profiler counts it, so that buffers inside of an operator count too.
"""

import gc
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func

from .test_varlen import cumulative

LENGTH, HEADS, DIM = 4096, 4, 64
ONE_HEAD_OF_SCORES = LENGTH * LENGTH * 4
WORKSPACE = 96 * 2**20  # for blocks of scores, whatever the length; the scores of all heads would take 256 MiB


def tensors(count, length=LENGTH):
    """Bytes of so many fp32 tensors of the size of q."""
    return count * length * HEADS * DIM * 4


def allocations(function, path):
    """(largest allocation, highest sum of live ones) in bytes while function runs, beyond what was there before."""
    gc.collect()  # or what was garbage before would count as freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    recorded.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    assert events, "the profiler recorded no allocation"
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        size = event["args"]["Bytes"]
        live += size
        largest, peak = max(largest, size), max(peak, live)
    return largest, peak


def dense_call(length, how, backward):
    q = torch.randn(1, length, HEADS, DIM, requires_grad=backward)
    k, v = (torch.randn(1, length, HEADS // 2, DIM, requires_grad=backward) for _ in range(2))

    def call():
        out = flash_attn_func(q, k, v, **how)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return call


def varlen_call(lengths, how, backward):
    cu, longest = cumulative(lengths), max(lengths)
    q = torch.randn(sum(lengths), HEADS, DIM, requires_grad=backward)
    k, v = (torch.randn(sum(lengths), HEADS // 2, DIM, requires_grad=backward) for _ in range(2))

    def call():
        out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **how)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return call


HOWS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window_size": (300, 0)},
    "softcap-alibi": {"softcap": 20.0, "alibi_slopes": torch.full((HEADS,), 0.1), "causal": True},
    "dropout": {"dropout_p": 0.1},
}


def test_the_count_sees_a_score_matrix(tmp_path):
    """The measurement itself: plain attention allocates the scores, and more than one copy of them."""

    def plain():
        q = torch.randn(1024, DIM)
        return ((q @ q.T).softmax(-1)) @ q

    largest, peak = allocations(plain, tmp_path / "trace.json")
    assert largest == 1024 * 1024 * 4
    assert peak >= 2 * largest


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("how", HOWS)
def test_dense(how, backward, tmp_path):
    largest, peak = allocations(dense_call(LENGTH, HOWS[how], backward), tmp_path / "trace.json")
    assert largest < ONE_HEAD_OF_SCORES
    assert peak < WORKSPACE + tensors(16 if backward else 4)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("how", ["softcap-alibi", "dropout"])
def test_memory_grows_with_the_length_alone(how, backward, tmp_path):
    """From 2048 to 4096 tokens the scores would grow by 192 MiB, q by 2 MiB."""
    _, half = allocations(dense_call(LENGTH // 2, HOWS[how], backward), tmp_path / "half.json")
    _, whole = allocations(dense_call(LENGTH, HOWS[how], backward), tmp_path / "whole.json")
    assert whole - half < tensors(16) - tensors(16, LENGTH // 2)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("how", ["causal", "softcap-alibi"])
def test_varlen_is_not_padded(how, backward, tmp_path):
    """One long sequence among 255 of one token: padded to a rectangle, k alone would take 512 MiB."""
    call = varlen_call([1] * 200 + [LENGTH] + [1] * 55, HOWS[how], backward)
    _, peak = allocations(call, tmp_path / "trace.json")
    assert peak < WORKSPACE + tensors(16 if backward else 4)
