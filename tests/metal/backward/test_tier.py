"""The tier's choices in the backward pass: which variant, how many threadgroups, what happens without a kernel."""

import warnings

import pytest
import torch

from flash_attn_mps import dispatch
from flash_attn_mps.describe import CallOptions, dense
from flash_attn_mps.frontends.fa2 import flash_attn_func
from flash_attn_mps.tiers.metal import backward, compiler, gpu, simdgroup, variants
from flash_attn_mps.tiers.metal.backward_kernels import KEYS, QUERIES
from metal_host import compile_shader, observe


def leaves(heads=(2, 2), length=40, dim=16, dtype=torch.float32):
    return [torch.randn(1, length, h, dim, dtype=dtype, requires_grad=True) for h in (heads[0], heads[1], heads[1])]


def test_defaults_fit_and_can_be_forced():
    for kernel in (QUERIES, KEYS):
        for element_bytes in (2, 4):
            for dims in [(d, d) for d in range(1, 257, 15)] + [(192, 128), (8, 256)]:
                assert kernel.default(element_bytes, *dims) in kernel.fitting(element_bytes, *dims)


def test_names_of_variants_differ():
    for kernel in (QUERIES, KEYS):
        assert len({str(variant) for variant in kernel.variants}) == len(kernel.variants)


@pytest.mark.parametrize(
    ("kernel", "entry"), [(QUERIES, "attention_backward_queries"), (KEYS, "attention_backward_keys")]
)
def test_a_variable_forces_a_variant(kernel, entry, monkeypatch):
    wanted = "16x2x8-direct-threadgroup"
    monkeypatch.setenv(kernel.variable, wanted)
    compiled = []
    monkeypatch.setattr(compiler, "compile_shader", lambda source: compiled.append(source) or compile_shader(source))
    compiler.clear()
    variants.forget()
    try:
        flash_attn_func(*leaves()).sum().backward()
        (source,) = [source for source in compiled if f"kernel void {entry}" in source]
        assert "#define HELD 16\n" in source and "#define SIMDGROUPS 2\n" in source
        monkeypatch.setenv(kernel.variable, "7x7")
        variants.forget()
        with pytest.raises(NotImplementedError, match=f"{kernel.variable}=7x7 is no variant"):
            flash_attn_func(*leaves()).sum().backward()
    finally:
        variants.forget()


@pytest.mark.parametrize("entry", ["rows", "queries", "keys"])
def test_a_kernel_that_does_not_compile_leaves_gradients_to_torch(entry, monkeypatch):
    """With one warning; the forward pass stays."""

    def refusing(source):
        if f"kernel void attention_backward_{entry}(" in source:
            raise SyntaxError("no such type")
        return compile_shader(source)

    q, k, v = leaves()
    expected = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    monkeypatch.setattr(compiler, "compile_shader", refusing)
    compiler.clear()
    with warnings.catch_warnings(record=True) as caught, observe(instrumented=False) as launches:
        warnings.simplefilter("always")
        for _ in range(2):
            got = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    compiler.clear()
    assert [launch.kernel for launch in launches].count("attention_forward") == 2
    (warning,) = caught
    assert f"attention_backward_{entry} did not compile" in str(warning.message)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_few_keys_get_a_threadgroup_for_each_query_head(monkeypatch):
    """Where KV heads alone would leave cores idle; elsewhere a KV head's gradients are summed in registers."""
    q, k, v = leaves((4, 2), length=64)
    groups = {}
    for cores in (1, 1000):
        monkeypatch.setattr(gpu, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(backward, "_SIMDGROUPS_PER_CORE", 1)
        with observe(instrumented=False) as launches:
            groups[cores] = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (k, v))
        assert [launch.kernel for launch in launches][-1] == "attention_backward_keys"
    for one, other in zip(groups[1], groups[1000], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", ["q", "kv", "v"])
def test_only_what_is_needed_is_computed(wanted):
    tensors = dict(zip("qkv", (t.detach() for t in leaves()), strict=True))
    for name in wanted:
        tensors[name].requires_grad_()
    with observe(instrumented=False) as launches:
        flash_attn_func(**tensors).sum().backward()
    kernels = [launch.kernel.removeprefix("attention_") for launch in launches]
    assert ("backward_queries" in kernels) == ("q" in wanted)
    assert ("backward_keys" in kernels) == bool(set(wanted) & set("kv"))


def test_a_gradient_that_is_expanded_or_strided_is_read_as_it_is():
    """That of sum() has strides of 0."""
    q, k, v = leaves()
    out = flash_attn_func(q, k, v)
    one = torch.autograd.grad(out, (q, k, v), torch.ones(()).expand(out.shape), retain_graph=True)
    other = torch.autograd.grad(out, (q, k, v), torch.ones(out.shape))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_the_tier_names_what_it_leaves_to_others():
    q, k, v = (t.detach() for t in leaves())
    p = dense(q, k, v, CallOptions(want_lse=True))
    needed = frozenset("qkv")
    assert simdgroup.TIER.unsupported_backward_reasons(p, True, needed) == []
    p.attention_chunk, p._features = 8, None
    assert simdgroup.TIER.unsupported_backward_reasons(p, False, needed) == ["does not support attention_chunk"]


def test_no_memory_but_for_gradients_and_16_bytes_a_query(monkeypatch):
    """Of what is allocated in the backward pass, by shape."""
    q, k, v = (t.detach() for t in leaves(length=300))
    result = dispatch.attention(dense(q, k, v, CallOptions(want_lse=True)))
    p = dense(q, k, v, CallOptions(want_lse=True))
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: made.append(new_empty(*a, **kw)) or made[-1])
    backward.run(p, result.out, result.lse, torch.ones_like(result.out), None, frozenset("qkv"))
    assert sorted(t.numel() for t in made) == sorted([q.numel(), k.numel(), v.numel(), 4 * 2 * 300])
