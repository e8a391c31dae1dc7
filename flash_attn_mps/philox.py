"""What dropout drops: a function of (seed; sequence, head, query, key) alone, in PyTorch.

So the mask does not depend on the tier, on blocks and layouts, or on whether the pass is forward or backward. The Metal
kernels compute the same (tiers/metal/kernels/philox.metal).

The generator is Philox4x32 with seven rounds (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as easy
as 1, 2, 3", https://doi.org/10.1145/2063384.2063405). Its key is the 64-bit seed, its counter

    (key // 8, query, sequence * heads + head, 0)

where query and key are positions in their sequence. Each of its four words holds the random bits of two keys, 16 each,
the lower ones first; a key is dropped if they are less than `threshold(dropout_p)`.
"""

from __future__ import annotations

import torch

KEYS = 8  # that share a counter
_BITS = 16  # of a key
_ROUNDS = 7
_WORD = 0xFFFFFFFF
# The multipliers less 2**32: the product with a word then fits into a signed int64.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def threshold(dropout_p: float) -> int:
    """Random bits of 16, of 2**16, that are dropped: at least one value is kept."""
    return min(round(dropout_p * (1 << _BITS)), (1 << _BITS) - 1)


def philox4x32(counter: Words, key: int) -> Words:
    """Four random words, of 32 bits in int64, for every counter. The words of counters broadcast to one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiplied(c0, _MULTIPLIERS[0])
        high1, low1 = _multiplied(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def _multiplied(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low word of `(multiplier + 2**32) * word`."""
    product = word * multiplier
    low = product & _WORD
    return product.bitwise_right_shift_(32).add_(word), low


def keep(
    seed: int, dropout_p: float, heads: torch.Tensor, queries: tuple[int, int], keys: tuple[int, int]
) -> torch.Tensor:
    """Which scores are kept: bool `(*heads.shape, queries, keys)`.

    Args:
        seed: 64 bits.
        dropout_p: the probability that a score is dropped, here rounded to a multiple of 2**-16.
        heads: int64, `sequence * heads + head` of each head.
        queries: the first one, and the one behind the last.
        keys: likewise.
    """
    device = heads.device
    first, last = keys[0] // KEYS, -(-keys[1] // KEYS)
    eights = torch.arange(first, last, device=device)
    rows = torch.arange(*queries, device=device)[:, None]
    words = philox4x32((eights, rows, heads[..., None, None], torch.zeros_like(eights)), seed)
    drop = threshold(dropout_p)
    halves = [half for word in words for half in ((word & (1 << _BITS) - 1) >= drop, word >= drop << _BITS)]
    return torch.stack(halves, -1).flatten(-2)[..., keys[0] - KEYS * first : keys[1] - KEYS * first]
