"""From which length on ours is faster: measured with a clock of the test's own, kept, and used."""

import json
import math

import pytest
import torch

from flash_attn_mps import sdpa, timing
from flash_attn_mps.sdpa import crossover, measured
from flash_attn_mps.sdpa.crossover import Kind
from flash_attn_mps.sdpa.measured import NEVER, CallClass
from flash_attn_mps.tiers.metal import gpu, store, variants
from flash_attn_shim.commands import main
from tests.metal_tiers import metal_on

KIND = Kind("float16", 64, True, False)
CLASS = CallClass("float16", 64, True, False, "prefill")


class Clock:
    """A stopwatch that makes no call: `ours` says how long ours takes at a length, torch's takes as many ms as keys."""

    def __init__(self, ours):
        self.ours, self.asked = ours, []

    def __call__(self, call, times):
        run, arguments, gradient = call.args
        length = arguments.key.shape[-2]
        self.asked.append(
            (run, length, gradient, arguments.is_causal, arguments.query.dtype, arguments.query.shape[-1])
        )
        return 1e-3 * (self.ours(length) if run is crossover._ours else length)


@pytest.mark.parametrize(
    "ours,shortest,timed",
    [
        (lambda n: n / 2, 128, 6),
        (lambda n: n * 2, NEVER, 1),
        (lambda n: n * 0.97, NEVER, 1),  # within noise
        (lambda n: 900 if n < 4096 else n / 2, 1024, 4),
        (lambda n: n / 2 if n != 1024 else n, 2048, 3),  # a gain at shorter ones alone does not count
    ],
)
def test_the_least_length_from_which_on_ours_stays_faster(ours, shortest, timed):
    clock, ticks = Clock(ours), []
    outcome = crossover.measure(KIND, "cpu", clock, tick=lambda: ticks.append(1))
    assert (outcome.call_class, outcome.shortest) == (CLASS, shortest)
    assert len(outcome.seconds) == timed
    assert len(ticks) == len(crossover.LENGTHS)
    assert outcome.seconds[4096] == (ours(4096) / 1e3, 4.096)


@pytest.mark.parametrize("failing,shortest", [("_torchs", 128), ("_ours", NEVER)])
def test_who_has_no_room_for_a_length_loses_it(failing, shortest):
    class Failing(Clock):
        def __call__(self, call, times):
            if call.args[0] is getattr(crossover, failing) and call.args[1].key.shape[-2] == 4096:
                raise RuntimeError("MPS backend out of memory")
            return super().__call__(call, times)

    outcome = crossover.measure(KIND, "cpu", Failing(lambda n: n / 2))
    assert outcome.shortest == shortest
    assert math.inf in outcome.seconds[4096]


@pytest.mark.parametrize("kind", crossover.kinds(["float32", "bfloat16"], [40, 64], [False, True]), ids=str)
def test_what_is_timed_is_of_the_kind(kind):
    clock = Clock(lambda n: n * 2)
    outcome = crossover.measure(kind, "cpu", clock, lengths=[64])
    dtype = getattr(torch, kind.dtype)
    assert {asked[1:] for asked in clock.asked} == {(64, kind.gradient, kind.causal, dtype, kind.head_dim)}
    assert {asked[0] for asked in clock.asked} == {crossover._ours, crossover._torchs}
    route = "math" if kind.gradient else "general" if kind.head_dim == 40 else "prefill"
    assert outcome.call_class == CallClass(kind.dtype, kind.head_dim, kind.causal, kind.gradient, route)


def test_both_sides_compute_what_is_timed():
    for gradient in (False, True):
        arguments = crossover._draw(KIND._replace(gradient=gradient), "cpu", 32)
        assert arguments.query.requires_grad is gradient
        torch.testing.assert_close(crossover._ours(arguments), crossover._torchs(arguments), atol=2e-3, rtol=2e-3)
        for run in (crossover._ours, crossover._torchs):
            crossover._run(run, arguments, gradient)


def test_what_is_stored_holds_and_decides(as_mps, monkeypatch):
    monkeypatch.undo()
    other = CLASS._replace(dtype="bfloat16")
    measured.save({CLASS: 512.0, other: NEVER})
    measured.save({CLASS: 256.0})
    assert measured.load() == {CLASS: 256.0, other: NEVER}
    sdpa.reset()
    q = torch.empty(1, 1, 300, 64, device="meta", dtype=torch.float16)
    decision = sdpa.explain(q, q, q, is_causal=True)
    assert decision.take
    assert "measured by `mtlflashattn tune`" in str(decision)
    assert not sdpa.explain(q.bfloat16(), q.bfloat16(), q.bfloat16(), is_causal=True).take


def test_variants_and_lengths_share_a_file():
    key = store.Key("attention_forward", "float16", 64, 64, "short", "causal")
    winner = store.Winner("8x2x16-direct", 1.0, 2.0)
    measured.save({CLASS: 512.0})
    store.save({key: winner})
    measured.save({CLASS: 256.0})
    assert store.load() == {key: winner}
    assert measured.load() == {CLASS: 256.0}


@pytest.mark.parametrize("entry", [7, {}, {**CLASS._asdict(), "length": "long"}])
def test_a_broken_entry_is_ignored_with_a_warning(entry):
    measured.save({CLASS: 512.0})
    data = json.loads(store.path().read_text())
    data["sdpa"] = [entry]
    store.path().write_text(json.dumps(data))
    with pytest.warns(RuntimeWarning, match="ignoring .*: it is broken"):
        assert measured.load() == {}
    measured.save({CLASS: 512.0})
    assert measured.load() == {CLASS: 512.0}


COMMAND = ["tune", "--device", "cpu", "--dtype", "float16", "--head-dim", "64", "--mask", "causal", "--what", "sdpa"]


@pytest.fixture
def a_mac(metal, monkeypatch):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")
    clock = Clock(lambda n: 900 if n < 2048 else n / 2)
    monkeypatch.setattr(timing, "stopwatch", lambda device: clock)


def test_the_command(a_mac, capsys):
    assert main(COMMAND) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["float16", "64", "causal", "forward", "prefill", "1024"] in [row[:6] for row in rows]
    assert ["float16", "64", "causal", "backward", "math", "1024"] in [row[:6] for row in rows]
    assert str(store.path()) in printed
    assert measured.load() == {CLASS: 1024, CLASS._replace(gradient=True, route="math"): 1024}
    assert main(["tune", "--forget"]) == 0
    assert measured.load() == {}


@pytest.mark.filterwarnings("ignore:.*cannot be read:RuntimeWarning")
def test_the_command_where_nothing_can_be_kept(a_mac, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(store.CACHE, str(tmp_path / "file"))
    assert main(COMMAND) == 1
    assert "Could not save the results" in capsys.readouterr().err


def test_a_real_measurement_on_the_runner(monkeypatch):
    """No clock of the test's, short lengths: whatever is faster here, both sides run and an answer comes."""
    monkeypatch.setattr(crossover, "_BATCH_SECONDS", 1e-6)
    variants.forget()
    with metal_on("cpu"):
        outcome = crossover.measure(KIND, "cpu", timing.stopwatch("cpu"), lengths=[16])
    assert all(seconds > 0 for seconds in outcome.seconds[16])
