"""Compiled, exported and fake: one operator where this package may serve, torch's own where it may not."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import CompileContext, CompileId, compile_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_mps import sdpa
from flash_attn_mps.sdpa import serve
from tests.sdpa.exact import assert_right

Q = torch.randn(2, 4, 33, 64).half()
OURS = "mtlflashattn.scaled_dot_product_attention"
NEVER_TAKEN = 1 << 30


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def taken():
    return sum(sdpa.stats()["taken"].values())


@pytest.fixture
def compiled():
    """compiled(function, aot=True, ...): `function` compiled without a break, anew, its graphs' code in `.graphs`."""

    def compiled(function, aot=True, **how):
        graphs = []

        def backend(module, inputs):
            graphs.append(module.code)
            return module

        torch._dynamo.reset()
        result = torch.compile(
            function, backend=aot_autograd(fw_compiler=backend) if aot else backend, fullgraph=True, **how
        )
        result.graphs = graphs
        return result

    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("aot", [False, True])
def test_another_device_is_torchs(compiled, aot):
    plain = compiled(attend, aot)
    expected = plain(Q)
    with sdpa.installed():
        function = compiled(attend, aot)
        assert torch.equal(function(Q), expected)
    assert function.graphs == plain.graphs
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}


def test_what_dynamo_captures_is_torchs_function_and_served_when_it_runs(as_mps, given, compiled):
    given(budget=0)
    q = Q.float().requires_grad_()
    with sdpa.installed():
        expected = torch.autograd.grad(attend(q).sum(), q)[0]
        function = compiled(attend, aot=False)
        assert torch.equal(torch.autograd.grad(function(q).sum(), q)[0], expected)
    (graph,) = function.graphs
    assert "torch._C._nn.scaled_dot_product_attention(" in graph
    assert taken() == 2


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dynamic", [False, True])
def test_without_gradients_there_is_one_operator(as_mps, compiled, dynamic, mode):
    function = compiled(lambda q: attend(q) * 2, dynamic=dynamic)
    with sdpa.installed(), mode():
        for length in (33, 20, 9):
            q = Q[:, :, :length].contiguous()
            assert_right(function(q) / 2, [q, q, q], {"is_causal": True})
    assert taken() == 3
    assert function.graphs
    assert all(graph.count(OURS) == 1 and "aten._scaled_dot_product" not in graph for graph in function.graphs)


def test_the_operator_gets_what_autocast_makes_of_the_arguments(as_mps, compiled):
    function = compiled(attend)
    with sdpa.installed(), torch.autocast("cpu", torch.bfloat16):
        out = function(Q.float())
    q = Q.bfloat16()
    assert_right(out, [q, q, q], {"is_causal": True})
    assert taken() == 1
    assert OURS in function.graphs[0]


def test_with_gradients_a_graph_is_torchs(as_mps, given, compiled):
    given(budget=0)
    q = Q.float().requires_grad_()
    expected = torch.autograd.grad(attend(q).sum(), q)[0]
    with sdpa.installed():
        function = compiled(attend)
        assert torch.equal(torch.autograd.grad(function(q).sum(), q)[0], expected)
    assert OURS not in function.graphs[0]
    assert taken() == 0


def test_with_an_explicit_choice_of_backends_a_graph_is_torchs(as_mps, compiled):
    def chosen(q):
        with sdpa_kernel(SDPBackend.MATH):
            return attend(q)

    with sdpa.installed():
        function = compiled(chosen)
        function(Q)
    assert OURS not in function.graphs[0]
    assert taken() == 0


def test_an_operator_that_leaves_a_call_gives_torchs_numbers(as_mps, given, compiled):
    given(torch=(2, 13), fast_min_seq=NEVER_TAKEN)
    function, expected = compiled(attend), attend(Q)
    with sdpa.installed():
        assert torch.equal(function(Q), expected)
    assert OURS in function.graphs[0]
    assert sdpa.stats()["left"] == {"short": 1}


