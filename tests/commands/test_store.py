"""What was tuned is kept, found again and not believed where it does not hold."""

import json
import timeit
import warnings
from dataclasses import replace

import pytest
import torch

from flash_attn_mps import describe
from flash_attn_mps.tiers.metal import gpu, simdgroup, store, variants
from flash_attn_mps.tiers.metal.simdgroup import FORWARD, Variant
from flash_attn_shim.commands import examine

KEY = store.Key("attention_forward", "float16", 64, 64, "short", "causal")
TUNED = store.Winner("8x2x16-direct", 1e-3, 2e-3)


def call(length=300, dtype=torch.float16, head_dim=64, **options):
    q = torch.empty(1, length, 2, head_dim, dtype=dtype)
    return describe.dense(q, q, q, describe.CallOptions(**options))


def chosen(p, tuned=None):
    """The name of the variant that `p` gets."""
    return str(variants.chosen(p, FORWARD, tuned))


def default(p):
    return str(simdgroup.default(p.q.itemsize, p.q.shape[-1], p.v.shape[-1]))


@pytest.fixture(autouse=True)
def _a_mac(monkeypatch, cache):
    monkeypatch.setattr(gpu, "name", lambda: "Apple M3 Max, 40 cores")


def test_a_stored_winner_is_chosen_for_its_class_only():
    assert TUNED.variant != default(call())
    store.save({KEY: TUNED})
    assert store.load() == {KEY: TUNED}
    assert chosen(call(causal=True)) == TUNED.variant
    for other in (
        call(),
        call(600, causal=True),
        call(dtype=torch.bfloat16, causal=True),
        call(head_dim=128, causal=True),
    ):
        assert chosen(other) == default(other)


def test_kernels_do_not_share_their_winners(monkeypatch):
    """Not even by a variable: each has its own."""
    other = replace(FORWARD, entry="attention_other", variable="OTHER_VARIANT")
    p = call(causal=True)
    of_other = TUNED._replace(variant="16x2x16-direct")
    store.save({KEY: TUNED, store.key_of(p, other): of_other})
    assert (chosen(p), str(variants.chosen(p, other, None))) == (TUNED.variant, of_other.variant)
    variants.forget()
    monkeypatch.setenv("OTHER_VARIANT", "16x2x16-direct")
    assert (chosen(p), str(variants.chosen(p, other, None))) == (TUNED.variant, "16x2x16-direct")


def test_a_window_that_was_not_tuned_takes_what_causal_has():
    store.save({KEY: TUNED})
    assert chosen(call(causal=True, window_size=(50, 0))) == TUNED.variant
    variants.forget()
    own = TUNED._replace(variant="16x2x16-direct")
    store.save({KEY._replace(mask="window"): own})
    assert chosen(call(causal=True, window_size=(50, 0))) == own.variant


@pytest.mark.parametrize(
    ("length", "expected"), [(1, "short"), (512, "short"), (513, "medium"), (2048, "medium"), (2049, "long")]
)
def test_length_classes_agree_with_the_fast_look_up(length, expected):
    p = call(length)
    assert store.key_of(p, FORWARD).length == expected
    winner = TUNED._replace(variant="16x1x8-direct")
    store.save({store.key_of(p, FORWARD): winner})
    assert chosen(p) == winner.variant
    for other in (512, 513, 2048, 2049):
        same = store.key_of(call(other), FORWARD).length == expected
        assert (chosen(call(other)) == winner.variant) == same


def test_saving_adds_and_replaces():
    other = KEY._replace(mask="full")
    store.save({KEY: TUNED, other: TUNED})
    better = TUNED._replace(variant="16x1x8-direct")
    store.save({KEY: better})
    assert store.load() == {KEY: better, other: TUNED}
    assert [file.name for file in store.path().parent.iterdir()] == ["variants.json"]


