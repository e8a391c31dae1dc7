"""Putting the function there and away again, failures of ours, threads, pickles, compiled graphs, counters."""

import contextlib
import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import sdpa, trace
from flash_attn_mps.sdpa import patch
from flash_attn_mps.sdpa.call import bind
from flash_attn_mps.sdpa.measured import CallClass
from tests.replaced_tiers import leave_out, replace_tier
from tests.sdpa.exact import assert_right

ORIGINAL = F.scaled_dot_product_attention
Q = torch.randn(2, 4, 33, 64).half()


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def taken():
    return sum(sdpa.stats()["taken"].values())


def test_uninstall_leaves_the_very_same_object():
    sdpa.install()
    sdpa.install()
    assert sdpa.is_installed()
    assert F.scaled_dot_product_attention is not ORIGINAL
    sdpa.uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL
    sdpa.uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL
    assert not sdpa.is_installed()


def test_no_name_of_a_builtin_outlives_the_function():
    """torch.jit keeps them by id, which the next object may have."""
    table = torch.jit._builtins._get_builtin_table()
    before = dict(table)
    with sdpa.installed():
        assert table[id(F.scaled_dot_product_attention)] == "aten::scaled_dot_product_attention"
    assert table == before


def test_contexts_nest_and_end_with_an_error():
    with pytest.raises(KeyError), sdpa.installed(), sdpa.installed():
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    with sdpa.installed():
        sdpa.install()
    assert sdpa.is_installed(), "install() is for good"
    with sdpa.installed():
        pass
    assert sdpa.is_installed()


def test_another_patch_on_top_is_not_lost(as_mps):
    def theirs(*args, **kwargs):
        return ours(*args, **kwargs) + 1

    sdpa.install()
    ours = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = theirs
        sdpa.uninstall()
        assert F.scaled_dot_product_attention is theirs
        assert torch.equal(attend(Q), ORIGINAL(Q, Q, Q, is_causal=True) + 1), "ours is off"
        assert taken() == 0
        sdpa.install()
        assert_right(attend(Q), [Q, Q, Q], {"is_causal": True})  # on top of theirs, without a circle
        assert sdpa.explain(Q, Q, Q).take
        sdpa.uninstall()
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = ORIGINAL


def test_the_environment_installs_it_and_the_trace_prints_the_counters():
    code = (
        "import torch, torch.nn.functional as F, flash_attn_mps; q = torch.zeros(1, 1, 2, 8);"
        "import sys; print(flash_attn_mps.sdpa.is_installed(), *sys.modules); F.scaled_dot_product_attention(q, q, q)"
    )
    env = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "MTLFLASHATTN_SDPA": "on"}
    env["MTLFLASHATTN_TRACE"] = "1"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("True ")
    assert ["left", "not", "on", "MPS", "1"] in [line.split() for line in result.stderr.splitlines()]
    assert "torch._dynamo" not in result.stdout.split(), "it costs a second"
    assert not sdpa.is_installed(), "and without it nothing is"


