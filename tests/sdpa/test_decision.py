"""Which calls are taken: torch releases, dtypes, shapes, budgets and environment variables, without any tensor."""

import pytest
import torch

from flash_attn_mps import sdpa
from flash_attn_mps.sdpa import hazards, settings, torch_paths
from flash_attn_mps.sdpa.call import Call
from flash_attn_mps.sdpa.decision import decide
from flash_attn_mps.sdpa.measured import NEVER, CallClass
from flash_attn_mps.sdpa.settings import GIB, Settings

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
RELEASES = [(2, minor) for minor in range(7, 16)]


def call(
    dtype=HALF, batch=1, heads=8, heads_k=None, q=512, k=512, d=64, dv=None, mask="none", mask_varies="qk", **others
):
    heads_k = heads_k or heads
    keys, values = torch.Size((batch, heads_k, k, d)), torch.Size((batch, heads_k, k, dv or d))
    if mask != "none":
        strides = [int(axis in mask_varies) for axis in "bhqk"]
        kind = {"bool": torch.bool, "same": dtype, "float32": FP32}[mask]
        others["attn_mask"] = (torch.Size((batch, heads, q, k)), kind, tuple(strides))
    return Call(torch.Size((batch, heads, q, d)), keys, values, (dtype,) * 3, **others)


def issues(which, release):
    return {hazard.issue for hazard in hazards.hazards(which, release)}


HAZARDS = [
    # a call, the issue, the releases among 2.7 to 2.15 that have it
    (call(causal=True), "pytorch#195910", (7, 12)),
    (call(BF16, causal=True), "pytorch#195910", (7, 12)),
    (call(causal=True, q=1, k=1), "pytorch#195910", (7, 12)),
    (call(causal=True, d=40), "pytorch#195910", (7, 15)),  # no fused kernel has this head dim, even in 2.15
    (call(FP32, causal=True), "pytorch#195910", None),
    (call(), "pytorch#195910", None),
    (call(causal=True, gradient=True), "pytorch#195910", None),  # plain matrix products, an explicit mask
    (call(causal=True, dropout=True), "pytorch#195910", None),
    (call(dv=32), "pytorch#176767", (7, 11)),
    (call(FP32, dv=128, causal=True), "pytorch#176767", (7, 11)),
    (call(dv=32, gradient=True), "pytorch#176767", None),
    (call(), "pytorch#176767", None),
    (call(heads=16, q=16384, k=8192, d=40), "pytorch#179352", (7, 15)),
    (call(FP32, batch=2, q=16384, k=8192), "pytorch#179352", (7, 12)),
    (call(heads=15, q=16384, k=8192, d=40), "pytorch#179352", None),
    (call(heads=16, q=16384, k=8192, gradient=True), "pytorch#179352", (7, 15)),
    (call(heads=16, q=16384, k=8192, dropout=True), "pytorch#179352", (7, 15)),
    (call(k=3069), "pytorch#190791", (7, 12)),
    (call(BF16, k=3069, d=160), "pytorch#190791", (7, 15)),
    (call(k=3068), "pytorch#190791", None),
    (call(FP32, k=3069), "pytorch#190791", None),
    (call(), "pytorch#160841", (7, 9)),
    (call(BF16), "pytorch#160841", None),
    (call(q=8), "pytorch#160841", None),
    (call(mask="bool"), "pytorch#156707", (7, 8)),
    (call(FP32, mask="same"), "pytorch#156707", (7, 8)),
    (call(mask="bool", q=1), "pytorch#156707", None),
    (call(), "pytorch#156707", None),
    (call(q=1, k=1024), "pytorch#174861", (8, 10)),
    (call(BF16, q=8, k=4096, heads_k=2), "pytorch#174861", (8, 10)),
    (call(q=1, k=1023), "pytorch#174861", None),
    (call(q=9, k=1024), "pytorch#174861", None),
    (call(FP32, q=1, k=1024), "pytorch#174861", None),
    (call(q=1, k=1024, d=80), "pytorch#174861", None),
    (call(FP32, q=1, k=39), "pytorch#169222", (8, 10)),
    (call(FP32, q=1, k=64), "pytorch#169222", None),
    (call(FP32, q=1, k=64, transposed=True), "pytorch#181133", (8, 11)),
    (call(FP32, q=9, k=64, transposed=True), "pytorch#181133", None),
    (call(FP32, q=8, mask="bool"), "pytorch#182285", (7, 11)),
    (call(FP32, q=8, mask="same"), "pytorch#182285", None),
    (call(FP32, batch=2, q=8, mask="bool", mask_varies="bqk"), "pytorch#184180", (7, 12)),
    (call(FP32, batch=2, q=8, mask="bool", mask_varies="bhqk"), "pytorch#184180", None),
    (call(FP32, batch=2, q=8, mask="bool", mask_varies="qk"), "pytorch#184180", None),
]


