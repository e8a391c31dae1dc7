"""flash_attn_varlen_func over lengths (empty ones too), masks, features, strides and pages, forward and backward."""

import numpy as np
import pytest
import torch

from flash_attn_mps.frontends.fa2 import flash_attn_varlen_func

from . import oracle
from .layouts import laid_out, randn, random_dout
from .pairwise import case_id, pairwise
from .rule import verify
from .test_dense import DTYPES, MASKS, alibi_slopes

# Lengths of the sequences, of queries and of keys.
LENGTHS = {
    "one": ([17], [17]),
    "same": ([5, 64, 1, 30], [5, 64, 1, 30]),
    "fewer-queries": ([1, 7, 64], [113, 9, 64]),
    "fewer-keys": ([64, 9, 113], [7, 9, 1]),
    "empty-both": ([0, 12, 0, 9, 0], [0, 12, 0, 9, 0]),
    "empty-keys": ([3, 12, 5], [0, 12, 0]),
    "empty-queries": ([0, 12, 0], [4, 12, 8]),
    "skewed": ([300, 1, 2, 1], [300, 1, 2, 1]),
}

CASES = pairwise(
    lengths=list(LENGTHS),
    dims=[(8, 8), (40, 40), (64, 64), (72, 40), (128, 128), (192, 128), (1, 1)],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    mask=list(MASKS),
    softcap=[0.0, 1.5],
    alibi=[None, "H", "BH"],
    scale=[None, 0.25, "tensor"],
    layout=["contiguous", "transposed", "packed", "expanded", "offset", "strided_last"],
    dout=["contiguous", "transposed", "expanded", "strided_last"],
    wanted=["qkv", "q", "kv"],
    probs=[False, True],
    max_seqlen=["int", "tensor", "numpy", "generous"],
)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def longest(lengths, kind="int"):
    length = max(lengths, default=0)
    return {
        "int": length,
        "tensor": torch.tensor(length, dtype=torch.int32),
        "numpy": np.int64(length),
        "generous": length + 37,
    }[kind]


