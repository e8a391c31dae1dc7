"""The four packed functions: the packed tensor is one argument, with one gradient."""

import pytest
import torch

from flash_attn_mps.frontends.fa2 import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

from . import oracle
from .layouts import randn, random_dout
from .pairwise import case_id, pairwise
from .rule import verify
from .test_dense import DTYPES, MASKS, alibi_slopes
from .test_varlen import cumulative

CASES = pairwise(
    function=["qkv", "kv", "varlen_qkv", "varlen_kv"],
    dtype=DTYPES,
    dim=[8, 40, 64, 96],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    alibi=[None, "H", "BH"],
    scale=[None, 0.25],
    layout=["contiguous", "transposed_heads", "strided_last"],
    probs=[False, True],
)


def packed(*shape, dtype, layout):
    if layout == "transposed_heads":  # (..., H, 3, D) in memory, as some projections write it
        return randn(*shape, dtype=dtype).transpose(-3, -2).contiguous().transpose(-3, -2)
    return randn(*shape, dtype=dtype, layout=layout)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_and_backward(case):
    dtype, layout, dim = case["dtype"], case["layout"], case["dim"]
    batch, heads, heads_k = 3, 4, 2
    rules = {**MASKS[case["mask"]], "softcap": case["softcap"], "softmax_scale": case["scale"]}
    rules["alibi_slopes"] = alibi_slopes(case["alibi"], batch, heads)
    how = {**rules, "return_attn_probs": case["probs"]}
    lengths_q, lengths_k = [5, 30, 8], [12, 30, 2]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)

    if case["function"] == "qkv":
        tensors = {"qkv": packed(batch, 33, 3, heads, dim, dtype=dtype, layout=layout)}
        result = verify(
            lambda qkv: flash_attn_qkvpacked_func(qkv, **how),
            lambda qkv: oracle.dense(*qkv.unbind(2), **rules),
            tensors,
            dout=random_dout("contiguous"),
        )
    elif case["function"] == "kv":
        tensors = {
            "q": randn(batch, 20, heads, dim, dtype=dtype),
            "kv": packed(batch, 33, 2, heads_k, dim, dtype=dtype, layout=layout),
        }
        result = verify(
            lambda q, kv: flash_attn_kvpacked_func(q, kv, **how),
            lambda q, kv: oracle.dense(q, *kv.unbind(2), **rules),
            tensors,
            dout=random_dout("contiguous"),
        )
    elif case["function"] == "varlen_qkv":
        tensors = {"qkv": packed(sum(lengths_q), 3, heads, dim, dtype=dtype, layout=layout)}
        result = verify(
            lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, cu_q, max(lengths_q), **how),
            lambda qkv: oracle.varlen(*qkv.unbind(1), cu_q, cu_q, **rules),
            tensors,
            dout=random_dout("contiguous"),
        )
    else:
        tensors = {
            "q": randn(sum(lengths_q), heads, dim, dtype=dtype),
            "kv": packed(sum(lengths_k), 2, heads_k, dim, dtype=dtype, layout=layout),
        }
        result = verify(
            lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, max(lengths_q), max(lengths_k), **how),
            lambda q, kv: oracle.varlen(q, *kv.unbind(1), cu_q, cu_k, **rules),
            tensors,
            dout=random_dout("contiguous"),
        )
    assert isinstance(result, tuple) == case["probs"]


def test_max_seqlen_may_be_a_tensor():
    qkv, cu = randn(20, 3, 2, 16, dtype=torch.float32), cumulative([14, 6])
    expected = flash_attn_varlen_qkvpacked_func(qkv, cu, 14, causal=True)
    given = flash_attn_varlen_qkvpacked_func(qkv, cu, cu.diff().max(), causal=True)
    assert torch.equal(given, expected)
