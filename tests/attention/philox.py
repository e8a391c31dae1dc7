"""The dropout mask as docs/dropout.md defines it, in numpy's unsigned integers: it shares no code with the product."""

import numpy as np
import torch


def philox4x32(counter, key, rounds=7):
    """counter: four uint32 arrays, key: two numbers. Salmon et al. 2011, figure 4: the words of one counter."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    word = np.uint64(2**32 - 1)
    for _ in range(rounds):
        one, two = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (two >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            two & word,
            (one >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            one & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def keep(seed, dropout_p, batch, heads, seqlen_q, seqlen_k):
    """(batch, heads, seqlen_q, seqlen_k), bool: what dropout keeps."""
    b, h, i, j = np.ogrid[:batch, :heads, :seqlen_q, :seqlen_k]
    words = philox4x32((j // 8, i, b * heads + h, 0), (seed % 2**32, seed // 2**32 % 2**32))
    random = np.zeros((batch, heads, seqlen_q, seqlen_k), dtype=np.uint64)
    for n, word in enumerate(words):
        for half in (0, 1):
            random = np.where(j % 8 == 2 * n + half, word >> np.uint64(16 * half) & np.uint64(0xFFFF), random)
    return torch.from_numpy(random >= min(round(65536 * dropout_p), 65535))
