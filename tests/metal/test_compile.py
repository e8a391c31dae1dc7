"""torch.compile with kernels: the graph's operators reach them, in both passes."""

from collections import Counter

import torch

from flash_attn_mps import trace
from flash_attn_mps.frontends import fa2
from metal_host import observe
from tests.attention.test_varlen import cumulative
from tests.compiled import assert_one_graph, compiled


def block(q, k, v, cu, longest):
    dense = fa2.flash_attn_func(*(x.unsqueeze(0) for x in (q, k, v)), causal=True, softcap=3.0)
    packed = fa2.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    return dense[0] + packed


def arguments(n, requires_grad=False):
    tensors = [torch.randn(2 * n, heads, 16, requires_grad=requires_grad) for heads in (4, 2, 2)]
    return *tensors, cumulative([n + 1, n - 1]), n + 1


def test_a_graph_runs_kernels(monkeypatch):
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    fast, _ = compiled(block)
    with observe(instrumented=False) as launches:
        got = fast(*arguments(6))
    assert [launch.kernel for launch in launches] == ["attention_forward"] * 2
    assert [call.tier for call in trace.calls] == ["simdgroup"] * 2
    assert got.shape == (12, 4, 16)


def test_one_graph_for_all_lengths():
    assert_one_graph(block, arguments, tolerance=1e-4)


def test_kernels_compute_gradients_in_a_graph_and_outside():
    with observe(instrumented=False) as launches:
        assert_one_graph(block, lambda n: arguments(n, requires_grad=True), lengths=(5, 9), tolerance=1e-4)
    kernels = ["forward", "backward_rows", "backward_queries", "backward_keys"]
    # compiled and eager, two calls, two lengths
    assert Counter(launch.kernel for launch in launches) == {f"attention_{kernel}": 8 for kernel in kernels}