@pytest.mark.parametrize("which,issue,minors", HAZARDS)
def test_a_hazard_holds_for_its_releases_and_no_others(which, issue, minors):
    having = {release for release in RELEASES if issue in issues(which, release)}
    first, last = minors or (0, -1)
    assert having == {(2, minor) for minor in range(first, last + 1)}


@pytest.mark.parametrize("which,issue,minors", [row for row in HAZARDS if row[2]])
def test_a_hazard_is_taken_whatever_the_settings(which, issue, minors):
    for release in RELEASES:
        decision = decide(which, Settings(release, NEVER, min_seq=NEVER, fast_min_seq=NEVER))
        assert decision.take == bool(issues(which, release))
        if minors[0] <= release[1] <= minors[1]:
            assert decision.take
            assert decision.needed
            assert f"torch {release[0]}.{release[1]} is known to be wrong" in str(decision)
            assert issue in str(decision)


def test_every_hazard_is_in_the_table_above():
    assert {hazard.issue for hazard in hazards.TABLE} == {issue for _, issue, minors in HAZARDS if minors}


ROUTES = [
    (call(), "general", "prefill"),
    (call(d=40), "general", "general"),
    (call(d=256), "general", "prefill"),
    (call(dv=32), "general", "general"),
    (call(mask="bool"), "general", "prefill"),
    (call(mask="same"), "general", "prefill"),
    (call(mask="float32"), "general", "general"),
    (call(q=8), "vector", "vector"),
    (call(q=8, k=4), "general", "general"),
    (call(q=1, causal=True), "general", "vector"),
    (call(q=1, mask="same"), "general", "vector"),
    (call(q=1, d=256), "general", "vector"),
    (call(q=1, d=80), "general", "general"),
    (call(gradient=True), "math", "math"),
    (call(dropout=True), "math", "math"),
]


@pytest.mark.parametrize("which,old,new", ROUTES)
def test_routes(which, old, new):
    assert {torch_paths.route(which, release) for release in RELEASES if release < (2, 13)} == {old}
    assert {torch_paths.route(which, release) for release in RELEASES if release >= (2, 13)} == {new}


# 1 x 8 x 4096 x 2048 scores of 4 bytes: a quarter of a GiB
BIG = {"dtype": FP32, "q": 4096, "k": 2048, "d": 48}
MEMORY = [
    (call(**BIG), (2, 12), 0.25, True),
    (call(**BIG), (2, 12), 0.2501, False),
    (call(**BIG), (2, 15), 0.25, True),
    (call(**{**BIG, "d": 64}), (2, 12), 0.25, True),
    (call(**{**BIG, "d": 64}), (2, 13), 0.0, False),  # fused: there is no such matrix
    (call(**{**BIG, "d": 64, "gradient": True}), (2, 15), 0.25, True),
    (call(**{**BIG, "dtype": HALF, "gradient": True}), (2, 15), 0.25, True),
    (call(**{**BIG, "q": 1}), (2, 12), 0.25, False),
]


@pytest.mark.parametrize("which,release,gigabytes,taken", MEMORY)
def test_the_budget(which, release, gigabytes, taken):
    decision = decide(which, Settings(release, gigabytes * GIB, min_seq=NEVER, fast_min_seq=NEVER))
    assert decision.take is taken
    assert ("memory" in [reason.key for reason in decision.reasons]) is taken
    if taken:
        assert "MTLFLASHATTN_SDPA_MIN_GB" in str(decision)
        assert "0.25 GB" in str(decision)


SAFE = {"dtype": FP32, "q": 700, "k": 900}
LONG = call(FP32, q=4096, k=4096)


def measured(length, route="prefill", dtype="float32", causal=False, gradient=False, **others):
    return {"measured": {CallClass(dtype, 64, causal, gradient, route): length}, **others}


