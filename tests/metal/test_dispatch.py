"""Which tier serves a call, what happens where a kernel does not compile, and what is compiled at all."""

import itertools
import re
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from flash_attn_mps import dispatch, tiers, trace
from flash_attn_mps.frontends import fa3
from flash_attn_mps.frontends.fa2 import flash_attn_func, flash_attn_varlen_func
from flash_attn_mps.tiers.metal import compiler, simdgroup, variants
from flash_attn_mps.tiers.metal.simdgroup import Variant
from flash_attn_mps.tiers.metal.specialization import Specialization
from metal_host import compile_shader, observe
from tests.attention import oracle
from tests.attention.layouts import laid_out, randn
from tests.attention.rule import assert_within_rule
from tests.attention.test_varlen import cumulative
from tests.replaced_tiers import leave_out


@pytest.fixture(autouse=True)
def _forgetful():
    """Kernels and warnings of other tests are forgotten, and so are those of these tests."""
    compiler.clear()
    tiers._unknown.clear()
    yield
    compiler.clear()
    tiers._unknown.clear()


@pytest.fixture
def qkv():
    return [torch.randn(1, 20, 2, 16) for _ in range(3)]


def served_by(monkeypatch, *qkv, **how):
    """(the tier that serves flash_attn_func, its launches)."""
    monkeypatch.setattr(trace, "enabled", True)
    monkeypatch.setattr(trace, "calls", trace.Counter())
    with observe(instrumented=False) as launches:
        out = flash_attn_func(*qkv, **how)
    exact, plain = oracle.dense(*(x.double() for x in qkv), **how).out, oracle.dense(*qkv, **how).out
    assert_within_rule("out", out, plain, exact)
    (call,) = trace.calls
    return call.tier, [launch.kernel for launch in launches]


@pytest.mark.parametrize(
    ("force", "tier", "kernels"),
    [
        (None, "simdgroup", ["attention_forward"]),
        ("auto", "simdgroup", ["attention_forward"]),
        ("simdgroup", "simdgroup", ["attention_forward"]),
        ("SIMDGROUP", "simdgroup", ["attention_forward"]),
        ("scalar", "scalar", ["attention_scalar"]),
        ("torch", "torch", []),
    ],
)
def test_the_variable_forces_a_tier(force, tier, kernels, qkv, monkeypatch):
    if force is None:
        monkeypatch.delenv("MTLFLASHATTN_KERNEL", raising=False)
    else:
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", force)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(monkeypatch, *qkv, causal=True) == (tier, kernels)


@pytest.mark.parametrize("force", ["simdgroup", "scalar"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_chunk": 4}, "does not support attention_chunk"),
        ({"head_dim": 264}, "head_dim above 256"),
        ({"seqlen_k": 0}, "there are no scores"),
    ],
    ids=str,
)
def test_a_force_that_cannot_serve_says_why(force, change, reason, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", force)
    q = torch.randn(1, 9, 2, change.get("head_dim", 16))
    k = torch.randn(1, change.get("seqlen_k", 9), 2, change.get("head_dim", 16))
    with pytest.raises(NotImplementedError, match=f"{force}: .*{reason}"):
        fa3.flash_attn_func(q, k, k, attention_chunk=change.get("attention_chunk", 0))


GRADIENTS = ["attention_backward_rows", "attention_backward_queries", "attention_backward_keys"]


@pytest.mark.parametrize("force", ["simdgroup", "scalar"])
def test_a_forced_kernel_leaves_gradients_to_who_has_them(force, qkv, monkeypatch):
    """Only the forward pass is forced: a kernel without a backward pass leaves gradients to the tier that has one."""
    q, k, v = (x.requires_grad_() for x in qkv)
    expected = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).square().sum(), (q, k, v))
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", force)
    with observe(instrumented=False) as launches:
        got = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).square().sum(), (q, k, v))
    forward = {"simdgroup": "attention_forward", "scalar": "attention_scalar"}[force]
    assert [launch.kernel for launch in launches] == [forward, *GRADIENTS]
    for grad, other in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_a_force_is_an_error_on_other_devices(monkeypatch, qkv):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    monkeypatch.setattr(compiler, "device_types", frozenset({"mps"}))
    with pytest.raises(NotImplementedError, match="simdgroup: tensors are on cpu"):
        flash_attn_func(*qkv)


