"""What flash_attn_func costs on the CPU beyond F.scaled_dot_product_attention called directly on the same tensors.

    python bench/sdpa_overhead.py [--lengths 1024 2048 4096] [--rounds 9] [--threads N] [--backward]

Both calls alternate, each going first in every other round; the table shows medians and their ratio. The goal is a
ratio of at most 1.15.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from flash_attn_mps.frontends.fa2 import flash_attn_func

GOAL = 1.15
HEADS, HEADS_K, HEAD_DIM = 8, 2, 64


def direct(q, k, v, causal):
    """As a caller of PyTorch writes it: (B, S, H, D) in, views transposed, (B, S, H, D) out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


def seconds(function, qkv, causal, backward):
    begin = time.perf_counter()
    out = function(*qkv, causal=causal)
    if backward:
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    return time.perf_counter() - begin


def compare(qkv, causal, rounds, backward):
    """Medians in seconds: (flash_attn_func, scaled_dot_product_attention)."""
    functions = (flash_attn_func, direct)
    times = {function: [] for function in functions}
    for function in functions:
        seconds(function, qkv, causal, backward)
    for i in range(rounds):
        for function in functions if i % 2 else reversed(functions):
            times[function].append(seconds(function, qkv, causal, backward))
    return tuple(statistics.median(times[function]) for function in functions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backward", action="store_true", help="time the forward and the backward pass together")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)

    print(f"torch {torch.__version__}, {chosen.threads} threads, median of {chosen.rounds}, B=1 H={HEADS} D={HEAD_DIM}")
    print(f"{'L':>6} {'dtype':>9} {'causal':>6} {'Hkv':>3} {'flash_attn_func':>16} {'sdpa':>10} {'ratio':>6}")
    worst = 0.0
    for length in chosen.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            for heads_k in (HEADS, HEADS_K):
                for causal in (False, True):
                    qkv = [
                        torch.randn(1, length, h, HEAD_DIM).to(dtype).requires_grad_(chosen.backward)
                        for h in (HEADS, heads_k, heads_k)
                    ]
                    ours, theirs = compare(qkv, causal, chosen.rounds, chosen.backward)
                    worst = max(worst, ours / theirs)
                    name = str(dtype).removeprefix("torch.")
                    print(
                        f"{length:>6} {name:>9} {causal!s:>6} {heads_k:>3} {ours * 1e3:>13.2f} ms"
                        f" {theirs * 1e3:>7.2f} ms {ours / theirs:>6.2f}"
                    )
    print(f"largest ratio {worst:.2f}, goal {GOAL}: {'met' if worst <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
