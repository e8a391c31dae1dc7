"""`mtlflashattn tune`: what is fastest on this GPU, measured and saved.

That is, which variants of the Metal kernels, up to how many queries the decode kernel beats the tiled one, and from
which length `flash_attn_mps.sdpa` beats torch's own attention.
"""

from __future__ import annotations

import argparse
import itertools
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", nargs="+", default=["float16", "bfloat16"], choices=("float16", "bfloat16", "float32")
    )
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], metavar="D")
    parser.add_argument(
        "--length",
        nargs="+",
        default=["short", "medium", "long"],
        choices=("short", "medium", "long"),
        help="up to 512 queries, up to 2048, more; in the decode kernel up to 2048 keys, up to 16384, more",
    )
    parser.add_argument("--mask", nargs="+", default=["full", "causal"], choices=("full", "causal", "window"))
    parser.add_argument(
        "--what",
        nargs="+",
        default=["variants", "decode", "gradients", "sdpa"],
        choices=("variants", "decode", "gradients", "sdpa"),
        help="the variants of the forward kernels, and which of these to use; those of the decode kernel, and up to "
        "how many queries it is used; "
        "those of the backward kernels, and whether to use these; the length from which to replace torch's attention "
        "(default: all)",
    )
    parser.add_argument("--device", default="mps", help="default: mps")
    parser.add_argument("--forget", action="store_true", help="remove the saved results, and time nothing")


def run(arguments: argparse.Namespace) -> int:
    from flash_attn_mps import sdpa, timing
    from flash_attn_mps.tiers.metal import compiler, few, launch, store, variants

    if arguments.forget:
        store.path().unlink(missing_ok=True)
        variants.forget()
        few.forget()
        sdpa.reset()
        print(f"Removed {store.path()}: calls use this GPU's default variant again, and sdpa its default lengths.")
        return 0
    refused = compiler.unavailable(arguments.device)
    too_wide = [d for d in arguments.head_dim if not 0 < d <= launch.MAX_HEAD_DIM]
    if refused or too_wide:
        reason = refused or f"--head-dim {too_wide[0]}: the Metal kernel serves 1 to {launch.MAX_HEAD_DIM}"
        print(f"Nothing to tune here: {reason}.", file=sys.stderr)
        return 2
    watch = timing.stopwatch(arguments.device)
    jobs = {"variants": _forward, "decode": _decode, "gradients": _backward, "sdpa": _lengths}
    return max(jobs[what](arguments, watch) for what in dict.fromkeys(arguments.what))


def _forward(arguments, watch):
    """Which of the two kernels to use comes last, with their fastest variants."""
    from flash_attn_mps.tiers.metal import simdgroup, tensorops, tensorops_probe
    from flash_attn_mps.tiers.metal.kernel import Choice

    kernels: list[Choice] = [simdgroup.FORWARD]
    if tensorops_probe.layout() is not None:
        kernels += [tensorops.FORWARD, tensorops.WAYS]
    return _variants(kernels, arguments, watch, arguments.mask)


def _backward(arguments, watch):
    """Whether to use the kernels comes last, with their fastest variants."""
    from flash_attn_mps.tiers.metal import backward_kernels, composed

    choices = [backward_kernels.QUERIES, backward_kernels.KEYS, composed.WAYS]
    return _variants(choices, arguments, watch, arguments.mask)


def _decode(arguments, watch):
    """Of a few queries a mask hides little: one kind stands for all."""
    from flash_attn_mps.tiers.metal import decode

    return max(
        _variants(list(decode.DECODE.values()), arguments, watch, ["full"]),
        _queries(arguments, watch),
    )


def _queries(arguments, watch):
    """0 if every dtype and head dim has a limit now."""
    from flash_attn_mps.text_table import aligned
    from flash_attn_mps.tiers.metal import decode, few, simdgroup
    from flash_attn_mps.tools.progress import Progress

    classes = [few.Class(dtype, dim) for dtype in arguments.dtype for dim in arguments.head_dim]
    rows, unkept = [], None
    with Progress(len(classes), "decode") as progress:
        try:
            for of in classes:
                progress.step(f"{of.dtype} {of.head_dim}")
                most, seconds = few.measure(of, arguments.device, watch, decode.serve, simdgroup.serve)
                few.save({of: most})
                rows.append((of.dtype, of.head_dim, most, *map(_both, (seconds.get(n) for n in few.QUERIES))))
        except KeyboardInterrupt:
            pass  # what was measured is saved
        except OSError as error:
            unkept = error
    few.forget()
    print("Up to how many queries the decode kernel is used:")
    print(aligned([("dtype", "head dim", "queries", *(f"{n}: ms, tiled" for n in few.QUERIES)), *rows]))
    _tell_where(unkept, rows)
    return 0 if unkept is None and len(rows) == len(classes) else 1


