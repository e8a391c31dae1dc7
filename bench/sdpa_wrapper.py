"""What `sdpa.install()` and `mha.install()` cost a call that they leave to torch.

    python bench/sdpa_wrapper.py [--calls 200] [--rounds 501]

A tiny attention on the CPU is called with and without them, in batches that alternate, each going first in every other
round. "Another device": the calls never come here. "Left to torch": the CPU counts as MPS, and the decision is against
taking the call. The last line is nn.MultiheadAttention with its usual strides. The table shows the medians of the CPU
times of one call. The goals: nothing is added on another device, and 10 microseconds at most to a call left to torch.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from flash_attn_mps import mha, sdpa
from flash_attn_mps.sdpa import obstacles, settings
from flash_attn_mps.sdpa.measured import NEVER
from flash_attn_mps.sdpa.settings import Settings

GOALS = {"another device": 0.2, "left to torch": 10.0}  # microseconds; 0.2 is the noise


def seconds(call, times):
    begin = time.thread_time()  # other programs do not disturb it
    for _ in range(times):
        call()
    return (time.thread_time() - begin) / times


def difference(call, package, calls, rounds):
    """Medians in microseconds: of a call with `package` installed, without, and of their difference in a round."""
    times = {True: [], False: []}
    for i in range(rounds):
        for installed in (True, False) if i % 2 else (False, True):
            if installed:
                package.install()
            seconds(call, 5)
            times[installed].append(1e6 * seconds(call, calls))
            package.uninstall()
    added = [a - b for a, b in zip(times[True], times[False], strict=True)]
    return statistics.median(times[True]), statistics.median(times[False]), statistics.median(added)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="calls of a batch")
    parser.add_argument("--rounds", type=int, default=501)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    q = torch.randn(1, 1, 1, 8)
    mask = torch.ones(1, 1, dtype=torch.bool)
    x = torch.randn(4, 2, 8)
    module = torch.nn.MultiheadAttention(8, 1)
    calls = {
        "q, k, v": lambda: F.scaled_dot_product_attention(q, q, q),
        "is_causal": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "attn_mask": lambda: F.scaled_dot_product_attention(q, q, q, mask),
    }
    settings.read = lambda: Settings((2, 13), NEVER, min_seq=NEVER, fast_min_seq=NEVER)
    print(f"torch {torch.__version__}, median of {chosen.rounds} rounds of {chosen.calls} calls, microseconds")
    print(f"{'call':22} {'':14} {'with':>8} {'without':>8} {'added':>8}")
    worst = dict.fromkeys(GOALS, 0.0)
    with torch.no_grad():
        for where, device in (("another device", "mps"), ("left to torch", "cpu")):
            obstacles.DEVICE = device
            for name, call in calls.items():
                times = difference(call, sdpa, chosen.calls, chosen.rounds)
                worst[where] = max(worst[where], times[-1])
                print(f"{name:22} {where:14}", *(f"{time:8.2f}" for time in times))
        times = difference(lambda: module(x, x, x, need_weights=False), mha, max(1, chosen.calls // 10), chosen.rounds)
        print(f"{'nn.MultiheadAttention':22} {'':14}", *(f"{time:8.2f}" for time in times))
    for where, goal in GOALS.items():
        print(f"{where}: most added {worst[where]:.2f}, goal {goal}: {'met' if worst[where] <= goal else 'missed'}")


if __name__ == "__main__":
    main()