def paged(x, lengths, page_size, poison=float("nan")):
    """The tokens of x (total, H, D) in shuffled pages: (num_blocks, page_size, H, D), and block_table (B, blocks)."""
    blocks = [-(-length // page_size) for length in lengths]
    width = max(*blocks, 1) + 1
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    cache = torch.full((len(order), page_size, *x.shape[1:]), poison, dtype=x.dtype)
    table = torch.full((len(lengths), width), order[-1], dtype=torch.int32)
    begin = 0
    for b, length in enumerate(lengths):
        for i in range(blocks[b]):
            block, size = order.pop(0), min(page_size, length - i * page_size)
            cache[block, :size] = x[begin : begin + size]
            table[b, i] = block
            begin += size
    return cache, table


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_and_backward(case):
    lengths_q, lengths_k = LENGTHS[case["lengths"]]
    (dim, dim_v), (heads, heads_k) = case["dims"], case["heads"]
    dtype, layout = case["dtype"], case["layout"]
    tensors = {
        "q": randn(sum(lengths_q), heads, dim, dtype=dtype, layout=layout),
        "k": randn(sum(lengths_k), heads_k, dim, dtype=dtype, layout=layout),
        "v": randn(sum(lengths_k), heads_k, dim_v, dtype=dtype, layout=layout),
    }
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    how = {
        **MASKS[case["mask"]],
        "softcap": case["softcap"],
        "alibi_slopes": alibi_slopes(case["alibi"], len(lengths_q), heads),
        "softmax_scale": torch.tensor(0.125) if case["scale"] == "tensor" else case["scale"],
    }
    longest_q, longest_k = longest(lengths_q, case["max_seqlen"]), longest(lengths_k, case["max_seqlen"])
    result = verify(
        lambda *qkv: flash_attn_varlen_func(
            *qkv, cu_q, cu_k, longest_q, longest_k, return_attn_probs=case["probs"], **how
        ),
        lambda *qkv: oracle.varlen(*qkv, cu_q, cu_k, **how),
        tensors,
        dout=random_dout(case["dout"]),
        wanted=case["wanted"],
    )
    assert isinstance(result, tuple) == case["probs"]


def test_at_length():
    lengths = [1000, 3, 500, 120]
    tensors = {
        "q": randn(sum(lengths), 4, 64, dtype=torch.bfloat16),
        "k": randn(sum(lengths), 2, 64, dtype=torch.bfloat16),
        "v": randn(sum(lengths), 2, 64, dtype=torch.bfloat16),
    }
    cu = cumulative(lengths)
    verify(
        lambda *qkv: flash_attn_varlen_func(*qkv, cu, cu, 1000, 1000, causal=True, return_attn_probs=True),
        lambda *qkv: oracle.varlen(*qkv, cu, cu, causal=True),
        tensors,
        dout=random_dout("contiguous"),
    )


PAGED_CASES = pairwise(
    lengths=["one", "same", "fewer-queries", "fewer-keys", "empty-keys", "empty-queries", "skewed"],
    page_size=[16, 1, 256],
    dtype=DTYPES,
    heads=[(3, 3), (6, 2), (4, 1)],
    dims=[(64, 64), (40, 72)],
    mask=["none", "causal", "both", "causal-left"],
    softcap=[0.0, 1.5],
    alibi=[None, "BH"],
    probs=[False, True],
)


@pytest.mark.parametrize("case", PAGED_CASES, ids=case_id)
def test_block_table(case):
    """Keys in pages; what the table's unused entries and the pages' unused tokens hold (NaN) is never read."""
    lengths_q, lengths_k = LENGTHS[case["lengths"]]
    (dim, dim_v), (heads, heads_k), dtype = case["dims"], case["heads"], case["dtype"]
    q = randn(sum(lengths_q), heads, dim, dtype=dtype)
    k = randn(sum(lengths_k), heads_k, dim, dtype=dtype)
    v = randn(sum(lengths_k), heads_k, dim_v, dtype=dtype)
    (k_pages, table), (v_pages, _) = (paged(x, lengths_k, case["page_size"]) for x in (k, v))
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    how = {
        **MASKS[case["mask"]],
        "softcap": case["softcap"],
        "alibi_slopes": alibi_slopes(case["alibi"], len(lengths_q), heads),
    }
    result = verify(
        lambda q, k, v: flash_attn_varlen_func(
            q,
            k_pages,
            v_pages,
            cu_q,
            cu_k,
            longest(lengths_q),
            longest(lengths_k),
            block_table=table,
            return_attn_probs=case["probs"],
            **how,
        ),
        lambda q, k, v: oracle.varlen(q, k, v, cu_q, cu_k, **how),
        {"q": q, "k": k, "v": v},
    )
    assert isinstance(result, tuple) == case["probs"]


def test_block_table_may_share_pages():
    """Prefix caching: two sequences begin with the same page."""
    k_pages, v_pages = (randn(4, 8, 2, 16, dtype=torch.float32) for _ in range(2))
    table = torch.tensor([[2, 0], [2, 3]], dtype=torch.int32)
    cu_q, cu_k = cumulative([3, 2]), cumulative([12, 16])
    how = {"causal": True, "block_table": table}
    verify(
        lambda *qkv: flash_attn_varlen_func(*qkv, cu_q, cu_k, 3, 16, return_attn_probs=True, **how),
        lambda *qkv: oracle.varlen(*qkv, cu_q, cu_k, **how),
        {"q": randn(5, 4, 16, dtype=torch.float32), "k": k_pages, "v": v_pages},
    )


def test_sequences_are_independent():
    """What stands in one sequence, NaN included, changes no bit of another."""
    lengths = [9, 40, 7]
    cu = cumulative(lengths)
    q, k, v = (randn(56, 2, 16, dtype=torch.float32) for _ in range(3))
    clean = flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    for x in (q, k, v):
        x[9:49] = float("nan")
    dirty = flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    torch.testing.assert_close(dirty[:9], clean[:9], rtol=0, atol=0)
    torch.testing.assert_close(dirty[49:], clean[49:], rtol=0, atol=0)
    assert dirty[9:49].isnan().all()


def test_gradients_of_sequences_are_independent():
    """Neither what stands in one sequence nor its output's gradient, NaN included, reaches the gradients of another."""
    lengths = [9, 40, 7]
    cu = cumulative(lengths)
    q, k, v, dout = (randn(56, 2, 16, dtype=torch.float32) for _ in range(4))

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_varlen_func(*leaves, cu, cu, 40, 40, causal=True, softcap=5.0)
        return torch.autograd.grad(out, leaves, dout)

    clean = gradients()
    for x in (q, k, v, dout):
        x[9:49] = float("nan")
    for name, dirty, wanted in zip("qkv", gradients(), clean, strict=True):
        torch.testing.assert_close(dirty[:9], wanted[:9], msg=f"d{name} of the first sequence")
        torch.testing.assert_close(dirty[49:], wanted[49:], msg=f"d{name} of the last sequence")


def test_one_sequence_equals_dense():
    from flash_attn_mps.frontends.fa2 import flash_attn_func

    q, k, v = (randn(2, 31, 2, 24, dtype=torch.float32, layout="transposed") for _ in range(3))
    cu = cumulative([31, 31])
    flat = flash_attn_varlen_func(*(x.reshape(62, 2, 24) for x in (q, k, v)), cu, cu, 31, 31, causal=True)
    torch.testing.assert_close(flat.view(2, 31, 2, 24), flash_attn_func(q, k, v, causal=True), rtol=1e-5, atol=1e-6)


def test_strided_cu_seqlens():
    wide = torch.full((2, 4), 99, dtype=torch.int32)
    wide[0] = cumulative([4, 6, 2])
    cu = laid_out(wide.T.contiguous(), "contiguous")[:, 0]
    assert not cu.is_contiguous()
    verify(
        lambda *qkv: flash_attn_varlen_func(*qkv, cu, cu, 6, 6),
        lambda *qkv: oracle.varlen(*qkv, cu, cu),
        {name: randn(12, 2, 16, dtype=torch.float32) for name in "qkv"},
        dout=random_dout("contiguous"),
    )
