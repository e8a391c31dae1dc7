"""Masks and sinks as arguments: what is refused and by which name, and what a problem makes of the rest."""

import pytest
import torch

from flash_attn_mps.describe import CallOptions, dense, varlen
from flash_attn_mps.problem import with_mask, with_sinks

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = 2, 4, 6, 9
SHAPE = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)


def problem(dtype=torch.float16):
    q = torch.randn(BATCH, SEQLEN_Q, HEADS, 16).to(dtype)
    k, v = (torch.randn(BATCH, SEQLEN_K, 2, 16).to(dtype) for _ in range(2))
    return dense(q, k, v, CallOptions())


def packed():
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    q = torch.randn(9, 2, 16)
    return varlen(q, q, q, ends, ends, 5, 5, CallOptions())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [SHAPE, (1, 1, 1, 1), (), (9,), (1, 9), (6, 1), (4, 6, 9), (2, 1, 1, 9), (2, 1, 6, 9), (1, 4, 1, 1)],
    ids=str,
)
def test_a_mask_gets_four_dimensions_and_is_not_copied(shape, dtype):
    mask = torch.randn(shape).to(dtype)
    p = with_mask(problem(), mask)
    assert p.mask.shape == (1,) * (4 - len(shape)) + shape
    assert p.mask.dtype == dtype
    assert p.mask.data_ptr() == mask.data_ptr()
    assert torch.equal(p.mask.expand(SHAPE), mask.expand(SHAPE))


MALFORMED_MASKS = {
    "None": None,
    "list": [[True]],
    "float64": torch.zeros(SHAPE, dtype=torch.float64),
    "bfloat16 beside float16": torch.zeros(SHAPE, dtype=torch.bfloat16),
    "int64": torch.ones(SHAPE, dtype=torch.int64),
    "uint8": torch.ones(SHAPE, dtype=torch.uint8),
    "complex": torch.zeros(SHAPE, dtype=torch.complex64),
    "another device": torch.zeros(SHAPE, device="meta"),
    "one key less": torch.zeros(SEQLEN_Q, SEQLEN_K - 1),
    "queries and keys swapped": torch.zeros(SEQLEN_K, SEQLEN_Q),
    "another batch": torch.zeros(BATCH + 1, 1, 1, SEQLEN_K),
    "kv heads": torch.zeros(BATCH, 2, SEQLEN_Q, SEQLEN_K),
    "padding without its middle dimensions": torch.zeros(BATCH, SEQLEN_K),
    "five dimensions": torch.zeros(1, *SHAPE),
    "no keys": torch.zeros(SEQLEN_Q, 0),
    "sparse": torch.zeros(SHAPE).to_sparse(),
}


@pytest.mark.parametrize("mask", MALFORMED_MASKS.values(), ids=MALFORMED_MASKS)
def test_masks_refused_by_name(mask):
    refusal = ValueError
    if isinstance(mask, torch.Tensor) and mask.is_sparse:
        refusal = NotImplementedError
    with pytest.raises(refusal, match=r"^attn_mask: got .*(accepted|supported): "):
        with_mask(problem(), mask)
    with pytest.raises(refusal, match=r"^bias: "):
        with_mask(problem(), mask, "bias")


def test_a_float16_mask_is_no_mask_for_float32():
    with pytest.raises(ValueError, match=r"attn_mask: .*torch.bool or torch.float32 that broadcasts"):
        with_mask(problem(torch.float32), torch.zeros(SHAPE, dtype=torch.float16))


def test_a_mask_that_requires_grad_makes_the_call_require_it():
    p = with_mask(problem(), torch.zeros(SHAPE, requires_grad=True))
    assert p.requires_grad
    with torch.no_grad():
        assert not p.requires_grad


def test_a_mask_of_a_packed_batch_is_refused():
    with pytest.raises(NotImplementedError, match=r"attn_mask: .*packed"):
        with_mask(packed(), torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sinks_become_float32(dtype):
    values = torch.randn(HEADS).to(dtype)
    sinks = with_sinks(problem(), values).sinks
    assert sinks.dtype == torch.float32
    assert torch.equal(sinks, values.float())


MALFORMED_SINKS = {
    "None": None,
    "number": 1.0,
    "int64": torch.zeros(HEADS, dtype=torch.int64),
    "bool": torch.zeros(HEADS, dtype=torch.bool),
    "complex": torch.zeros(HEADS, dtype=torch.complex64),
    "kv heads": torch.zeros(2),
    "one for all": torch.zeros(1),
    "0-d": torch.zeros(()),
    "with a batch": torch.zeros(BATCH, HEADS),
    "another device": torch.zeros(HEADS, device="meta"),
}


@pytest.mark.parametrize("sinks", MALFORMED_SINKS.values(), ids=MALFORMED_SINKS)
def test_sinks_refused_by_name(sinks):
    with pytest.raises(ValueError, match=r"^s_aux: got .*; accepted: "):
        with_sinks(problem(), sinks, "s_aux")
