"""What a call does on the host: one launch, no wait for the device, no tensor but the outputs, whatever the batch."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_mps.frontends import fa2, fa3
from flash_attn_mps.tiers.metal import compiler
from tests.attention.test_varlen import cumulative

from .calls import int32

T = torch.Tensor
WAITS = {T.item, T.tolist, T.numpy, T.cpu, T.__bool__, T.__int__, T.__float__, T.__index__, T.__contains__}


class OnDevice(torch.Tensor):
    """A tensor whose values are far away: whoever asks for one waits, which fails."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function not in WAITS, f"{function.__name__} waits for the device"
        return super().__torch_function__(function, types, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Notes the tensors that operations create, in `created`; what an operation passes on or views is none."""

    def __init__(self):
        super().__init__()
        self.created = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), f"{name} waits for the device"
        given = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, T)
        }
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, T) and t.untyped_storage()._cdata not in given:
                self.created.append((name, tuple(t.shape)))
        return result


def on_device(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnDevice)


def lengths_on_device(values):
    return int32(values).as_subclass(OnDevice)


def dense(batch):
    q, k, v = on_device(batch, 40, 4, 64), on_device(batch, 50, 2, 64), on_device(batch, 50, 2, 64)
    return (lambda **how: fa2.flash_attn_func(q, k, v, causal=True, **how)), q.shape, (batch, 4, 40)


def packed_qkv(batch):
    qkv = on_device(batch, 40, 3, 4, 64)
    return (lambda **how: fa2.flash_attn_qkvpacked_func(qkv, **how)), (batch, 40, 4, 64), (batch, 4, 40)


def features(batch):
    q, k = on_device(batch, 40, 4, 64), on_device(batch, 50, 2, 64)
    slopes = on_device(batch, 4, dtype=torch.float32)
    scale = on_device(dtype=torch.float32)
    rules = {"alibi_slopes": slopes, "softmax_scale": scale, "window_size": (7, 3), "softcap": 2.0}
    return (lambda **how: fa2.flash_attn_func(q, k, k, **rules, **how)), q.shape, (batch, 4, 40)


def varlen(batch):
    q, k = on_device(20 * batch, 4, 64), on_device(30 * batch, 2, 64)
    cu_q, cu_k = (
        lengths_on_device([20 * n for n in range(batch + 1)]),
        lengths_on_device([30 * n for n in range(batch + 1)]),
    )
    return (
        (lambda **how: fa2.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 20, 30, causal=True, **how)),
        q.shape,
        (4, 20 * batch),
    )


def varlen_used(batch):
    q = on_device(20 * batch, 4, 64)
    cu, used = lengths_on_device([20 * n for n in range(batch + 1)]), lengths_on_device([9] * batch)
    return (
        (lambda **how: fa3.flash_attn_varlen_func(q, q, q, cu, cu, 20, 20, used, used, **how)),
        q.shape,
        (4, 20 * batch),
    )


def varlen_paged(batch):
    q, pages = on_device(20 * batch, 4, 64), on_device(2 * batch, 16, 2, 64)
    cu, table = lengths_on_device([20 * n for n in range(batch + 1)]), on_device(batch, 2, dtype=torch.int32)
    return (
        (lambda **how: fa2.flash_attn_varlen_func(q, pages, pages, cu, cu, 20, 20, block_table=table, **how)),
        q.shape,
        (4, 20 * batch),
    )


def kvcache(batch):
    q, cache, used = on_device(batch, 1, 4, 64), on_device(batch, 64, 2, 64), lengths_on_device([33] * batch)

    def call(return_attn_probs=False):
        return fa2.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=used, causal=True, return_softmax_lse=return_attn_probs
        )

    return call, q.shape, (batch, 4, 1)


CALLS = [dense, packed_qkv, features, varlen, varlen_used, varlen_paged, kvcache]


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that does nothing, and notes how it was called."""
    kernel = mock.Mock()
    monkeypatch.setattr(compiler, "kernel", lambda _specialization: kernel)
    return kernel


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_one_launch_no_wait_and_no_tensor_but_the_outputs(function, probs, batch, kernel):
    call, out_shape, lse_shape = function(batch)
    with Watch() as watch:
        result = call(return_attn_probs=probs)
    assert kernel.call_count == 1
    out, *more = result if isinstance(result, tuple) else (result,)
    assert tuple(out.shape) == tuple(out_shape)
    outputs = [tuple(out_shape)] + [tuple(lse_shape)] * probs
    if len(more) == 2:  # FlashAttention 2 gives an empty S_dmask
        outputs.append((0,))
    assert [shape for _, shape in watch.created] == outputs
    # The kernel has a thread for every query of every head, and not many more.
    threads, group = kernel.call_args.kwargs["threads"], kernel.call_args.kwargs["group_size"]
    assert threads[0] % group[0] == 0
    assert all(isinstance(n, int) for n in (*threads, *group))


def test_the_watch_sees_what_it_looks_for():
    """The guards themselves: each kind of wait, and a created tensor."""
    x = on_device(3)
    waits = [
        x[0].item,
        x.tolist,
        x.cpu,
        lambda: bool(x[0]),
        lambda: int(x[0]),
        x.numpy,
    ]
    for wait in waits:
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()
    with Watch() as watch, pytest.raises(AssertionError, match="waits"):
        torch.zeros(()).item()
    with Watch() as watch:
        y = torch.zeros(4)
        y[1:].view(3, 1).add_(1)
        y + 1
    assert watch.created == [("aten::zeros", (4,)), ("aten::add.Tensor", (4,))]


def test_a_dimension_that_is_not_contiguous_costs_one_copy_of_that_tensor(kernel):
    wide = on_device(2, 40, 4, 128)
    q, k = wide[..., ::2], on_device(2, 40, 4, 64)
    with Watch() as watch:
        fa2.flash_attn_func(q, k, k)
    assert [shape for _, shape in watch.created] == [(2, 40, 4, 64), (2, 40, 4, 64)]
    q_passed, k_passed = kernel.call_args.args[:2]
    assert q_passed.is_contiguous()
    assert k_passed is k


def test_varlen_starts_no_more_groups_than_the_rows_and_sequences_need(kernel):
    """At most total / rows + batch tiles, whatever max_seqlen says. Padded to the longest: 64 times more."""
    lengths = [4096] + [1] * 63
    q, cu = on_device(sum(lengths), 2, 64), cumulative(lengths).as_subclass(OnDevice)
    fa2.flash_attn_varlen_func(q, q, q, cu, cu, 4096, 4096)
    threads, group = kernel.call_args.kwargs["threads"], kernel.call_args.kwargs["group_size"]
    tiles = threads[0] // group[0]
    rows = 16 * group[0] // 32  # of a tile, in the variant for D = 64
    assert tiles <= -(-sum(lengths) // rows) + 64
    assert threads[1:] == (2, 1)