def fails_with(error, monkeypatch, tiers=("simdgroup", "torch")):
    for name in tiers:
        replace_tier(monkeypatch, name, run=lambda p: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("error", [RuntimeError("broken"), NotImplementedError("no"), ValueError("bad"), KeyError("k")])
def test_a_failure_of_ours_falls_through_with_one_warning(as_mps, given, monkeypatch, error):
    given(torch=(2, 13), fast_min_seq=0)
    monkeypatch.setattr(patch.attention, "problem", lambda arguments: (_ for _ in ()).throw(error))
    with sdpa.installed(), pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: ") as warned:
        outs = [attend(Q) for _ in range(3)]
    assert len(warned) == 1
    assert "known to be wrong" not in str(warned[0].message)
    assert all(torch.equal(out, ORIGINAL(Q, Q, Q, is_causal=True)) for out in outs)
    assert sdpa.stats()["fell through"] == {type(error).__name__: 3}
    assert taken() == 0


def test_the_warning_points_at_the_caller(as_mps, monkeypatch):
    monkeypatch.setattr(patch.attention, "problem", lambda arguments: (_ for _ in ()).throw(KeyError()))
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
    with sdpa.installed(), pytest.warns(RuntimeWarning, match="does not compile"):
        assert torch.equal(attend(Q), ORIGINAL(Q, Q, Q, is_causal=True))
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
                    given = dataclasses.replace(patch.current(), torch=(2, 13 if name == "FAST_MIN_SEQ" else 12))
                    assert patch.examine(bind(q, q, q), given, as_if=True)[0].take is taken
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
            ORIGINAL(Q, Q, Q)
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


def test_install_from_many_threads():
    def work():
        for _ in range(100):
            with sdpa.installed():
                attend(Q[:1, :1, :4])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.scaled_dot_product_attention is ORIGINAL


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
    expected = pickle.loads(before)(x)
    with sdpa.installed():
        after = pickle.dumps(Attention().eval())
        assert pickle.loads(before).attend is ORIGINAL, "what took torch's function keeps it"
        assert torch.equal(pickle.loads(before)(x), expected)
        loaded = pickle.loads(after)
        assert loaded.attend is F.scaled_dot_product_attention
        with torch.no_grad():
            loaded(x)
        assert taken() == 1
        copy.deepcopy(loaded)
    assert pickle.loads(after).attend is ORIGINAL, "a pickle needs neither the patch nor this package"
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


class Graphs:
    def __init__(self, backend="eager"):
        self.code, self.backend = [], backend

    def __call__(self, module, inputs):
        self.code.append(module.code)
        if self.backend == "eager":
            return module
        return torch._dynamo.lookup_backend(self.backend)(module, inputs)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function, graphs, **how: torch.compile(function, backend=graphs, fullgraph=True, **how)
    torch._dynamo.reset()


def test_a_compiled_block_on_another_device_is_torchs(compiled):
    graphs = Graphs()
    function = compiled(attend, graphs)
    plain = function(Q)
    with sdpa.installed():
        assert torch.equal(function(Q), plain)
    assert all("torch._C._nn.scaled_dot_product_attention(" in code for code in graphs.code)
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_block_on_mps_has_one_operator(as_mps, compiled, backend, dynamic):
    graphs = Graphs(backend)
    function = compiled(lambda q: attend(q) * 2, graphs, dynamic=dynamic)
    with sdpa.installed(), torch.no_grad():
        for length in (33, 20, 9):
            q = Q[:, :, :length].contiguous()
            assert_right(function(q) / 2, [q, q, q], {"is_causal": True})
    assert taken() == 3
    assert graphs.code
    assert all("mtlflashattn.scaled_dot_product_attention" in code for code in graphs.code)


def test_a_compiled_block_that_needs_gradients_is_torchs(as_mps, given, compiled):
    given(budget=0)
    graphs = Graphs("aot_eager")
    q = Q.float().requires_grad_()
    expected = torch.autograd.grad(attend(q).sum(), q)[0]
    with sdpa.installed():
        function = compiled(attend, graphs)
        assert torch.equal(torch.autograd.grad(function(q).sum(), q)[0], expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(attend, graphs)(Q.float()).dtype == torch.bfloat16
    assert taken() == 0


def test_an_operator_that_leaves_a_call_gives_torchs_numbers(as_mps, given, compiled):
    given(torch=(2, 13), fast_min_seq=NEVER_TAKEN)
    with sdpa.installed(), torch.no_grad():
        assert torch.equal(compiled(attend, Graphs())(Q), ORIGINAL(Q, Q, Q, is_causal=True))
    assert sdpa.stats()["left"] == {"short": 1}


NEVER_TAKEN = 1 << 30


def test_the_operator_is_well_behaved(as_mps):
    args = (Q, Q, Q, None, 0.0, True, None, False)
    torch.library.opcheck(torch.ops.mtlflashattn.scaled_dot_product_attention.default, args)
    gqa = (Q, Q[:, :2], Q[:, :2, :, :24], torch.rand(33, 33) > 0.5, 0.0, False, 0.3, True)
    torch.library.opcheck(torch.ops.mtlflashattn.scaled_dot_product_attention.default, gqa)


def test_exported_programs_do_not_need_this_package(as_mps):
    class Block(torch.nn.Module):
        def forward(self, q):
            return attend(q)

    for strict in (False, True):
        with sdpa.installed(), torch.no_grad():
            program = torch.export.export(Block(), (Q,), strict=strict)
        assert "aten.scaled_dot_product_attention" in program.graph_module.code


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


def test_holders_are_named():
    module = types.ModuleType("some_model")
    module.sdpa, module.other = ORIGINAL, attend
    sys.modules["some_model"] = module
    try:
        assert "some_model.sdpa" in sdpa.holders()
        with sdpa.installed():
            assert "some_model.sdpa" in sdpa.holders()
            module.sdpa = F.scaled_dot_product_attention
            assert not [name for name in sdpa.holders() if name.startswith("some_model")]
    finally:
        del sys.modules["some_model"]
