"""What a call costs on the host besides the launch itself: the kernel is a stub, everything around it is the product.

    python bench/host_overhead.py [--device mps] [--calls N]

Medians in microseconds of this thread's processor time, for the whole call and for its parts. The rest is what lies
between the parts: the public function, the choice of the tier, the call of the kernel, the end of the outputs' lives.
Calls with a cache are repeated from their recording, as they are from the third of a layout on; "not repeated" is what
the first ones cost. The goal is at most 30 microseconds a call.
"""

import argparse
import platform
import statistics
import time
from unittest import mock

import torch

from flash_attn_mps import checks, describe, problem
from flash_attn_mps.frontends import fa2, fa3
from flash_attn_mps.frontends.rotary import apply_rotary
from flash_attn_mps.tiers.metal import compiler, launch, recording, simdgroup

GOAL = 30.0
KERNEL = simdgroup.FORWARD


class Library:
    """Whose kernels do nothing."""

    def __getattr__(self, _name):
        return lambda *_arguments, **_shape: None


def median_microseconds(function, calls, rounds=21):
    function()
    times = []
    for _ in range(rounds):
        begin = time.thread_time_ns()
        for _ in range(calls // rounds):
            function()
        times.append((time.thread_time_ns() - begin) / (calls // rounds) / 1e3)
    return statistics.median(times)


def scenarios(device):
    """Name to (public call, the problem that it builds)."""

    def tensor(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype, device=device)

    # Small ones: for large ones the CPU's allocator asks the system, which that of a GPU does not.
    q, k = tensor(2, 32, 4, 64), tensor(2, 32, 2, 64)
    slopes = tensor(4, dtype=torch.float32)
    packed_q, packed_k = tensor(64, 4, 64), tensor(64, 2, 64)
    cu = torch.arange(0, 65, 16, dtype=torch.int32, device=device)
    one, used = tensor(2, 1, 4, 64), torch.full((2,), 30, dtype=torch.int32, device=device)
    new, tables = tensor(2, 1, 2, 64), (tensor(64, 32), tensor(64, 32))
    pages, index = tensor(8, 16, 2, 64), torch.zeros(2, dtype=torch.int32, device=device)
    table = torch.zeros(2, 4, dtype=torch.int32, device=device)
    in_pages = {"cache_seqlens": used, "cache_batch_idx": index, "cache_leftpad": index, "block_table": table}
    in_pages |= {"causal": True, "window_size": (20, 0)}
    codes, descale = tensor(2, 32, 2, 64, dtype=torch.uint8), tensor(2, 2, dtype=torch.float32)
    options = describe.CallOptions

    return {
        "dense": (
            lambda: fa2.flash_attn_func(q, k, k),
            lambda: describe.dense(q, k, k, options()),
        ),
        "dense, causal": (
            lambda: fa2.flash_attn_func(q, k, k, causal=True),
            lambda: describe.dense(q, k, k, options(causal=True)),
        ),
        "dense, all features, lse": (
            lambda: fa2.flash_attn_func(q, k, k, 0.0, 0.1, True, (10, 0), 30.0, slopes, return_attn_probs=True),
            lambda: describe.dense(q, k, k, options(0.1, True, (10, 0), 30.0, slopes, want_lse=True)),
        ),
        "varlen, causal": (
            lambda: fa2.flash_attn_varlen_func(packed_q, packed_k, packed_k, cu, cu, 16, 16, causal=True),
            lambda: describe.varlen(packed_q, packed_k, packed_k, cu, cu, 16, 16, options(causal=True)),
        ),
        "KV cache, one query": (
            lambda: fa2.flash_attn_with_kvcache(one, k, k, cache_seqlens=used, causal=True),
            None,
        ),
        "KV cache, append": (
            lambda: fa2.flash_attn_with_kvcache(one, k, k, new, new, cache_seqlens=used, causal=True),
            None,
        ),
        "KV cache, append, rotary": (
            lambda: fa2.flash_attn_with_kvcache(one, k, k, new, new, *tables, cache_seqlens=used, causal=True),
            None,
        ),
        "KV cache, all options, lse": (
            lambda: fa2.flash_attn_with_kvcache(
                *(one, pages, pages, new, new, *tables),
                **(in_pages | {"softcap": 30.0, "alibi_slopes": slopes, "return_softmax_lse": True}),
            ),
            None,
        ),
        "KV cache, float8, append": (
            lambda: fa3.flash_attn_with_kvcache(
                *(one, codes, codes, new, new), cache_seqlens=used, k_descale=descale, v_descale=descale
            ),
            None,
        ),
        "rotary, in place": (lambda: apply_rotary(one, *tables, used, inplace=True), None),
    }


def parts(build, calls):
    """Name to microseconds."""
    p = build()
    variant = simdgroup.default(p.q.itemsize, p.q.shape[-1], p.v.shape[-1])
    result = launch.outputs(p)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": result.out, "lse": result.lse}
    specialization, _ = launch.arguments(KERNEL, p, variant, tensors)
    return {
        "problem": median_microseconds(build, calls),
        "tier": median_microseconds(lambda: (problem._features_of(p), simdgroup.TIER.limits(p)), calls),
        "arguments": median_microseconds(lambda: launch.arguments(KERNEL, p, variant, tensors), calls),
        "kernel": median_microseconds(lambda: compiler.kernel(specialization), calls),
        "outputs": median_microseconds(lambda: launch.outputs(p), calls),
        "grid": median_microseconds(lambda: KERNEL.grid(p, variant), calls),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the tensors are; values are never looked at")
    parser.add_argument("--calls", type=int, default=6000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    stub = mock.patch.multiple(
        compiler,
        compile_shader=lambda _source: Library(),
        device_types=frozenset({chosen.device}),
    )
    # As on a device, values cannot be read for free.
    with stub, mock.patch.object(checks, "readable", lambda _tensor: False), torch.no_grad():
        compiler.clear()
        processor = platform.processor() or platform.machine()
        print(f"torch {torch.__version__}, {processor}, tensors on {chosen.device}; microseconds")
        worst = 0.0
        for name, (call, build) in scenarios(chosen.device).items():
            total = median_microseconds(call, chosen.calls)
            worst = max(worst, total)
            of = parts(build, chosen.calls) if build else {}
            rest = {"rest": total - sum(of.values())} if of else {}
            if name.startswith("KV cache"):
                with mock.patch.object(recording, "repeated", lambda _layout, _inputs, compute: compute()):
                    rest["not repeated"] = median_microseconds(call, chosen.calls)
            print(f"{name:28}{total:6.1f}   " + "  ".join(f"{part} {spent:.1f}" for part, spent in (of | rest).items()))
    print(f"largest {worst:.1f}, goal {GOAL:.0f}: {'met' if worst <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
