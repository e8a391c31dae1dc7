"""Who takes the tier `tensorops`: a Mac with an M5, imitated, whose Metal is the runner."""

import contextlib
import functools
import re
import warnings

import pytest
import torch

from flash_attn_mps import describe, tiers, timing, trace
from flash_attn_mps.frontends.fa2 import flash_attn_func
from flash_attn_mps.tiers.metal import compiler, proved, simdgroup, store, tensorops, tensorops_gate, tune, variants
from flash_attn_shim.commands import main
from metal_host import compile_shader, observe
from tests.attention import oracle
from tests.attention.rule import assert_within_rule
from tests.commands.test_tune import Clock
from tests.mac import mac

METAL_4 = functools.partial(compile_shader, version="4.0")
FORCE = "MTLFLASHATTN_KERNEL"


@pytest.fixture(autouse=True)
def _anew(monkeypatch, tmp_path):
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())


@contextlib.contextmanager
def machine(compile_=METAL_4, layout="apple10", **how):
    """The Mac of `mac(**how)`, with nothing compiled yet. `layout`: of its cooperative tensors."""
    with mac(**how) as patch:
        patch.setenv("METAL_HOST_LAYOUT", str(layout))  # in every thread: proofs run in one of their own
        patch.setattr(compiler, "compile_shader", compile_)
        compiler.clear()
        variants.forget()
        try:
            yield patch
        finally:
            compiler.clear()
            variants.forget()


def served(dtype=torch.float16, length=70, **how):
    """(the tier that serves flash_attn_func, the kernels that it ran but the probe). Right, too."""
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, length, 2, 32, generator=g).to(dtype) for _ in range(3)]
    trace.calls.clear()
    with observe(instrumented=False) as launches:
        out = flash_attn_func(*qkv, **how)
    exact, plain = oracle.dense(*(x.double() for x in qkv), **how).out, oracle.dense(*qkv, **how).out
    assert_within_rule("out", out, plain, exact)
    (call,) = trace.calls
    return call.tier, [launch.kernel for launch in launches if launch.kernel != "tensorops_probe"]


OURS = ("tensorops", ["attention_tensorops"])
TILED = ("simdgroup", ["attention_forward"])


@pytest.mark.parametrize("layout", ["apple10", "legacy", 5])
def test_an_m5_takes_it_whatever_its_layout(layout):
    with machine(layout=layout):
        assert served(causal=True) == OURS
        assert tensorops.probe.layout() == (layout if isinstance(layout, str) else "generic")


def test_float32_and_few_queries_stay_with_others():
    with machine():
        assert served(torch.float32)[0] == "simdgroup"
        assert served(length=70)[0] == "tensorops"
        g = torch.Generator().manual_seed(0)
        q, kv = torch.randn(1, 2, 2, 32, generator=g).half(), torch.randn(1, 300, 2, 32, generator=g).half()
        trace.calls.clear()
        flash_attn_func(q, kv, kv)
        (call,) = trace.calls
        assert call.tier == "decode"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"macos": "26.1"}, "needs macOS 26.2 or later, and this is macOS 26.1"),
        ({"torch_version": "2.10.0"}, "needs torch 2.11 or later"),
        ({"chip": "Apple M4 Max"}, "has no matrix units beside its ALUs"),
    ],
    ids=["macos", "torch", "gpu"],
)
def test_a_gate_that_fails_leaves_the_simdgroup_tier(how, reason):
    with machine(**how):
        assert served() == TILED
        q = torch.randn(1, 70, 2, 32).half()
        (told,) = tiers.explain(describe.dense(q, q, q, describe.CallOptions()))["tensorops"]
        assert reason in told


def test_a_compiler_without_metal_4_leaves_the_simdgroup_tier():
    with machine(compile_shader), pytest.warns(RuntimeWarning, match="tensorops_probe"):
        assert served() == TILED


def test_forced_it_runs_on_older_gpus_and_says_why_it_cannot(monkeypatch):
    monkeypatch.setenv(FORCE, "tensorops")
    with machine(chip="Apple M3"):
        assert served() == OURS
        with pytest.raises(NotImplementedError, match="matrix units multiply 16 bits, and q is float32"):
            served(torch.float32)
    with machine(macos="15.5"), pytest.raises(NotImplementedError, match=r"needs macOS 26\.2 or later"):
        served()


def test_what_was_tuned_decides_on_every_gpu():
    """On an older GPU too, and against it on an M5."""
    for chip, way, tier in (("Apple M3", "tensorops", OURS), ("Apple M5", "simdgroup", TILED)):
        with machine(chip=chip):
            key = store.Key(tensorops.WAYS.name, "float16", 32, 32, "short", "full")
            store.save({key: store.Winner(way, 1.0, 2.0)})
            variants.forget()
            assert served() == tier


@pytest.mark.parametrize("way", ["tensorops", "simdgroup"])
def test_the_variable_of_ways(way, monkeypatch):
    monkeypatch.setenv(tensorops.WAYS.variable, way)
    with machine():
        assert served()[0] == way


def test_a_kernel_that_assumes_another_layout_is_refused_by_its_proof(monkeypatch):
    """As if the system had changed behind the answer that is kept: one warning, and the simdgroup tier."""
    monkeypatch.setenv(proved.PROVE, "once")
    monkeypatch.setattr(tensorops.probe, "layout", lambda: "apple10")
    with machine(layout="legacy"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert served() == TILED
    (warning,) = caught
    assert "attention_tensorops gave a wrong result" in str(warning.message)


def test_it_is_asked_behind_decode_and_before_simdgroup():
    names = [tier.name for tier in tiers.ORDER]
    assert names.index("decode") < names.index(tensorops_gate.NAME) < names.index("simdgroup")


def test_the_command_tunes_it_and_then_which_kernel_to_use(monkeypatch, capsys):
    default, fast = tensorops.FORWARD.default(2, 64, 64), tensorops.Variant(16, 2, 32, True)
    usual = simdgroup.FORWARD.default(2, 64, 64)
    chosen = {
        simdgroup.FORWARD: [usual],
        tensorops.FORWARD: [default, fast],
        tensorops.WAYS: ["tensorops", "simdgroup"],
    }
    seconds = {usual: 1e-3, default: 3e-3, fast: 2e-3, "tensorops": 2e-3, "simdgroup": 1e-3}
    monkeypatch.setattr(timing, "stopwatch", lambda _device: Clock(seconds))
    monkeypatch.setattr(tune, "candidates", lambda _key, kernel: chosen[kernel])
    command = "tune --device cpu --dtype float16 float32 --head-dim 64 --length short --mask full --what variants"
    with machine():
        monkeypatch.setitem(seconds, simdgroup.FORWARD.default(4, 64, 64), 1e-3)
        assert main(command.split()) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^tensorops +float16 +64 +short +full +{fast} ", printed, re.MULTILINE)
        assert re.search(r"^tiled +float16 +64 +short +full +simdgroup ", printed, re.MULTILINE)
        assert not re.search("^(tensorops|tiled) +float32 ", printed, re.MULTILINE)
        q = torch.empty(1, 70, 2, 64).half()
        p = describe.dense(q, q, q, describe.CallOptions())
        assert variants.chosen(p, tensorops.FORWARD) == fast
        assert variants.chosen(p, tensorops.WAYS) == "simdgroup"
    with machine(macos="15.5"):
        assert main(command.split()) == 0
        assert not re.search("^(tensorops|tiled) ", capsys.readouterr().out, re.MULTILINE)