def test_a_failed_save_leaves_the_old_file(monkeypatch):
    store.save({KEY: TUNED})
    monkeypatch.setattr(store.json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.save({KEY: TUNED._replace(variant="16x1x8-direct")})
    assert store.load() == {KEY: TUNED}
    assert [file.name for file in store.path().parent.iterdir()] == ["variants.json"]


def one_warning(match):
    p = call(causal=True)
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert chosen(p) == default(p)
        chosen(call())
        chosen(call(5000))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["machine"].update(gpu="Apple M1, 8 cores"), "was made with gpu 'Apple M1, 8 cores'"),
        (lambda data: data["machine"].update(torch="2.7.0"), "was made with torch '2.7.0'"),
        (lambda data: data["machine"].update(kernels="0"), "was made with kernels '0'"),
        (lambda data: data.update(format=1), "has format 1"),
        (lambda data: data["winners"][0].update(variant=[8, 2]), "is broken"),
        (lambda data: data["winners"][0].pop("kernel"), "is broken"),
        (lambda data: data["winners"][0].update(length="endless"), "is broken"),
        (lambda data: data.update(winners=[7]), "is broken"),
        (lambda data: data.pop("machine"), "is broken"),
    ],
)
def test_a_file_that_does_not_hold_is_ignored_with_one_warning(change, match):
    store.save({KEY: TUNED})
    data = json.loads(store.path().read_text())
    change(data)
    store.path().write_text(json.dumps(data))
    one_warning(match)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_broken_file_is_ignored_with_one_warning_and_replaced(content):
    store.path().write_bytes(content)
    one_warning("is broken|cannot be read")
    store.save({KEY: TUNED})
    assert store.load() == {KEY: TUNED}


def test_a_variant_that_does_not_exist_is_not_run():
    """7 rows would compute nonsense, and 4096 keys would not fit."""
    for name in ("7x4x32-direct", "16x4x4096-staged"):
        store.save({KEY: TUNED._replace(variant=name)})
        variants.forget()
        assert chosen(call(causal=True)) == default(call())


def test_kernels_that_changed_make_it_stale(monkeypatch):
    store.save({KEY: TUNED})
    sources = store.specialization.sources()
    monkeypatch.setattr(store.specialization, "sources", lambda: [*sources[:-1], (sources[-1][0], "// changed")])
    with pytest.warns(RuntimeWarning, match="was made with kernels"):
        assert store.load() == {}


def test_forced_variant_wins_and_an_impossible_one_says_why(monkeypatch):
    store.save({KEY: TUNED})
    monkeypatch.setenv("MTLFLASHATTN_VARIANT", "16x2x16-direct")
    assert variants.chosen(call(causal=True), FORWARD, None) == Variant(16, 2, 16, False)
    variants.forget()
    monkeypatch.setenv("MTLFLASHATTN_VARIANT", "32x4x32-direct")
    with pytest.raises(
        NotImplementedError, match=r"MTLFLASHATTN_VARIANT=32x4x32-direct .* 256 .*there are 8x1x8-direct-q"
    ):
        chosen(call(head_dim=256))


def test_without_a_file_there_is_no_warning_and_no_digest(monkeypatch):
    monkeypatch.setattr(store, "_digest", lambda: pytest.fail("the sources were read"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(call()) == default(call())


def test_the_directory(monkeypatch):
    monkeypatch.delenv("MTLFLASHATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setattr(store.sys, "platform", "linux")
    assert str(store.path()) == "/xdg/mtlflashattn/variants.json"
    monkeypatch.setattr(store.sys, "platform", "darwin")
    assert store.path().parts[-4:] == ("Library", "Caches", "mtlflashattn", "variants.json")


def test_auto_tunes_the_first_long_call_of_a_class(monkeypatch):
    tuned = []

    def tune(p, kernel):
        tuned.append(store.key_of(p, kernel))
        return TUNED

    chosen(call(4000), tune)
    assert not tuned, "tuning is off by default"
    monkeypatch.setenv("MTLFLASHATTN_TUNE", "auto")
    variants.forget()
    for _ in range(2):
        assert chosen(call(4000), tune) == TUNED.variant
        assert chosen(call(100), tune) == default(call(100))
    assert tuned == [store.Key("attention_forward", "float16", 64, 64, "long", "full")]


def test_the_doctor_says_what_is_tuned():
    assert examine._tuned().startswith("none")
    store.save({KEY: TUNED})
    assert examine._tuned() == f"for 1 classes of calls, in {store.path()}"
    store.path().write_text("{")
    assert f"ignoring {store.path()}: it is broken" in examine._tuned()


def test_a_look_up_costs_a_few_microseconds():
    p = call(causal=True)
    store.save({KEY: TUNED})
    seconds = min(timeit.repeat(lambda: variants.chosen(p, FORWARD, None), number=1000, repeat=20)) / 1000
    assert seconds < 5e-6
