"""Putting the function there and away again, failures of ours, threads, pickles, compiled graphs, counters."""

import contextlib
import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import sdpa, trace
from flash_attn_mps.sdpa import serve
from flash_attn_mps.sdpa.call import Arguments
from flash_attn_mps.sdpa.measured import CallClass
from tests.replaced_tiers import leave_out, replace_tier
from tests.sdpa.exact import assert_right

ORIGINAL = F.scaled_dot_product_attention
Q = torch.randn(2, 4, 33, 64).half()


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def taken():
    return sum(sdpa.stats()["taken"].values())


def table():
    return torch._C._dispatch_dump_table("aten::scaled_dot_product_attention")


BEFORE = table()


def test_uninstall_leaves_the_dispatcher_as_it_was(as_mps):
    kernels = dict(serve.operator.py_kernels)
    for _ in range(2):
        sdpa.install()
        sdpa.install()
        assert sdpa.is_installed()
        assert table() != BEFORE
        sdpa.uninstall()
        sdpa.uninstall()
        assert table() == BEFORE
        assert serve.operator.py_kernels == kernels
        assert not sdpa.is_installed()
    assert torch.equal(attend(Q), ORIGINAL(Q, Q, Q, is_causal=True))
    assert taken() == 0


def test_the_keys_of_mps_alone_are_taken():
    """Another device is not slower by anything: its kernels are the very same."""
    with sdpa.installed():
        assert F.scaled_dot_product_attention is ORIGINAL
        changed = {
            new.split(":")[0] for old, new in zip(BEFORE.split("\n"), table().split("\n"), strict=True) if old != new
        }
    assert changed == {"MPS", "AutogradMPS"}


def test_names_that_were_taken_before_are_served(as_mps):
    """By a module, by a default argument, by TorchScript, by torch itself."""
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).train()
    scripted = torch.jit.script(module)
    x = torch.randn(2, 5, 16)
    calls = [
        lambda sdpa=ORIGINAL: sdpa(Q, Q, Q, is_causal=True),
        lambda: torch.ops.aten.scaled_dot_product_attention(Q, Q, Q, is_causal=True),
        lambda: module(x, x, x, need_weights=False)[0],
        lambda: scripted(x, x, x, need_weights=False)[0],
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        with sdpa.installed():
            for count, (call, theirs) in enumerate(zip(calls, expected, strict=True), 1):
                torch.testing.assert_close(call(), theirs, atol=2e-3, rtol=2e-3)
                assert taken() == count


@pytest.mark.parametrize("batch", [1, 3])
def test_the_fast_path_of_multi_head_attention_stays_torchs(as_mps, batch):
    """An operator of its own, which torch has for the CPU and CUDA, not for MPS."""
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(batch, 5, 16)
    with torch.inference_mode():
        expected = module(x, x, x)[0]
        with sdpa.installed():
            assert torch.equal(module(x, x, x)[0], expected)
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}


def test_the_plain_function_is_counted_once(as_mps, given):
    given(torch=(2, 13), fast_min_seq=1 << 30)
    for installed in (contextlib.nullcontext, sdpa.installed):
        sdpa.reset()
        with installed():
            sdpa.scaled_dot_product_attention(Q, Q, Q)
        assert sdpa.stats()["left"] == {"short": 1}


def test_contexts_nest_and_end_with_an_error():
    with pytest.raises(KeyError), sdpa.installed(), sdpa.installed():
        raise KeyError
    assert not sdpa.is_installed()
    assert table() == BEFORE
    with sdpa.installed():
        sdpa.install()
    assert sdpa.is_installed(), "install() is for good"
    with sdpa.installed():
        pass
    assert sdpa.is_installed()


def other_library():
    library = torch.library.Library("aten", "IMPL")
    for key in ("CPU", "AutogradCPU"):
        library.impl("scaled_dot_product_attention", lambda query, *args, **kwargs: torch.zeros_like(query), key)
    return library


def test_a_library_that_was_there_first_keeps_its_place(as_mps):
    theirs = other_library()
    try:
        with pytest.warns(RuntimeWarning, match="keeps its own .* a kernel for CPU, AutogradCPU already") as warned:
            sdpa.install()
        assert warned[0].filename == __file__
        assert not sdpa.is_installed()
        assert not attend(Q).any()
        sdpa.uninstall()
        assert_right(sdpa.scaled_dot_product_attention(Q, Q, Q, is_causal=True), [Q, Q, Q], {"is_causal": True})
    finally:
        theirs._destroy()
    assert table() == BEFORE
    with sdpa.installed():
        assert sdpa.is_installed()