def test_the_plain_function(as_mps, given, compiled):
    def plain(q):
        return sdpa.scaled_dot_product_attention(q, q, q, is_causal=True)

    function = compiled(plain, aot=False)
    assert_right(function(Q), [Q, Q, Q], {"is_causal": True})
    assert OURS in function.graphs[0]
    assert taken() == 1
    for installed in (contextlib.nullcontext, sdpa.installed):
        function = compiled(plain)
        with installed():
            function(Q.float().requires_grad_()).sum().backward()
        assert OURS not in function.graphs[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(plain)(Q.float()).dtype == torch.bfloat16
    assert taken() == 1


def test_the_operator_is_well_behaved(as_mps):
    args = (Q, Q, Q, None, 0.0, True, None, False)
    torch.library.opcheck(torch.ops.mtlflashattn.scaled_dot_product_attention.default, args)
    gqa = (Q, Q[:, :2], Q[:, :2, :, :24], torch.rand(33, 33) > 0.5, 0.0, False, 0.3, True)
    torch.library.opcheck(torch.ops.mtlflashattn.scaled_dot_product_attention.default, gqa)


@pytest.fixture
def inductor(tmp_path, monkeypatch):
    """inductor(): a compiled block's result, and whether its graph came from the disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def inductor():
        torch._dynamo.reset()
        counters.clear()
        out = torch.compile(attend, fullgraph=True)(Q)
        return out, counters["aot_autograd"]["autograd_cache_hit"] == 1

    yield inductor
    torch._dynamo.reset()


def test_graphs_on_disk_are_told_apart(as_mps, inductor):
    """torch keeps them by what Dynamo saw: the same with this package and without, and a program may not have it."""
    for kept in (False, True):
        sdpa.reset()
        out, hit = inductor()
        assert (taken(), hit) == (0, kept)
        assert torch.equal(out, serve.torchs(Q, Q, Q, is_causal=True))
        with sdpa.installed():
            out, hit = inductor()
            assert (taken(), hit) == (1, kept)
            assert_right(out, [Q, Q, Q], {"is_causal": True})
            thread = threading.Thread(target=inductor)
            thread.start()
            thread.join()
            assert taken() == 2, "the setting is a thread's own"


class Block(torch.nn.Module):
    def forward(self, q):
        return (attend(q),)


def test_exported_programs_do_not_need_this_package(as_mps):
    for strict in (False, True):
        with sdpa.installed(), torch.no_grad():
            program = torch.export.export(Block(), (Q,), strict=strict)
            lowered = program.run_decompositions({})
            inference = program.run_decompositions()
            program.module()(Q)
        assert "aten.scaled_dot_product_attention" in program.graph_module.code
        for code in (program.graph_module.code, lowered.graph_module.code, inference.graph_module.code):
            assert "mtlflashattn" not in code
    assert taken() == 2, "once exported, it is served where it runs"


def test_fake_tensors_are_torchs(as_mps):
    tag = torch.compiler.config.cache_key_tag
    with sdpa.installed():
        with FakeTensorMode() as mode:
            out = attend(torch.empty(2, 4, 33, 64))
        q = mode.from_tensor(Q)
        assert attend(q).shape == out.shape == Q.shape
        assert torch.compiler.config.cache_key_tag == tag
    assert taken() == 0


def test_graphs_for_programs_without_python_are_torchs(as_mps):
    """AOTInductor makes them in two ways: without torch.compile, and with it as an export."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.code)
        return module

    with sdpa.installed():
        aot_function(attend, fw_compiler=keep)(Q)
        with compile_context(CompileContext(CompileId(frame_id=0, frame_compile_id=0))):
            graphs.append(aot_export_module(Block(), (Q,), trace_joint=False)[0].code)
    assert len(graphs) == 2
    assert all("aten._scaled_dot_product" in graph and OURS not in graph for graph in graphs)
