"""`mtlflashattn tune`: real kernels on the runner, with a clock of the test's own."""

import re
from dataclasses import replace

import pytest
import torch

from flash_attn_mps import describe, timing
from flash_attn_mps.problem import AttentionProblem
from flash_attn_mps.tiers.metal import (
    backward_kernels,
    compiler,
    composed,
    decode,
    few,
    gpu,
    simdgroup,
    store,
    tune,
    variants,
)
from flash_attn_mps.tiers.metal.simdgroup import FORWARD, Variant
from flash_attn_shim.commands import main

KEY = store.Key("attention_forward", "float16", 64, 64, "short", "causal")
DEFAULT = simdgroup.default(2, 64, 64)
SMALL, WIDE, STAGED = Variant(8, 2, 16, False), Variant(16, 2, 16, False), Variant(8, 2, 16, True)


class Clock:
    """A stopwatch that makes no call, and reads for each variant what `seconds` says."""

    def __init__(self, seconds):
        self.seconds, self.asked, self.kernels = seconds, [], set()

    def __call__(self, call, times):
        variant = call.args[2]
        self.asked.append((variant, times))
        self.kernels.add(call.args[1])
        return self.seconds[variant]


def test_the_fastest_wins(metal):
    clock = Clock({DEFAULT: 3e-3, SMALL: 4e-3, WIDE: 1e-3, STAGED: 2e-3})
    ticks = []
    outcome = tune.tune(KEY, FORWARD, "cpu", clock, candidates=[SMALL, WIDE, STAGED], tick=lambda: ticks.append(1))
    assert outcome == tune.Outcome(KEY, store.Winner(str(WIDE), 1e-3, 3e-3), 4, {})
    assert len(ticks) == 4
    timed = [variant for variant, _ in clock.asked]
    assert timed.count(SMALL) < timed.count(WIDE), "the slow ones drop out early"
    assert dict(clock.asked)[WIDE] == 20, "so many calls as fill a batch"


def test_another_kernel_is_tuned_among_its_own_variants(metal):
    other = replace(FORWARD, variants=(SMALL, WIDE), default=lambda *_shape: SMALL)
    (key,) = tune.keys(other, ["float16"], [64], ["short"], ["causal"])
    assert tune.candidates(key, other) == [SMALL, WIDE]
    ran = []

    def run(trial, kernel, variant):
        ran.append(kernel)
        return tune.launched(trial, kernel, variant)

    clock = Clock({SMALL: 3e-3, WIDE: 1e-3})
    outcome = tune.tune(key, other, "cpu", clock, candidates=[WIDE], run=run)
    assert outcome.winner == store.Winner(str(WIDE), 1e-3, 3e-3)
    assert set(ran) == clock.kernels == {other}


@pytest.mark.parametrize("kernel", [backward_kernels.QUERIES, backward_kernels.KEYS])
def test_kernels_of_gradients_are_tuned_apart(metal, kernel):
    key = store.Key(kernel.entry, "float16", 16, 16, "short", "causal")
    default, fast, wrong, *others = tune.candidates(key, kernel)
    assert default == kernel.default(2, 16, 16)
    assert 10 < len(others) < 40, "as many as may be faster, of hundreds"
    computed = []

    def run(trial, kernel, variant):
        grads = tune.launched(trial, kernel, variant)
        computed.append([grad.shape for grad in grads])
        if variant == wrong:
            grads[-1][0, 5, 0, 0] += 0.05 * grads[-1].abs().max()
        return grads

    clock = Clock({default: 3e-3, fast: 1e-3, wrong: 1e-9})
    outcome = tune.tune(key, kernel, "cpu", clock, candidates=[fast, wrong], run=run)
    assert outcome.winner == store.Winner(str(fast), 1e-3, 3e-3)
    assert "is off by" in outcome.refused[wrong]
    heads = {"attention_backward_queries": [2], "attention_backward_keys": [1, 1]}[kernel.entry]
    assert computed == [[(2, 150, h, 16) for h in heads]] * 3


def test_noise_does_not_displace_the_default(metal):
    clock = Clock({DEFAULT: 1.000e-3, SMALL: 0.990e-3})
    assert tune.tune(KEY, FORWARD, "cpu", clock, candidates=[SMALL]).winner.variant == str(DEFAULT)
    clock.seconds[SMALL] = 0.9e-3
    assert tune.tune(KEY, FORWARD, "cpu", clock, candidates=[SMALL]).winner.variant == str(SMALL)