SPEED = [
    (call(**SAFE), (2, 12), {}, False),
    (call(**{**SAFE, "q": 1024, "k": 1023}), (2, 12), {}, False),  # both lengths count
    (call(**{**SAFE, "q": 1024, "k": 1024}), (2, 12), {}, True),
    (call(**SAFE), (2, 12), {"min_seq": 700}, True),
    (call(**SAFE), (2, 12), {"min_seq": 701}, False),
    (call(**SAFE), (2, 12), {"min_seq": NEVER}, False),
    (call(**SAFE), (2, 12), {"fast_min_seq": 0}, False),  # torch's path is not a fused one
    (call(**SAFE), (2, 13), {"min_seq": 0}, False),  # torch's path is a fused one
    (LONG, (2, 13), {}, False),
    (call(**SAFE), (2, 13), {"fast_min_seq": 700}, True),
    (call(**{**SAFE, "q": 1}), (2, 12), {"fast_min_seq": 1}, True),
    (call(**{**SAFE, "d": 320}), (2, 12), {"min_seq": 0}, False),  # no Metal kernel
    # Of few queries the keys count alone, and another kernel has wider heads.
    (call(**{**SAFE, "q": 20, "k": 1024}), (2, 12), {}, True),
    (call(**{**SAFE, "q": 33, "k": 1024}), (2, 12), {}, False),
    (call(**{**SAFE, "q": 20, "k": 1023}), (2, 12), {}, False),
    (call(**{**SAFE, "q": 4, "d": 320, "k": 1024}), (2, 13), {}, True),
    (call(**{**SAFE, "q": 4, "d": 520, "k": 1024}), (2, 13), {}, False),
    (call(**{**SAFE, "q": 1, "k": 8192}), (2, 13), {}, False),  # torch's path is a fused one
    (call(**{**SAFE, "gradient": True}), (2, 12), {"min_seq": 0, "fast_min_seq": 0}, False),
    (call(**{**SAFE, "dropout": True}), (2, 12), {"min_seq": 0, "fast_min_seq": 0}, False),
    (call(**SAFE), (2, 13), measured(512.0), True),
    (call(**SAFE), (2, 13), measured(1024.0), False),
    (call(**SAFE), (2, 13), measured(512.0, dtype="float16"), False),
    (call(**SAFE), (2, 13), measured(512.0, causal=True), False),
    (call(**SAFE), (2, 13), measured(512.0, route="general"), False),
    (call(**SAFE), (2, 13), measured(512.0, fast_min_seq=NEVER), False),  # the user has the last word
    (LONG, (2, 12), measured(NEVER, route="general"), False),
    (call(**{**SAFE, "gradient": True}), (2, 13), measured(512.0, route="math", gradient=True), True),
]


@pytest.mark.parametrize("which,release,others,taken", SPEED)
def test_speed(which, release, others, taken):
    decision = decide(which, Settings(release, NEVER, **others))
    assert decision.take is taken, str(decision)
    assert not decision.needed


ENVIRONMENTS = [
    ({}, (None, None)),
    ({"MTLFLASHATTN_SDPA_MIN_SEQ": "512"}, (512, None)),
    ({"MTLFLASHATTN_SDPA_FAST_MIN_SEQ": "2048"}, (None, 2048)),
    ({"MTLFLASHATTN_SDPA_MIN_SEQ": "never", "MTLFLASHATTN_SDPA_FAST_MIN_SEQ": "0"}, (NEVER, 0)),
    ({"MTLFLASHATTN_SDPA_MIN_SEQ": "auto"}, (None, None)),
]


@pytest.mark.parametrize("env,lengths", ENVIRONMENTS)
def test_lengths_from_the_environment(env, lengths):
    found = settings.read(env)
    assert (found.min_seq, found.fast_min_seq) == lengths
    assert found.torch == torch_paths.version(torch.__version__)


@pytest.mark.parametrize("text,size", [("0.5", GIB / 2), ("0", 0), ("never", NEVER), ("", 4 * GIB)])
def test_the_budget_from_the_environment(text, size):
    assert settings.read({"MTLFLASHATTN_SDPA_MIN_GB": text}).budget == size


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
@pytest.mark.parametrize("name", [settings.MIN_GB, settings.MIN_SEQ, settings.FAST_MIN_SEQ])
def test_nonsense_in_the_environment_is_said(name, text):
    with pytest.warns(UserWarning, match=f"ignoring {name}={text}; expected a number"):
        found = settings.read({name: text})
    assert (found.budget, found.min_seq, found.fast_min_seq) == (4 * GIB, None, None)


def test_an_eighth_of_the_memory_is_the_budget(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for recommended, budget in ((16 * GIB, 2 * GIB), (96 * GIB, 4 * GIB)):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda size=recommended: size)
        assert settings.default_budget() == budget


@pytest.mark.parametrize("text,on", [("on", 1), ("1", 1), ("TRUE", 1), ("off", 0), ("", 0), ("0", 0), ("auto", 0)])
def test_the_switch(text, on):
    assert settings.wanted({"MTLFLASHATTN_SDPA": text}) is bool(on)
    assert not settings.wanted({})


@pytest.mark.parametrize("text", ["2.13.0+cpu", "2.13.1", "2.13.0a0+git123", "2.13.0.dev20260807"])
def test_versions(text):
    assert torch_paths.version(text) == (2, 13)


def test_explain_takes_meta_tensors_and_any_release():
    q = torch.empty(1, 8, 8192, 128, dtype=HALF, device="meta")
    old = sdpa.explain(q, q, q, is_causal=True, torch_version="2.10.0")
    assert old.take
    assert "pytorch#195910" in str(old)
    new = sdpa.explain(q, q, q, is_causal=True, torch_version="2.15.0")
    assert not new.take
    assert str(new).startswith("left to torch: ")
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}, "nothing was called"
