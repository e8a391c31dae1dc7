"""Which key a query sees, exhaustively at small sizes: every pair of lengths, every window around them, causal or not.

With q = k = 0 and the identity as v, a row of the output is 1 / n at the n keys that the query sees. The sizes at
which an open bound, an empty row or the last key lies are all here.
"""

from itertools import product

import pytest
import torch

from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

from .test_varlen import cumulative

SIZE = 5
BOUNDS = range(-1, SIZE + 2)
LENGTHS = list(product(range(SIZE + 1), repeat=2))


def expected(seqlen_q, seqlen_k, causal, left, right):
    """(seqlen_q, SIZE): what the output must be."""
    out = torch.zeros(seqlen_q, SIZE)
    for i in range(seqlen_q):
        at = i + seqlen_k - seqlen_q
        first = at - left if left >= 0 else 0
        last = at if causal else at + right if right >= 0 else seqlen_k - 1
        keys = [j for j in range(seqlen_k) if first <= j <= last]
        out[i, keys] = 1 / max(len(keys), 1)
    return out


def identity(seqlen_k):
    return torch.eye(SIZE)[:seqlen_k, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", BOUNDS)
def test_dense(left, causal):
    for right, (seqlen_q, seqlen_k) in product(BOUNDS, LENGTHS):
        q, k = torch.zeros(1, seqlen_q, 1, 4), torch.zeros(1, seqlen_k, 1, 4)
        out = flash_attn_func(q, k, identity(seqlen_k)[None], causal=causal, window_size=(left, right))
        wanted = expected(seqlen_q, seqlen_k, causal, left, right)
        torch.testing.assert_close(out[0, :, 0], wanted, msg=f"{seqlen_q} queries, {seqlen_k} keys, right {right}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", BOUNDS)
@pytest.mark.parametrize("announced", [SIZE, SIZE + 30])
def test_varlen(left, causal, announced):
    """All pairs of lengths as the sequences of one call."""
    cu_q, cu_k = (cumulative([pair[side] for pair in LENGTHS]) for side in (0, 1))
    q, k = torch.zeros(int(cu_q[-1]), 1, 4), torch.zeros(int(cu_k[-1]), 1, 4)
    v = torch.cat([identity(seqlen_k) for _, seqlen_k in LENGTHS])
    for right in BOUNDS:
        out = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, announced, announced, causal=causal, window_size=(left, right)
        )
        wanted = torch.cat([expected(*pair, causal, left, right) for pair in LENGTHS])
        torch.testing.assert_close(out[:, 0], wanted, msg=f"right {right}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", BOUNDS)
def test_kvcache(left, causal):
    """All numbers of cached keys as one batch."""
    cache_seqlens = torch.arange(SIZE + 1, dtype=torch.int32)
    k_cache, v_cache = torch.zeros(SIZE + 1, SIZE, 1, 4), identity(SIZE).expand(SIZE + 1, SIZE, 1, SIZE)
    for right, seqlen_q in product(BOUNDS, range(1, SIZE + 1)):
        q = torch.zeros(SIZE + 1, seqlen_q, 1, 4)
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=causal, window_size=(left, right)
        )
        wanted = torch.stack([expected(seqlen_q, seqlen_k, causal, left, right) for seqlen_k in range(SIZE + 1)])
        torch.testing.assert_close(out[:, :, 0], wanted, msg=f"{seqlen_q} queries, right {right}")