def test_a_wrong_or_uncompilable_variant_never_wins(metal):
    def run(trial, kernel, variant):
        if variant == WIDE:
            return None
        if variant == STAGED:
            raise ValueError("Threadgroup size exceeds 512 limit")
        (out,) = tune.launched(trial, kernel, variant)
        if variant == SMALL:
            out[0, -1, 0, 0] += 0.05
        return (out,)

    clock = Clock({DEFAULT: 3.0})
    outcome = tune.tune(KEY, FORWARD, "cpu", clock, candidates=[SMALL, WIDE, STAGED], run=run)
    assert outcome.winner.variant == str(DEFAULT)
    assert outcome.refused[WIDE] == "it does not compile"
    assert outcome.refused[STAGED] == "it fails to launch (Threadgroup size exceeds 512 limit)"
    assert "off by 0.05" in outcome.refused[SMALL]


def test_nothing_works(metal):
    outcome = tune.tune(KEY, FORWARD, "cpu", Clock({}), candidates=[WIDE], run=lambda *_: None)
    assert outcome.winner is None
    assert set(outcome.refused) == {DEFAULT, WIDE}


@pytest.mark.parametrize("mask", store.MASKS)
@pytest.mark.parametrize("length", store.LENGTHS)
def test_what_is_timed_is_of_the_class(mask, length):
    key = store.Key("attention_forward", "bfloat16", 64, 32, length, mask)
    p = tune._problem(key, FORWARD, "cpu", False)
    assert store.key_of(p, FORWARD) == key
    small = tune._problem(key, FORWARD, "cpu", True)
    assert (small.window_left >= 0, small.window_right) == (mask == "window", -1 if mask == "full" else 0)


@pytest.mark.parametrize("length", store.LENGTHS)
@pytest.mark.parametrize("rows", decode.ROWS)
def test_decode_is_tuned_by_rows_and_keys(metal, rows, length):
    kernel = decode.DECODE[rows]
    key = store.Key(f"attention_decode of {rows} rows", "float16", 16, 16, length, "full")
    assert tune.keys(kernel, ["float16"], [16], [length], ["full"]) == [key]
    assert store.key_of(tune._problem(key, kernel, "meta", False), kernel) == key
    default, fast, wrong, *others = tune.candidates(key, kernel)
    assert 5 < len(others) < 20

    def run(trial, kernel, variant):
        (out,) = tune.launched(trial, kernel, variant)
        if variant == wrong:
            out[0, 0, 3, 5] += 0.05
        return (out,)

    if length == "short":  # the others have more keys than the runner likes
        clock = Clock({default: 3e-3, fast: 1e-3, wrong: 1e-9})
        outcome = tune.tune(key, kernel, "cpu", clock, candidates=[fast, wrong], run=run)
        assert outcome.winner == store.Winner(str(fast), 1e-3, 3e-3)
        assert "is off by" in outcome.refused[wrong]


def test_with_one_split_what_was_tuned_does_not_depend_on_the_keys_of_a_batch():
    q, k = torch.empty(2, 1, 8, 64), torch.empty(2, 100, 2, 64)
    for keys in (100, 5000, 100000):
        p = AttentionProblem(q, k, k, 2, 1, keys, 1.0, num_splits=1)
        assert store.key_of(p, decode.DECODE[8]).length == "medium"


def test_the_limit_of_few_queries_is_measured_and_kept(metal, cache, monkeypatch):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    monkeypatch.setattr(few, "_KEYS", 100)

    def watch(call, times):
        return call()

    of = few.Class("float16", 64)
    tiled = {8: 3.0, 16: 2.0, 32: 0.5}
    most, seconds = few.measure(of, "cpu", watch, lambda p: 1.0, lambda p: tiled[p.max_seqlen_q])
    assert (most, list(seconds)) == (16, [8, 16, 32])
    q, k = torch.empty(1, 20, 8, 64).half(), torch.empty(1, 100, 2, 64).half()
    p = AttentionProblem(q, k, k, 1, 20, 100, 1.0)
    assert decode.TIER.unsupported_reasons(p) == []
    few.save({of: most})
    few.forget()
    assert decode.TIER.unsupported_reasons(p) == ["there are more than 16 queries"]
    few.forget()
    assert few.most(p) == 16


def test_rounds_alternate_and_a_first_call_does_not_count():
    order = []
    slow_first = {"a": iter([9.0, 1.0, 2.0, 3.0]), "b": iter([9.0, 4.0, 5.0, 6.0])}

    def watch(call, times):
        order.append(call())
        return next(slow_first[order[-1]])

    times = timing.rounds({"a": lambda: "a", "b": lambda: "b"}, watch, 3, 0.1)
    assert times == {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]


@pytest.fixture
def a_mac(metal, cache, monkeypatch):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    clock = Clock({DEFAULT: 3e-3, SMALL: 4e-3, WIDE: 1e-3})
    monkeypatch.setattr(timing, "stopwatch", lambda device: clock)
    monkeypatch.setattr(tune, "candidates", lambda key, kernel: [DEFAULT, SMALL, WIDE])


COMMAND = ["tune", "--device", "cpu", "--dtype", "float16", "--head-dim", "64", "--length", "short", "--mask", "full"]
COMMAND += ["--what", "variants"]