@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel:UserWarning")
@pytest.mark.parametrize("ours_goes_first", [True, False])
def test_a_library_that_comes_later_wins_until_it_goes(as_mps, ours_goes_first):
    sdpa.install()
    try:
        theirs = other_library()
    except RuntimeError as error:  # older releases, like 2.7, have one kernel of Python a key
        assert "already a kernel registered from python" in str(error)
        return
    assert not sdpa.is_installed()
    assert not attend(Q).any()
    for leave in (sdpa.uninstall, theirs._destroy)[:: 1 if ours_goes_first else -1]:
        leave()
    assert table() == BEFORE
    assert torch.equal(attend(Q), serve.torchs(Q, Q, Q, is_causal=True))
    assert taken() == 0


MISSING = {
    "OpOverload has no _op_dk": lambda m: m.setattr(serve, "torchs", ORIGINAL),
    "_get_dispatch_mode": lambda m: m.delattr(torch._C, "_get_dispatch_mode"),
    "CompileContext": lambda m: m.delattr(torch._guards, "CompileContext"),
    "py_impl": lambda m: m.setattr(serve, "operator", object()),
}


@pytest.mark.parametrize("what", MISSING)
def test_without_what_it_needs_of_torch_torchs_attention_is_left_alone(as_mps, what):
    with pytest.MonkeyPatch.context() as m:
        MISSING[what](m)
        with pytest.warns(RuntimeWarning, match=f"keeps its own scaled_dot_product_attention .*{what}") as warned:
            sdpa.install()
        assert len(warned) == 1
        assert not sdpa.is_installed()
        assert torch.equal(attend(Q), ORIGINAL(Q, Q, Q, is_causal=True))
        assert table() == BEFORE
        sdpa.uninstall()
    assert taken() == 0


def test_the_environment_installs_it_and_the_trace_prints_the_counters():
    code = """
import sys, torch
from flash_attn_mps import sdpa
from flash_attn_mps.sdpa import obstacles

print(sdpa.is_installed(), *sys.modules)
sdpa.uninstall()
obstacles.DEVICE = "cpu"
sdpa.install()
q = torch.zeros(1, 1, 2, 8)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
"""
    env = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "MTLFLASHATTN_SDPA": "on"}
    env["MTLFLASHATTN_TRACE"] = "1"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("True ")
    assert ["left", "short", "1"] in [line.split() for line in result.stderr.splitlines()]
    assert "torch._dynamo" not in result.stdout.split(), "it costs a second"
    assert not sdpa.is_installed(), "and without it nothing is"


