"""torch's scaled_dot_product_attention as its documentation describes it, in the dtype of its arguments."""

import math

import torch

from tests.attention.rule import assert_accumulated_in_fp32, assert_within_rule


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Query i of a causal call sees the keys up to i; a query that sees no key gives zeros."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    s = query @ key.transpose(-1, -2) * scale
    seen = torch.ones(s.shape[-2:], dtype=torch.bool)
    if is_causal:
        seen = torch.arange(s.shape[-1]) <= torch.arange(s.shape[-2])[:, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
    s = s.masked_fill(~seen, -math.inf)
    p = torch.softmax(s, -1)
    return p.masked_fill(torch.isneginf(s).all(-1, keepdim=True), 0.0) @ value


def in_dtype(dtype, tensors, how):
    """`attention` of the arguments, all but a boolean mask in `dtype`."""
    how = {**how}
    if how.get("attn_mask") is not None and how["attn_mask"].dtype != torch.bool:
        how["attn_mask"] = how["attn_mask"].to(dtype)
    return attention(*(tensor.to(dtype) for tensor in tensors), **how)


def assert_right(out, tensors, how):
    """FlashAttention's error rule: at most twice the error of plain PyTorch in the same dtype, against float64."""
    dtype = tensors[0].dtype
    exact = in_dtype(torch.float64, tensors, how)
    assert_within_rule("out", out.detach(), in_dtype(dtype, tensors, how).detach(), exact.detach())
    assert_accumulated_in_fp32(out.detach(), exact.detach(), tensors[2].detach())