def test_the_command_stores_what_later_calls_use(a_mac, capsys):
    q = torch.randn(1, 100, 2, 64).half()
    p = describe.dense(q, q, q, describe.CallOptions())
    assert variants.chosen(p, FORWARD, tune.briefly) == DEFAULT
    assert main(COMMAND) == 0
    printed = capsys.readouterr().out
    assert str(WIDE) in printed
    assert "3.00x" in printed
    assert str(store.path()) in printed
    assert variants.chosen(p, FORWARD, tune.briefly) == WIDE
    assert main(["tune", "--forget"]) == 0
    assert variants.chosen(p, FORWARD, tune.briefly) == DEFAULT


def test_the_command_tunes_kernels_of_gradients(metal, cache, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    kernels = (backward_kernels.QUERIES, backward_kernels.KEYS, composed.WAYS)
    candidates = {kernel: tune.candidates(key_of(kernel), kernel) for kernel in kernels}
    defaults = {default for default, *_ in candidates.values()}  # which two kernels may share: the clock knows one time
    chosen = {
        kernel: [default, next(v for v in others if v not in defaults)]
        for kernel, (default, *others) in candidates.items()
    }
    assert chosen[composed.WAYS] == [composed.FUSED, composed.COMPOSED]
    seconds = {variant: 1e-3 * (2 - n) for variants in chosen.values() for n, variant in enumerate(variants)}
    monkeypatch.setattr(timing, "stopwatch", lambda device: Clock(seconds))
    monkeypatch.setattr(tune, "candidates", lambda key, kernel: chosen[kernel])
    assert main([*COMMAND[:-1], "gradients"]) == 0
    printed = capsys.readouterr().out
    q = torch.randn(1, 100, 2, 64).half()
    p = describe.dense(q, q, q, describe.CallOptions())
    for kernel, (_, fast) in chosen.items():
        assert re.search(rf"^{kernel.entry.removeprefix('attention_')} +float16 ", printed, re.MULTILINE)
        assert variants.chosen(p, kernel) == fast
    assert variants.chosen(p, FORWARD, tune.briefly) == DEFAULT


def test_the_command_tunes_the_decode_kernel(metal, cache, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    chosen = {kernel.name: tune.candidates(key_of(kernel), kernel)[:2] for kernel in decode.DECODE.values()}
    seconds = {variant: 1e-3 * (2 - n) for variants in chosen.values() for n, variant in enumerate(variants)}
    monkeypatch.setattr(timing, "stopwatch", lambda device: Clock(seconds))
    monkeypatch.setattr(tune, "candidates", lambda key, kernel: chosen[kernel.name])
    monkeypatch.setattr(few, "measure", lambda *how: (64, {8: (1e-3, 2e-3)}))
    assert main([*COMMAND[:-1], "decode"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^float16 +64 +64 +1.000, 2.000 +-", printed, re.MULTILINE)
    for rows, kernel in decode.DECODE.items():
        q, k = torch.empty(1, rows // 8, 8, 64).half(), torch.empty(1, 1, 1, 64).half().expand(1, 1000, 1, 64)
        p = AttentionProblem(q, k, k, 1, rows // 8, 1000, 1.0, window_right=0)
        assert next(decode.variants(p)) == chosen[kernel.name][1]._replace(heads_in_tile=8)
        assert few.most(p) == 64


def key_of(kernel):
    return store.Key(kernel.name, "float16", 64, 64, "short", "full")


def test_auto_stores_too(a_mac, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_TUNE", "auto")
    monkeypatch.setattr(tune, "_neighbours", lambda variant, key, kernel: [WIDE])
    q = torch.empty(1, 3000, 1, 64).half()
    p = describe.dense(q, q, q, describe.CallOptions())
    assert variants.chosen(p, FORWARD, tune.briefly) == WIDE
    assert store.load()[store.key_of(p, FORWARD)].variant == str(WIDE)


def test_neighbours_differ_in_one_step():
    near = tune._neighbours(DEFAULT, KEY, FORWARD)
    assert near
    assert all(sum(a != b for a, b in zip(DEFAULT, other, strict=True)) == 1 for other in near)
    assert set(near) <= set(FORWARD.fitting(2, 64, 64))


@pytest.mark.filterwarnings("ignore:.*cannot be read:RuntimeWarning")
def test_a_cache_that_cannot_be_written_is_said(a_mac, cache, monkeypatch, capsys):
    (cache / "file").touch()
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(cache / "file"))
    assert main(COMMAND) == 1
    assert "Could not save the results" in capsys.readouterr().err


def test_without_metal_it_says_so(cache, capsys):
    compiler.clear()
    assert main(["tune", "--device", "cpu"]) == 2
    assert "Metal kernels run on mps, not on cpu" in capsys.readouterr().err