def _both(seconds):
    return "-" if seconds is None else "{:.3f}, {:.3f}".format(*(1e3 * s for s in seconds))


def _variants(kernels, arguments, watch, masks):
    """0 if every class of calls has a variant now."""
    from flash_attn_mps import project
    from flash_attn_mps.text_table import aligned
    from flash_attn_mps.tiers.metal import store, tune, variants
    from flash_attn_mps.tools.progress import Progress

    classes = (arguments.dtype, arguments.head_dim, arguments.length, masks)
    keys = {key: kernel for kernel in kernels for key in tune.keys(kernel, *classes)}
    candidates = {key: tune.candidates(key, kernel) for key, kernel in keys.items()}
    outcomes, unkept = [], None
    with Progress(sum(map(len, candidates.values())), "tune") as progress:
        try:
            for key, kernel in keys.items():
                progress.step(str(key), 0)
                outcomes.append(
                    tune.tune(key, kernel, arguments.device, watch, candidates=candidates[key], tick=progress.step)
                )
                if outcomes[-1].winner is not None:
                    store.save({key: outcomes[-1].winner})
                    variants.forget()
        except KeyboardInterrupt:
            pass  # what was measured is saved
        except OSError as error:
            unkept = error
    head = ("kernel", "dtype", "head dim", "length", "mask", "fastest", "ms", "default's ms", "gain", "failed")
    print(aligned([head, *map(_row, outcomes)]))
    for reason, count in _reasons(outcomes).items():
        print(f"{count} variants failed: {reason}. {project.please_report('selftest')}")
    _tell_where(unkept, any(outcome.winner for outcome in outcomes))
    return 0 if unkept is None and len(outcomes) == len(keys) and all(outcome.winner for outcome in outcomes) else 1


def _lengths(arguments, watch):
    """0 if every kind of call has a length now."""
    from flash_attn_mps import sdpa
    from flash_attn_mps.sdpa import crossover, measured
    from flash_attn_mps.text_table import aligned
    from flash_attn_mps.tools.progress import Progress

    causal = [mask == "causal" for mask in arguments.mask if mask != "window"]  # torch has no windows
    kinds = crossover.kinds(arguments.dtype, arguments.head_dim, causal)
    outcomes, unkept = [], None
    with Progress(len(kinds) * len(crossover.LENGTHS), "sdpa") as progress:
        try:
            for kind in kinds:
                progress.step(str(kind), 0)
                outcomes.append(crossover.measure(kind, arguments.device, watch, tick=progress.step))
                measured.save({outcomes[-1].call_class: outcomes[-1].shortest})
        except KeyboardInterrupt:
            pass  # what was measured is saved
        except OSError as error:
            unkept = error
    sdpa.reset()
    print("The length from which sdpa replaces torch's attention because it is faster:")
    head = ("kind", "torch's path", "from", *(f"{length}: ms, torch's" for length in sorted(crossover.LENGTHS)))
    print(aligned([head, *itertools.starmap(_length_row, zip(kinds, outcomes, strict=False))]))
    _tell_where(unkept, outcomes)
    return 0 if unkept is None and len(outcomes) == len(kinds) else 1


def _length_row(kind, outcome):
    from flash_attn_mps.sdpa import crossover

    never = outcome.shortest == float("inf")
    times = (
        "{:.2f}, {:.2f}".format(*(1e3 * s for s in outcome.seconds[length])) if length in outcome.seconds else "-"
        for length in sorted(crossover.LENGTHS)
    )
    return (kind, outcome.call_class.route, "never" if never else f"{outcome.shortest:g}", *times)


def _tell_where(unkept, found):
    from flash_attn_mps.tiers.metal import store

    if unkept is not None:
        print(f"Could not save the results: {unkept}. Set MTLFLASHATTN_CACHE to another directory.", file=sys.stderr)
    elif found:
        print(f"Saved to {store.path()}")


def _row(outcome):
    key, winner, _, refused = outcome
    dims = key.head_dim if key.head_dim == key.head_dim_v else f"{key.head_dim}/{key.head_dim_v}"
    what = (key.kernel.removeprefix("attention_"), key.dtype, dims, key.length, key.mask)
    if winner is None:
        return (*what, "none works", "", "", "", len(refused))
    gain = f"{winner.default_seconds / winner.seconds:.2f}x"
    times = (f"{winner.seconds * 1e3:.3f}", f"{winner.default_seconds * 1e3:.3f}")
    return (*what, winner.variant, *times, gain, len(refused))


def _reasons(outcomes):
    counts: dict[str, int] = {}
    for outcome in outcomes:
        for reason in outcome.refused.values():
            counts[reason] = counts.get(reason, 0) + 1
    return counts