def fails_with(error, monkeypatch, tiers=("simdgroup", "torch")):
    for name in tiers:
        replace_tier(monkeypatch, name, run=lambda p: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("error", [RuntimeError("broken"), NotImplementedError("no"), ValueError("bad"), KeyError("k")])
def test_a_failure_of_ours_falls_through_with_one_warning(as_mps, given, monkeypatch, error):
    given(torch=(2, 13), fast_min_seq=0)
    monkeypatch.setattr(serve.attention, "problem", lambda arguments: (_ for _ in ()).throw(error))
    with sdpa.installed(), pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: ") as warned:
        outs = [attend(Q) for _ in range(3)]
    assert len(warned) == 1
    assert "known to be wrong" not in str(warned[0].message)
    assert all(torch.equal(out, ORIGINAL(Q, Q, Q, is_causal=True)) for out in outs)
    assert sdpa.stats()["fell through"] == {type(error).__name__: 3}
    assert taken() == 0


def test_the_warning_points_at_the_caller(as_mps, monkeypatch):
    monkeypatch.setattr(serve.attention, "problem", lambda arguments: (_ for _ in ()).throw(KeyError()))
    with sdpa.installed(), pytest.warns(RuntimeWarning) as warned:
        attend(Q)
    assert warned[0].filename == __file__
    assert "although torch 2.7 is known to be wrong here" in str(warned[0].message)


def test_where_torch_is_wrong_the_torch_tier_comes_before_it(metal, monkeypatch):
    fails_with(RuntimeError("Metal device lost"), monkeypatch, ["simdgroup"])
    with sdpa.installed():
        assert_right(attend(Q), [Q, Q, Q], {"is_causal": True})
    assert sdpa.stats()["taken"] == {"pytorch#195910": 1}


def test_for_speed_alone_the_torch_tier_does_not_serve(metal, given, monkeypatch):
    given(torch=(2, 13), fast_min_seq=0)
    leave_out(monkeypatch, "cpu")
    replace_tier(monkeypatch, "simdgroup", run=lambda p: None)
    replace_tier(monkeypatch, "torch", run=lambda p: pytest.fail("slower than torch"))
    expected = attend(Q)
    with sdpa.installed(), pytest.warns(RuntimeWarning, match="does not work"):
        assert torch.equal(attend(Q), expected)
    assert sdpa.stats()["fell through"] == {"NotImplementedError": 1}


def test_a_backward_pass_that_was_measured_to_be_faster_is_taken(metal, given):
    given(torch=(2, 13), measured={CallClass("float32", 64, True, True, "math"): 33.0})
    q = Q.float().requires_grad_()
    with sdpa.installed():
        attend(q).sum().backward()
        attend(q[:, :, :32])
    assert sdpa.stats()["taken"] == {"speed": 1}
    assert sdpa.stats()["left"] == {"short": 1}


def test_the_environment_is_read_when_it_is_installed(monkeypatch):
    q = torch.empty(1, 1, 100, 64, device="meta")
    for name, value in (("MIN_SEQ", "100"), ("FAST_MIN_SEQ", "100"), ("MIN_GB", "0")):
        for taken in (False, True):
            monkeypatch.setenv(f"MTLFLASHATTN_SDPA_{name}", value if taken else "never")
            for install in (sdpa.installed, sdpa.install):
                with install() or contextlib.nullcontext():
                    given = dataclasses.replace(serve.current(), torch=(2, 13 if name == "FAST_MIN_SEQ" else 12))
                    assert serve.examine(Arguments(q, q, q), given, as_if=True)[0].take is taken
                sdpa.uninstall()
        monkeypatch.setenv(f"MTLFLASHATTN_SDPA_{name}", "never")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no"),
    MemoryError(),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("Invalid buffer size: 9 GB"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_raised_since_torch_needs_more(as_mps, monkeypatch, error):
    fails_with(error, monkeypatch)
    with sdpa.installed(), pytest.raises(type(error)):
        attend(Q)
    assert sdpa.stats()["fell through"] == {}


def test_threads_count_exactly(as_mps):
    def work():
        barrier.wait()
        for _ in range(50):
            attend(Q[:1, :1, :4])
            F.scaled_dot_product_attention(Q[0, 0], Q[0, 0], Q[0, 0])

    barrier = threading.Barrier(8)
    sdpa.install()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = sdpa.stats()
    assert sum(stats["taken"].values()) == 400
    assert stats["left"] == {"shape": 400}


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_install_from_many_threads(request, device):
    """The dispatcher frees a kernel that a thread is about to enter: nothing is withdrawn while there are others."""
    if device == "mps":
        request.getfixturevalue("as_mps")

    def work():
        for _ in range(100):
            with sdpa.installed():
                attend(Q[:1, :1, :4])
            attend(Q[:1, :1, :4])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not sdpa.is_installed()
    assert taken() >= (400 if device == "mps" else 0)
    before = taken()
    attend(Q)
    assert taken() == before, "what is left of it passes calls on"
    sdpa.uninstall()
    assert table() == BEFORE


def test_uninstall_beside_threads_that_call(as_mps):
    def work():
        while not done.is_set():
            try:
                attend(Q[:1, :1, :4])
            except Exception as error:
                errors.append(error)

    done, errors = threading.Event(), []
    sdpa.install()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        sdpa.uninstall()
        assert not sdpa.is_installed()
        sdpa.install()
        time.sleep(1e-4)
    done.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert sdpa.is_installed()
    sdpa.uninstall()
    assert table() == BEFORE


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(64, 64)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x):
        q = self.projection(x).unflatten(-1, (4, 16)).transpose(1, 2)
        return self.attend(q, q, q).transpose(1, 2).flatten(2)


def test_pickles_from_before_and_after(as_mps):
    x = torch.randn(2, 33, 64)
    before = pickle.dumps(Attention().eval())
    with torch.no_grad():
        expected = pickle.loads(before)(x)
        with sdpa.installed():
            after = pickle.dumps(Attention().eval())
            for count, loaded in enumerate((pickle.loads(before), pickle.loads(after)), 1):
                assert loaded.attend is copy.deepcopy(loaded).attend is ORIGINAL
                loaded(x)
                assert taken() == count
            torch.testing.assert_close(pickle.loads(before)(x), expected)
    assert pickle.loads(after).attend is ORIGINAL, "a pickle needs nothing of this package"
    assert b"flash_attn_mps" not in after.replace(b"tests.sdpa", b"")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(as_mps, given, use_reentrant):
    given(torch=(2, 12), budget=0)
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        q = Q.float().requires_grad_()
        with sdpa.installed():
            wrap(lambda q: attend(q).square(), q).sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)
    assert taken() == 3, "once, and with a checkpoint twice"


def test_counters_and_reset(as_mps):
    with sdpa.installed():
        attend(Q)
        attend(Q)
        F.scaled_dot_product_attention(Q[0, 0], Q[0, 0], Q[0, 0])
    assert sdpa.stats() == {"taken": {"pytorch#195910": 2}, "left": {"shape": 1}, "fell through": {}}
    (lines,) = (text() for text in trace.at_exit)
    assert [line.split() for line in lines.splitlines()[2:]] == [
        ["taken", "pytorch#195910", "2"],
        ["left", "shape", "1"],
    ]
    sdpa.reset()
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}
    assert [text() for text in trace.at_exit] == [""]
