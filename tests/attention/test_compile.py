"""torch.compile: a call is one operator of one graph, for all lengths; values, gradients and errors are those of eager.

`opcheck` is PyTorch's own test of an operator: its schema, its autograd formula, its fake results, strides included,
and that it survives AOTAutograd with dynamic shapes.
"""

import dataclasses

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_mps import dispatch, trace
from flash_attn_mps.describe import CallOptions, dense, varlen
from flash_attn_mps.frontends import fa2, fa2_private, fa3, fa3_private
from flash_attn_mps.graph import attention_op, schema
from flash_attn_mps.problem import with_mask, with_sinks
from tests.compiled import assert_one_graph, compiled, outcome

from . import oracle
from .test_varlen import cumulative

SLOPES = torch.tensor([0.5, 0.25, 0.7, 0.1])
COS = torch.linspace(0, 1, 800).view(100, 8)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def qkv(n):
    return leaf(2, n, 4, 16), leaf(2, n + 3, 2, 16), leaf(2, n + 3, 2, 24)


def packed(n):
    """The more sequences the longer they are, none as long as another; max_seqlen an int."""
    lengths_q, lengths_k = [n + i for i in range(n // 4 + 2)], [n + 2 * i for i in range(n // 4 + 2)]
    q, k, v = leaf(sum(lengths_q), 4, 16), leaf(sum(lengths_k), 2, 16), leaf(sum(lengths_k), 2, 24)
    return q, k, v, cumulative(lengths_q), cumulative(lengths_k), max(lengths_q), max(lengths_k)


def with_tensors(n):
    *tensors, max_seqlen_q_tensor, max_seqlen_k_tensor = packed(n)
    return *tensors, torch.tensor(max_seqlen_q_tensor), torch.tensor(max_seqlen_k_tensor)


def paged(n):
    table = torch.arange(3 * n, dtype=torch.int32).view(3, n).flip(0).contiguous()
    pages = leaf(3 * n, 16, 2, 16)
    return leaf(6, 4, 16), pages, cumulative([1, 2, 3]), cumulative([16 * n, 5, n]), table, 16 * n


def cache(n):
    lengths = torch.tensor([3, n, 0], dtype=torch.int32)
    k_cache, v_cache = torch.randn(3, n + 40, 2, 16), torch.randn(3, n + 40, 2, 16)
    return torch.randn(3, 2, 4, 16), k_cache, v_cache, torch.randn(3, 2, 2, 16), torch.randn(3, 2, 2, 16), lengths


def private(q, k, v, dout, dropout_p):
    """Forward and backward of the private functions, the gradients into buffers."""
    out, lse, _, rng_state = fa2_private._flash_attn_forward(q, k, v, dropout_p, 0.3, True, -1, -1, 0.0, None, False)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = fa2_private._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, dropout_p, 0.3, True, -1, -1, 0.0, None, False, rng_state
    )
    return out, lse, dq, dk, dv, delta


def private3(q, k, v, dout):
    out, lse, *_ = fa3_private._flash_attn_forward(q, k, v, causal=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    fa3_private._flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, is_causal=True)
    return out, lse, dq, dk, dv


def plain(n):
    return *(x.detach() for x in qkv(n)), torch.randn(2, n, 4, 24)


def masked(q, k, v, mask, sinks):
    p = with_sinks(with_mask(dense(q, k, v, CallOptions()), mask), sinks)
    return dispatch.attention(p).out


CALLS = {
    "dense": (lambda *x: fa2.flash_attn_func(*x) * 2, qkv),
    "causal": (lambda *x: fa2.flash_attn_func(*x, causal=True), qkv),
    "features": (
        lambda *x: fa2.flash_attn_func(*x, window_size=(7, 1), softcap=5.0, alibi_slopes=SLOPES, softmax_scale=0.3),
        qkv,
    ),
    "lse": (lambda *x: fa2.flash_attn_func(*x, causal=True, return_attn_probs=True), qkv),
    "dropout": (lambda *x: fa2.flash_attn_func(*x, dropout_p=0.4, return_attn_probs=True), qkv),
    "scale in a tensor": (
        lambda *x: fa2.flash_attn_func(*x[:3], softmax_scale=x[3]),
        lambda n: (*qkv(n), 1 / COS[n, 0]),
    ),
    "batch and heads vary": (fa2.flash_attn_qkvpacked_func, lambda n: (leaf(n, n + 1, 3, n // 2, 8),)),
    "kvpacked": (fa2.flash_attn_kvpacked_func, lambda n: (leaf(2, 6, 4, 8), leaf(2, n, 2, 2, 8))),
    "varlen": (lambda *x: fa2.flash_attn_varlen_func(*x, causal=True), packed),
    "varlen, features": (
        lambda *x: fa2.flash_attn_varlen_func(*x, 0.2, None, True, (4, 0), 3.0, SLOPES, return_attn_probs=True)[:2],
        packed,
    ),
    "varlen, longest in tensors": (
        lambda *x: fa2.flash_attn_varlen_func(*x, 0.2, return_attn_probs=True),
        with_tensors,
    ),
    "varlen qkvpacked": (
        lambda x, cu, n: fa2.flash_attn_varlen_qkvpacked_func(x, cu, n, causal=True),
        lambda n: (leaf(3 * n, 3, 2, 8), cumulative([n, 2 * n - 1, 1]), 2 * n),
    ),
    "varlen, pages": (
        lambda q, k, cu_q, cu_k, table, n: fa2.flash_attn_varlen_func(
            q, k, k, cu_q, cu_k, 3, n, causal=True, block_table=table
        ),
        paged,
    ),
    "FA3": (
        lambda *x: fa3.flash_attn_func(*x[:3], qv=x[3], causal=True, attention_chunk=7, return_attn_probs=True),
        lambda n: (*qkv(n), leaf(2, n, 4, 24)),
    ),
    "FA3 varlen": (
        lambda *x: fa3.flash_attn_varlen_func(*x[:7], seqused_k=x[3].diff() // 2, window_size=[3, 3]),
        packed,
    ),
    "mask and sinks": (masked, lambda n: (*qkv(n), torch.rand(n, n + 3) < 0.7, leaf(4))),
    "private": (lambda *x: private(*x, 0.0), plain),
    "private, dropout": (lambda *x: private(*x, 0.3), plain),
    "private FA3": (private3, plain),
    "cache": (
        lambda q, k, v, _1, _2, n: fa2.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, return_softmax_lse=True),
        cache,
    ),
    "cache, append": (
        lambda q, k, v, nk, nv, n: fa2.flash_attn_with_kvcache(q, k, v, nk, nv, cache_seqlens=n, causal=True),
        cache,
    ),
    "cache, append, elsewhere": (
        lambda q, k, v, nk, nv, n: fa2.flash_attn_with_kvcache(
            q,
            k,
            v,
            nk,
            nv,
            cache_seqlens=n,
            cache_batch_idx=(n > 0).cumsum(0, dtype=torch.int32),
            cache_leftpad=n // 2,
            softmax_scale=COS[1, 0],
            window_size=[5, 1],
            softcap=4.0,
            alibi_slopes=SLOPES,
            return_softmax_lse=True,
        ),
        cache,
    ),
    "cache, rotary, one length": (
        lambda q, k, v, nk, nv, n: fa2.flash_attn_with_kvcache(
            q, k, v, nk, nv, COS, COS, cache_seqlens=n, window_size=(9, 0), softmax_scale=0.2
        ),
        lambda n: (*cache(n)[:-1], n),
    ),
    "cache, append, pages elsewhere": (
        lambda q, pages, _2, nk, nv, n: fa2.flash_attn_with_kvcache(
            q,
            pages,
            pages.clone(),
            nk,
            nv,
            cache_seqlens=n,
            cache_batch_idx=(n > 0).cumsum(0, dtype=torch.int32),
            cache_leftpad=n // 2,
            block_table=torch.arange(9, dtype=torch.int32).view(3, 3),
            causal=True,
            return_softmax_lse=True,
        ),
        lambda n: (*cache(n)[:1], torch.randn(9, n + 40, 2, 16), *cache(n)[2:]),
    ),
    "cache, FA3, packed": (
        lambda q, k, v, nk, nv, n: fa3.flash_attn_with_kvcache(
            q.flatten(0, 1),
            k,
            v,
            nk.flatten(0, 1),
            nv.flatten(0, 1),
            rotary_cos=COS,
            rotary_sin=COS,
            cache_seqlens=n,
            cu_seqlens_q=cumulative([2, 2, 2]),
            cu_seqlens_k_new=cumulative([2, 2, 2]),
            max_seqlen_q=2,
            rotary_seqlens=n // 2,
        ),
        cache,
    ),
    "cache, FA3": (
        lambda q, k, v, nk, nv, n: fa3.flash_attn_with_kvcache(
            q, k, v, nk, nv, qv=q, cache_seqlens=n, causal=True, softcap=2.0, return_softmax_lse=True
        ),
        cache,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_for_all_lengths(name):
    assert_one_graph(*CALLS[name])


@pytest.mark.parametrize("name", ["features", "lse", "varlen, features", "cache, append"])
def test_without_aot(name):
    """The graph as Dynamo leaves it: the operators meet autograd as they are."""
    assert_one_graph(*CALLS[name], backend="eager")


@pytest.mark.parametrize("name", ["lse", "varlen"])
def test_everything_dynamic_from_the_start(name):
    # The first length is one with which no two sizes are the same: PyTorch takes such for one.
    assert_one_graph(*CALLS[name], lengths=(9, 5, 33), dynamic=True)


@pytest.mark.parametrize("causal", [False, True])
def test_against_the_oracle(causal):
    fast, _ = compiled(lambda *x: fa2.flash_attn_func(*x, causal=causal, softcap=4.0, window_size=(6, 2)))
    for n in (4, 7):
        tensors = qkv(n)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        out, reference = fast(*tensors), oracle.dense(*exact, causal=causal, softcap=4.0, window_size=(6, 2)).out
        torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)
        grads, wanted = torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(reference.sum(), exact)
        for mine, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_inductor():
    """Beside code that inductor makes: views before and after, another head count in each, and the gradients."""

    def block(x, weight):
        q, k, v = (x @ weight).unflatten(-1, (8, 8)).split([4, 2, 2], 2)
        return fa2.flash_attn_func(q, k, v, causal=True).flatten(2).relu()

    with torch._inductor.config.patch(compile_threads=1):  # else a pool of processes that import torch, for two kernels
        assert_one_graph(block, lambda n: (leaf(2, n, 16), leaf(16, 64)), "inductor", tolerance=1e-4)


class _Calls(TorchDispatchMode):
    """Which of this package's operators run, and with what."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == attention_op.NAMESPACE:
            self.seen.append((op, args))
        return op(*args, **(kwargs or {}))


def operators(function, arguments):
    """(what `function` gives, the operators of its graph and of the backward pass, with their arguments)."""
    calls = _Calls()

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "namespace", None) == attention_op.NAMESPACE:
                calls.seen.append((target, args))
            return super().call_function(target, args, kwargs)

    torch._dynamo.reset()
    backend = lambda graph, _: lambda *inputs: Recorder(graph).run(*inputs)  # noqa: E731
    result = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    out = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
    if out:
        with calls:
            sum(x.float().sum() for x in out).backward()
    return result, calls.seen


def test_eager_calls_do_without_operators():
    """Going through torch.library would cost more than the launch of a kernel."""
    with _Calls() as calls:
        for name in ("features", "varlen", "cache, append"):
            outcome(CALLS[name][0], CALLS[name][1](5))
    assert not calls.seen


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Every operator that a call runs, as it runs it: the forward pass with tensors that require gradients."""
    function, make = CALLS[name]
    _, calls = operators(function, make(6))
    expected = ["flash_attn_forward", "flash_attn_backward"]
    if "cache" in name:
        expected = ["flash_attn_with_kvcache" if name == "cache" else "flash_attn_with_kvcache_append"]
    assert [op.__name__ for op, _ in calls] == [f"{name}.default" for name in expected]
    for op, arguments in calls:
        if "backward" in op.__name__:  # which has no gradient
            arguments = [x.detach() if torch.is_tensor(x) else x for x in arguments]
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("shape", [(2, 1, 1, 16), (1, 5, 1, 8), (3, 1, 4, 8)])
def test_strides_along_single_rows_and_heads(shape):
    """A dimension of size 1 may have any stride; the fake results have that of a new tensor."""
    x = torch.randn(shape, requires_grad=True)
    _, calls = operators(lambda x: fa2.flash_attn_func(x, x, x, return_attn_probs=True)[:2], [x])
    assert len(calls) == 2
    for op, arguments in calls:
        for got in op(*arguments):
            assert got.stride() == torch.empty(got.shape).stride()


def test_dropout_is_drawn_in_each_run():
    """Two calls in a graph, and two runs of it, drop differently; the seed of torch makes a run come again."""
    q = torch.zeros(1, 64, 2, 8)

    def call(q):
        return [fa2.flash_attn_func(q, q, q, 0.5, return_attn_probs=True)[2] for _ in range(2)]

    fast, counter = compiled(call)
    torch.manual_seed(1)
    (a, b), (c, d) = fast(q), fast(q)
    torch.manual_seed(1)
    (again, _), (eager, _) = fast(q), call(q)
    assert counter.frame_count == 1
    assert torch.equal(a, again)
    assert torch.equal(c, eager)
    masks = [torch.signbit(x) for x in (a, b, c, d)]
    for i, one in enumerate(masks):
        assert 0.4 < one.float().mean() < 0.6
        assert all((one != other).float().mean() > 0.4 for other in masks[:i])


def test_the_tier_is_chosen_when_the_graph_runs(monkeypatch):
    """MTLFLASHATTN_KERNEL and MTLFLASHATTN_TRACE count for a run, not for the compilation."""
    q = torch.randn(1, 6, 2, 8)
    fast, counter = compiled(lambda q: fa2.flash_attn_func(q, q, q))
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    fast(q)
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    fast(q)
    assert [call.tier for call in trace.calls] == ["cpu", "torch"]
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    with pytest.raises(NotImplementedError, match="simdgroup: tensors are on cpu"):
        fast(q)
    assert counter.frame_count == 1


def test_malformed_calls_name_the_argument():
    """What shapes tell is said when the graph is made, what values tell when it runs."""
    q = torch.randn(2, 6, 4, 16)
    function = fa2.flash_attn_func
    with pytest.raises(torch._dynamo.exc.Unsupported, match="k: got head_dim 8; accepted: 16, the head_dim of q"):
        compiled(function)[0](q, q[..., :8], q)
    with pytest.raises(ValueError, match="k: got head_dim 8; accepted: 16, the head_dim of q"):
        torch.compile(function, backend="aot_eager")(q, q[..., :8], q)
    rows = q.flatten(0, 1)
    fast, _ = compiled(lambda x, cu: fa2.flash_attn_varlen_func(x, x, x, cu, cu, 8, 8))
    fast(rows, cumulative([5, 7]))
    with pytest.raises(ValueError, match=r"cu_seqlens_q: got .*never decrease"):
        fast(rows, torch.tensor([0, 13, 12], dtype=torch.int32))
    with pytest.raises(ValueError, match="max_seqlen_q: got 8"):
        fast(rows, cumulative([9, 3]))


def test_no_second_derivative():
    fast, _ = compiled(fa2.flash_attn_func, "eager")
    tensors = qkv(5)
    (dq,) = torch.autograd.grad(fast(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_cache_has_no_gradient(backend):
    """A model in evaluation whose parameters require gradients runs; whoever asks for gradients hears of it."""
    function, make = CALLS["cache"]
    q, *others = make(5)
    q.requires_grad_()
    out, _ = compiled(function, backend)[0](q, *others)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache has no backward pass"):
        out.sum().backward()


def test_a_field_that_no_operator_can_take_is_an_error():
    """An argument is never left out of a graph in silence."""

    @dataclasses.dataclass
    class Call:
        q: "torch.Tensor"
        temperature: "complex"

    assert schema.schema_of(schema.fields_of(Call, "temperature")) == "Tensor q"
    with pytest.raises(TypeError, match=r"Call.temperature: .* complex"):
        schema.fields_of(Call)


def test_a_cache_that_is_only_read_is_not_copied():
    """An operator that writes has functional graphs copy what it writes: the one for reading must not."""
    function, make = CALLS["cache"]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    fast = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        fast(*make(5))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "getitem" not in name] == ["mtlflashattn.flash_attn_with_kvcache.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in qkv(6)]

    def call(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fa2.flash_attn_func(*x, causal=True)

    for mine, wanted in zip(outcome(compiled(call)[0], tensors), outcome(call, tensors), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, wanted)


def test_checkpointing_inside_the_graph():
    """The recomputed forward pass drops what the first one dropped."""

    def layer(q, k, v):
        return fa2.flash_attn_func(q.sin(), k, v, dropout_p=0.3).cos()

    def call(*x):
        return torch.utils.checkpoint.checkpoint(layer, *x, use_reentrant=False)

    assert_one_graph(call, qkv)
    tensors = qkv(6)
    for mine, wanted in zip(outcome(compiled(call)[0], tensors), outcome(layer, tensors), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """An exported program is one operator, for all lengths; meta tensors pass through it too."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu, longest):
            return fa2.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

    def make(n):
        return *(torch.randn(3 * n, h, 16) for h in (4, 2, 2)), cumulative([n, n + 1, n - 1]), n + 1

    rows = torch.export.Dim("rows", min=3, max=4096)
    shapes = ({0: rows}, {0: rows}, {0: rows}, None, torch.export.Dim.DYNAMIC)
    program = torch.export.export(Model(), make(5), dynamic_shapes=shapes, strict=strict)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]
    assert "mtlflashattn.flash_attn_forward.default" in [str(node.target) for node in calls]
    for n in (8, 21):
        tensors = make(n)
        torch.testing.assert_close(program.module()(*tensors), Model()(*tensors))


def test_operators_of_meta_tensors():
    p = varlen(*(x.detach().to("meta") if torch.is_tensor(x) else x for x in packed(5)), CallOptions(want_lse=True))
    out, lse, probs = torch.ops.mtlflashattn.flash_attn_forward(*attention_op.flat(p))
    assert (out.shape, lse.shape, probs.shape) == (p.out_shape, p.lse_shape, (0,))
    assert out.is_meta


def test_graphs_without_dynamo():
    """make_fx, as AOTAutograd, records the operator, of real tensors too; each run of dropout draws its own mask."""
    q = torch.randn(1, 30, 2, 8)

    def call(q):
        return fa2.flash_attn_func(q, q, q, dropout_p=0.5)

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(call, tracing_mode=mode)(q)
        assert "mtlflashattn.flash_attn_forward" in graph.code
        torch.manual_seed(5)
        one, other = graph(q), graph(q)
        assert not torch.equal(one, other)
        torch.manual_seed(5)
        assert torch.equal(call(q), one)
