"""What the patch of F.scaled_dot_product_attention costs a call that it leaves to torch.

    python bench/sdpa_wrapper.py [--calls 200] [--rounds 501]

A tiny attention on the CPU is called through the patched function and through torch's own, in batches that alternate,
each going first in every other round; so is nn.MultiheadAttention with the patch of its strides. The table shows the
medians of the times of one call. The goal is that the attention costs 2 microseconds more at most.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from flash_attn_mps import mha, sdpa

GOAL = 2.0  # microseconds
TORCHS = F.scaled_dot_product_attention


def seconds(call, times):
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def difference(patched, plain, calls, rounds):
    """Medians in microseconds: of the patched call, of the plain one, and of their difference in a round."""
    times = {patched: [], plain: []}
    for i in range(rounds):
        for call in (patched, plain) if i % 2 else (plain, patched):
            times[call].append(1e6 * seconds(call, calls))
    added = [a - b for a, b in zip(times[patched], times[plain], strict=True)]
    return statistics.median(times[patched]), statistics.median(times[plain]), statistics.median(added)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="calls of a batch")
    parser.add_argument("--rounds", type=int, default=501)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    q = torch.randn(1, 1, 1, 8)
    mask = torch.ones(1, 1, dtype=torch.bool)
    x = torch.randn(4, 2, 8)
    attention = torch.nn.MultiheadAttention(8, 1)
    theirs = F.multi_head_attention_forward
    mha.install()
    ours = F.multi_head_attention_forward
    mha.uninstall()

    def module(function):
        def call():
            F.multi_head_attention_forward = function
            attention(x, x, x, need_weights=False)

        return call

    with sdpa.installed(), torch.no_grad():
        patched = F.scaled_dot_product_attention
        cases = {
            "q, k, v": (lambda: patched(q, q, q), lambda: TORCHS(q, q, q)),
            "is_causal": (lambda: patched(q, q, q, is_causal=True), lambda: TORCHS(q, q, q, is_causal=True)),
            "attn_mask": (lambda: patched(q, q, q, mask), lambda: TORCHS(q, q, q, mask)),
            "all by name": (
                lambda: patched(query=q, key=q, value=q, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None),
                lambda: TORCHS(query=q, key=q, value=q, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None),
            ),
            "nn.MultiheadAttention": (module(ours), module(theirs)),
        }
        print(f"torch {torch.__version__}, median of {chosen.rounds} rounds of {chosen.calls} calls, microseconds")
        print(f"{'call':22} {'patched':>8} {'plain':>8} {'added':>8}")
        worst = 0.0
        for name, pair in cases.items():
            calls = chosen.calls if "nn." not in name else max(1, chosen.calls // 10)
            for call in pair:
                seconds(call, calls)
            with_patch, without, added = difference(*pair, calls, chosen.rounds)
            worst = max(worst, added if "nn." not in name else 0.0)
            print(f"{name:22} {with_patch:8.2f} {without:8.2f} {added:8.2f}")
    F.multi_head_attention_forward = theirs
    print(f"most added {worst:.2f}, goal {GOAL}: {'met' if worst <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
