"""`flash_attn.bert_padding` against loops over sequences."""

import pickle

import einops
import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

LENGTHS = [4, 0, 6, 1]
SEQLEN = 6


def right_padded(dtype):
    return torch.stack([torch.arange(SEQLEN) < length for length in LENGTHS]).to(dtype)


def left_padded(dtype):
    return right_padded(dtype).flip(1)


@pytest.mark.parametrize("mask", [right_padded, left_padded])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("tail", [(), (3,), (2, 5)])
def test_unpad_and_pad(mask, mask_dtype, tail):
    mask = mask(mask_dtype)
    x = torch.randn(4, SEQLEN, *tail)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)

    tokens = [(b, s) for b in range(4) for s in range(SEQLEN) if mask[b, s]]
    assert torch.equal(packed, torch.stack([x[b, s] for b, s in tokens]))
    assert indices.tolist() == [b * SEQLEN + s for b, s in tokens]
    assert (indices.dtype, cu_seqlens.dtype, seqused.dtype) == (torch.int64, torch.int32, torch.int32)
    assert cu_seqlens.tolist() == [0, 4, 4, 10, 11]
    assert type(max_seqlen) is int
    assert max_seqlen == 6
    assert seqused.tolist() == LENGTHS

    padded = pad_input(packed, indices, 4, SEQLEN)
    assert torch.equal(padded, x * mask.reshape(4, SEQLEN, *[1] * len(tail)))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32])
def test_unused_tokens_get_a_place(mask_dtype):
    mask = right_padded(mask_dtype)
    unused = torch.zeros_like(mask)
    unused[0, 4], unused[1, :2] = 1, 1
    x = torch.randn(4, SEQLEN, 3)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    tokens = [(b, s) for b in range(4) for s in range(SEQLEN) if mask[b, s] or unused[b, s]]
    assert torch.equal(packed, torch.stack([x[b, s] for b, s in tokens]))
    assert indices.tolist() == [b * SEQLEN + s for b, s in tokens]
    assert cu_seqlens.tolist() == [0, 5, 7, 13, 14]
    assert max_seqlen == 6
    assert seqused.tolist() == LENGTHS


def test_gradient_through_unpad_and_pad():
    mask = left_padded(torch.bool)
    x = torch.randn(4, SEQLEN, 3, dtype=torch.float64, requires_grad=True)
    packed, indices, *_ = unpad_input(x, mask)
    weight = torch.randn_like(x)
    (pad_input(packed, indices, 4, SEQLEN) * weight).sum().backward()
    assert torch.equal(x.grad, weight * mask[..., None])


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2, 4)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert (max_seqlen, type(max_seqlen)) == (6, int)


@pytest.mark.parametrize("tail", [(3,), (2, 5)])
def test_index_first_axis(tail):
    x = torch.randn(7, *tail, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([5, 0, 5, 3])  # a row twice: its gradients add up
    out = index_first_axis(x, indices)
    assert torch.equal(out, x[indices])
    weight = torch.randn_like(out)
    (want,) = torch.autograd.grad((x[indices] * weight).sum(), x)
    (got,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(got, want)
    assert torch.autograd.gradgradcheck(lambda x: index_first_axis(x, indices) ** 2, x)


def test_index_put_first_axis():
    values = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 2])
    out = index_put_first_axis(values, indices, 6)
    expected = torch.zeros(6, 2, 4, dtype=torch.float64)
    expected[indices] = values.detach()
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(values.grad, weight[indices])


def test_index_first_axis_residual():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([5, 0, 3])
    picked, residual = index_first_axis_residual(x * 1, indices)
    assert torch.equal(picked, x[indices])
    assert torch.equal(residual, x)
    residual += 1  # what the second result is for
    w0, w1 = torch.randn_like(picked), torch.randn_like(residual)
    loss = (picked * w0).sum() + (residual * w1).sum()
    (got,) = torch.autograd.grad(loss, x)
    expected = w1.clone()
    for row, index in enumerate(indices):
        expected[index] += w0[row]
    assert_close = torch.testing.assert_close
    assert_close(got, expected, rtol=0, atol=0)


def test_names():
    assert bert_padding.rearrange is einops.rearrange
    assert bert_padding.repeat is einops.repeat
    for name in ("IndexFirstAxis", "IndexPutFirstAxis", "IndexFirstAxisResidual"):
        cls = getattr(bert_padding, name)
        assert issubclass(cls, torch.autograd.Function)
        assert pickle.loads(pickle.dumps(cls)) is cls
    assert index_first_axis == bert_padding.IndexFirstAxis.apply
    assert pickle.loads(pickle.dumps(unpad_input)) is unpad_input
    assert unpad_input.__module__ == "flash_attn.bert_padding"