def test_an_unknown_value_warns_once_and_counts_as_auto(qkv, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "fastest")
    known = "decode, tensorops, simdgroup, cpu, torch, scalar, auto"
    with pytest.warns(UserWarning, match=f"MTLFLASHATTN_KERNEL=fastest is not known.*{known}") as caught:
        served = [served_by(monkeypatch, *qkv)[0] for _ in range(3)]
    assert served == ["simdgroup"] * 3
    assert len(caught) == 1


def refused_when_compiled(_source):
    raise SyntaxError("Failed to create metal library, error: program_source:1:1: error: no member named 'simd_any'")


def refused_as_pipeline(_source):
    """A library whose functions make no pipeline: torch raises RuntimeError when one is looked up."""
    library = mock.MagicMock()
    type(library).attention_forward = mock.PropertyMock(
        side_effect=RuntimeError("Failed to create pipeline state object, error: too much threadgroup memory")
    )
    return library


def other_variants(q):
    """Those that are tried where the default is refused."""
    p = dispatch.AttentionProblem(q, q, q, q.shape[0], q.shape[1], q.shape[1], 0.25)
    return list(variants.instead(p, simdgroup.FORWARD, simdgroup.default(q.itemsize, q.shape[-1], q.shape[-1])))


@pytest.mark.parametrize("refuse", [refused_when_compiled, refused_as_pipeline])
def test_a_kernel_that_does_not_compile_is_replaced(refuse, qkv, monkeypatch):
    """Right results by another tier, one warning that says what to report, and no second attempt."""
    compile_ = mock.Mock(side_effect=refuse)
    monkeypatch.setattr(compiler, "compile_shader", compile_)
    leave_out(monkeypatch, "cpu")
    with pytest.warns(RuntimeWarning, match="attention_forward did not compile") as caught:
        served = [served_by(monkeypatch, *qkv, causal=True) for _ in range(3)]
        longer = [torch.randn(1, 50, 2, 16) for _ in range(3)]
        served.append(served_by(monkeypatch, *longer, causal=True))
    assert served == [("torch", [])] * 4
    attempts = compile_.call_count
    assert attempts == 1 + len(other_variants(qkv[0]))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "report" in text
    assert "Failed to create" in text
    with warnings.catch_warnings():  # another specialization is tried too, and fails in silence
        warnings.simplefilter("error")
        assert served_by(monkeypatch, *qkv) == ("torch", [])
    assert compile_.call_count == 2 * attempts


def test_each_kernel_that_does_not_compile_gives_a_warning(qkv, monkeypatch):
    monkeypatch.setattr(compiler, "compile_shader", refused_when_compiled)
    for tier, entry in (("simdgroup", "attention_forward"), ("scalar", "attention_scalar")):
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", tier)
        with (
            pytest.warns(RuntimeWarning, match=f"{entry} did not compile"),
            pytest.raises(NotImplementedError, match=f"{tier}: its kernel does not work"),
        ):
            flash_attn_func(*qkv)


def test_a_forced_kernel_that_does_not_compile_is_an_error(qkv, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    monkeypatch.setattr(compiler, "compile_shader", refused_when_compiled)
    with (
        pytest.warns(RuntimeWarning, match="did not compile"),
        pytest.raises(NotImplementedError, match="simdgroup: its kernel does not work"),
    ):
        flash_attn_func(*qkv)


def test_errors_that_are_no_compiler_s_are_not_swallowed(qkv, monkeypatch):
    monkeypatch.setattr(compiler, "compile_shader", mock.Mock(side_effect=KeyError("a mistake of ours")))
    with pytest.raises(KeyError, match="a mistake of ours"):
        flash_attn_func(*qkv)


@pytest.fixture
def compilations(monkeypatch):
    """The sources that are compiled during a test. They are not run."""
    sources = []

    def compile_(source):
        sources.append(source)
        return SimpleNamespace(attention_forward=lambda *_, **__: None)

    monkeypatch.setattr(compiler, "compile_shader", compile_)
    return sources


def test_lengths_strides_and_scales_compile_nothing_new(compilations):
    for length in range(1, 200, 7):
        for heads, batch in ((2, 1), (4, 3)):
            for layout in ("contiguous", "transposed", "packed", "expanded"):
                q = randn(batch, length, heads, 64, dtype=torch.float16, layout=layout)
                k = randn(batch, 2 * length, 2, 64, dtype=torch.float16, layout=layout)
                flash_attn_func(q, k, k, softmax_scale=1 / length)
    assert len(compilations) == 1


def test_batches_and_lengths_of_packed_calls_compile_nothing_new(compilations):
    for sequences in (1, 2, 50):
        for length in (1, 9, 64):
            cu = cumulative([length] * sequences)
            q = randn(sequences * length, 2, 64, dtype=torch.float16)
            flash_attn_varlen_func(q, q, q, cu, cu, length, length)
    assert len(compilations) == 1


def test_masks_compile_one_kernel_for_each_side_that_is_closed(compilations):
    """Four kernels, whatever widths; and one for the lengths at which a side hides something and those at which not."""
    for sides, windows in enumerate(itertools.product(((-1,), (0, 3, 60, 2**31 - 1)), repeat=2)):
        for left, right in itertools.product(*windows):
            for length in (1, 2, 5, 30, 100):
                q = randn(1, length, 2, 64, dtype=torch.float16)
                flash_attn_func(q, q, q, window_size=(left, right))
        assert len(compilations) == sides + 1


def test_each_dtype_has_its_own_variant_whichever_came_first(compilations):
    """Of rows of 128 elements, a kernel takes twice as many keys together in float32 as in float16 by default."""
    for first, then in itertools.permutations((torch.float16, torch.float32)):
        variants.forget()
        compiler.clear()
        for dtype in (first, then):
            q = randn(1, 20, 2, 128, dtype=dtype)
            flash_attn_func(q, q, q)
        keys = [int(re.search(r"#define KEYS (\d+)", source)[1]) for source in compilations[-2:]]
        assert dict(zip((first, then), keys, strict=True)) == {torch.float16: 16, torch.float32: 32}


def test_alignment_is_what_strides_may_change(compilations):
    """Rows aligned to 2, 4, 8 or 16 bytes and better."""
    storage = torch.zeros(1 << 16, dtype=torch.float16)
    for offset in range(32):
        q = storage[offset:].as_strided((1, 20, 2, 64), (2560, 128, 64, 1))
        flash_attn_func(q, q, q)
    assert len(compilations) == 4


def test_kernels_that_are_kept_are_limited(compilations):
    limit = compiler.kernel.cache_info().maxsize
    assert limit is not None
    assert 32 <= limit <= 1024
    nothing = dict.fromkeys(Specialization._fields, False)
    given = {"kernel": simdgroup.FORWARD, "dtype": "half", "variant": Variant(8, 2, 8, False), "buffers": ()}
    kind = Specialization(**{**nothing, **given, "kv_format": "", "mask": None, "scale_type": "float"})
    for head_dim in range(limit + 20):
        compiler.kernel(kind._replace(head_dim=head_dim))
    assert compiler.kernel.cache_info().currsize == limit


def test_explain_gives_the_reasons_of_each_tier(qkv):
    p = dispatch.AttentionProblem(*qkv, 1, 20, 20, 0.25, dropout_p=0.5, want_probs=True)
    reasons = dispatch.explain(p)
    assert list(reasons) == ["decode", "tensorops", "simdgroup", "cpu", "torch"]
    assert reasons["simdgroup"] == ["does not support probabilities"]
    assert reasons["torch"] == []


def test_results_do_not_depend_on_the_tier(monkeypatch):
    """The same call by every tier, and strided: the tiers differ by rounding only."""
    qkv = [laid_out(torch.randn(2, 33, 4, 24), "strided_last") for _ in range(3)]
    results = []
    for force in ("simdgroup", "scalar", "torch"):
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", force)
        results.append(flash_attn_func(*qkv, causal=True, softcap=2.0, return_attn_probs=True))
    for out, lse, _ in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-5)


def test_the_runner_is_in_place():
    assert compiler.compile_shader is compile_shader
