"""`ops.rms_norm`, `ops.layer_norm` and `ops.triton.layer_norm` against the definition in fp64."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from flash_attn.ops import layer_norm as fused
from flash_attn.ops import rms_norm as fused_rms
from flash_attn.ops.triton import layer_norm as triton

from .reference import TOLERANCE, assert_close, assert_rounded_once

EPS = 1e-5
HIDDEN = 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOOLS = [False, True]
RMS = pytest.mark.parametrize("rms", BOOLS, ids=["layer norm", "rms norm"])


def norm(x, weight, bias, rms, eps=EPS):
    """The definition."""
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (1 + 0.3 * torch.randn(HIDDEN, generator=generator)).to(dtype)
    return weight.requires_grad_(), torch.randn(HIDDEN, generator=generator).to(dtype).requires_grad_()


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def check(call, expected, inputs, tolerance_dtype=None):
    """Values and gradients of `call(*inputs)` equal those of `expected(*fp64 inputs)`; an input may be None."""
    double = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    got, want = call(*inputs), expected(*double)
    got, want = (o if isinstance(o, tuple) else (o,) for o in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_rounded_once(g, w, noise=2e-5)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in got]
    pairs = [(t, d) for t, d in zip(inputs, double, strict=True) if t is not None]
    got_grads = torch.autograd.grad([g.double() for g in got], [t for t, _ in pairs], weights)
    want_grads = torch.autograd.grad(want, [d for _, d in pairs], weights)
    for (t, _), g, w in zip(pairs, got_grads, want_grads, strict=True):
        assert g.dtype == t.dtype
        # Gradients pass through the tensors that are returned in the lower dtype, and are sums over the rows.
        tolerance = 30 * TOLERANCE[tolerance_dtype or min((o.dtype for o in got), key=lambda d: torch.finfo(d).bits)]
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * w.abs().max().item())


@RMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_plain_norms(rms, dtype, weight_dtype):
    weight, bias = parameters(weight_dtype or dtype)
    x = leaf(2, 5, HIDDEN, dtype=dtype)
    if rms:
        call = lambda x, w: fused_rms.rms_norm(x, w, EPS)  # noqa: E731
        check(call, lambda x, w: norm(x, w, None, True), [x, weight], dtype)
    else:
        call = lambda x, w, b: fused.layer_norm(x, w, b, EPS)  # noqa: E731
        check(call, lambda x, w, b: norm(x, w, b, False), [x, weight, bias], dtype)
    assert call(*([x, weight] if rms else [x, weight, bias])).dtype == dtype


@RMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, "same"])
@pytest.mark.parametrize(("scales", "in_fp32"), [*itertools.product(BOOLS, BOOLS)])
def test_dropout_add_norm(rms, dtype, residual_dtype, scales, in_fp32):
    add_norm = fused_rms.dropout_add_rms_norm if rms else fused.dropout_add_layer_norm
    weight, bias = parameters(dtype)
    x = leaf(2, 5, HIDDEN, dtype=dtype)
    residual_dtype = dtype if residual_dtype == "same" else residual_dtype
    residual = None if residual_dtype is None else leaf(2, 5, HIDDEN, dtype=residual_dtype)
    rowscale = torch.rand(2, 5).to(dtype) if scales else None
    colscale = leaf(HIDDEN, dtype=dtype) if scales else None

    def call(x, residual, weight, bias, colscale):
        return add_norm(x, residual, weight, bias, 0.0, EPS, rowscale, colscale, prenorm=True, residual_in_fp32=in_fp32)

    def expected(x, residual, weight, bias, colscale):
        total = x
        if scales:
            total = total * rowscale.double()[..., None] * colscale
        total = total if residual is None else total + residual
        return norm(total, weight, bias, rms), total

    inputs = [x, residual, weight, bias, colscale]
    check(call, expected, inputs, dtype)
    out, total = call(*inputs)
    assert out.dtype == dtype
    assert total.dtype == (residual_dtype or (torch.float32 if in_fp32 else dtype))
    post = add_norm(x, residual, weight, bias, 0.0, EPS, rowscale, colscale)
    assert torch.equal(post, out)


@RMS
def test_dropout_mask(rms):
    add_norm = fused_rms.dropout_add_rms_norm if rms else fused.dropout_add_layer_norm
    weight, bias = parameters(torch.float32)
    x, residual = leaf(50, 8, HIDDEN), leaf(50, 8, HIDDEN)
    options = {"prenorm": True, "return_dropout_mask": True}
    torch.manual_seed(3)
    out, total, mask = add_norm(x, residual, weight, bias, 0.3, EPS, **options)
    torch.manual_seed(3)
    again, *_ = add_norm(x, residual, weight, bias, 0.3, EPS, **options)
    assert torch.equal(out, again)
    assert mask.dtype == torch.uint8
    assert abs(mask.float().mean() - 0.7) < 0.02
    assert_close(total, x.double() * mask / 0.7 + residual.double())
    assert_close(out, norm(x.double() * mask / 0.7 + residual.double(), weight.double(), bias.double(), rms), scale=4)
    (grad,) = torch.autograd.grad(total.sum(), x)
    assert_close(grad, mask / 0.7)
    out, mask = add_norm(x, residual, weight, bias, 0.0, EPS, return_dropout_mask=True)
    assert mask.dtype == torch.uint8
    assert mask.all()
    with pytest.raises(ValueError, match="dropout_p"):
        add_norm(x, residual, weight, bias, 1.0, EPS)


@RMS
def test_subset(rms):
    add_norm = fused_rms.dropout_add_rms_norm_subset if rms else fused.dropout_add_layer_norm_subset
    weight, bias = parameters(torch.float32)
    x, residual, colscale = leaf(3, HIDDEN), leaf(5, HIDDEN), leaf(HIDDEN)
    x0_subset = torch.tensor([1, 0, 3, 2, 0], dtype=torch.int32)
    out_subset = torch.tensor([0, 2, 1, 0, 4], dtype=torch.int32)

    def call(x, residual, weight, bias, colscale):
        return add_norm(x, residual, weight, bias, 0.0, EPS, colscale, x0_subset, out_subset, 1.25, 4, prenorm=True)

    def expected(x, residual, weight, bias, colscale):
        rows = [residual[i] + (1.25 * colscale * x[s - 1] if s else 0) for i, s in enumerate(x0_subset.tolist())]
        total = torch.stack(rows)
        normed = norm(total, weight, bias, rms)
        out = torch.stack([normed[2], normed[1], torch.zeros_like(normed[0]), normed[4]])
        return out, total

    check(call, expected, [x, residual, weight, bias, colscale])
    whole = add_norm(x, residual[:3], weight, bias, 0.0, EPS)
    assert_close(whole, norm((x + residual[:3]).double(), weight.double(), bias.double(), rms), scale=4)
    with pytest.raises(ValueError, match="out_subset must be given together"):
        add_norm(x, residual, weight, bias, 0.0, EPS, x0_subset=x0_subset)


@RMS
@pytest.mark.parametrize(("with_x1", "tied"), [*itertools.product(BOOLS, BOOLS)])
def test_parallel_residual(rms, with_x1, tied):
    module = fused_rms if rms else fused
    name = "dropout_add_rms_norm_parallel_residual" if rms else "dropout_add_layer_norm_parallel_residual"
    weight0, bias0 = parameters(torch.float32)
    weight1, bias1 = (None, None) if tied else parameters(torch.float32, seed=1)
    x0, residual = leaf(4, HIDDEN), leaf(4, HIDDEN)
    x1 = leaf(4, HIDDEN) if with_x1 else None

    def call(*args):
        out = getattr(module, name)(*args, 0.0, EPS, prenorm=True)
        assert (out[1] is None) == tied
        return tuple(o for o in out if o is not None)

    def expected(x0, x1, residual, weight0, bias0, weight1, bias1):
        total = x0 + residual + (0 if x1 is None else x1)
        first = norm(total, weight0, bias0, rms)
        return (first, total) if tied else (first, norm(total, weight1, bias1, rms), total)

    check(call, expected, [x0, x1, residual, weight0, bias0, weight1, bias1])
    inputs = [x0, x1, residual, weight0, bias0, weight1, bias1]
    *_, total, mask0, mask1 = getattr(module, name)(*inputs, 0.5, EPS, prenorm=True, return_dropout_mask=True)
    kept = 2 * x0 * mask0 + residual + (2 * x1 * mask1 if with_x1 else 0)
    assert_close(total, kept)


@RMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", ["x1", "rowscale", "none"])
@pytest.mark.parametrize(("with_residual", "second", "centered"), [*itertools.product(BOOLS, BOOLS, BOOLS)])
def test_triton_norm(rms, dtype, extra, with_residual, second, centered):
    weight, bias = parameters(torch.float32)
    weight1, bias1 = parameters(torch.float32, seed=1) if second else (None, None)
    x = leaf(2, 3, HIDDEN, dtype=dtype)
    residual = leaf(2, 3, HIDDEN, dtype=dtype) if with_residual else None
    x1 = leaf(2, 3, HIDDEN, dtype=dtype) if extra == "x1" else None
    rowscale = torch.rand(2, 3) if extra == "rowscale" else None
    options = {"eps": EPS, "rowscale": rowscale, "prenorm": True, "zero_centered_weight": centered}
    if not rms:
        options["is_rms_norm"] = False
    function = triton.rms_norm_fn if rms else triton.layer_norm_fn

    def call(*args):
        return function(*args, **options)

    def expected(x, weight, bias, residual, x1, weight1, bias1):
        total = x if rowscale is None else x * rowscale.double()[..., None]
        for term in (x1, residual):
            total = total if term is None else total + term
        outs = [norm(total, weight + centered, bias, rms)]
        if second:
            outs.append(norm(total, weight1 + centered, bias1, rms))
        return *outs, total

    inputs = [x, weight, bias, residual, x1, weight1, bias1]
    check(call, expected, inputs, dtype)
    # Upstream's own step by step form is presented too.
    form = triton.rms_norm_ref if rms else triton.layer_norm_ref
    options.pop("is_rms_norm", None)
    wants = expected(*[t if t is None else t.double() for t in inputs])
    for got, want in zip(form(*inputs, upcast=True, **options), wants, strict=True):
        assert_close(got, want, dtype, scale=4)


@pytest.mark.parametrize("prenorm", BOOLS)
def test_triton_norm_dtypes_and_buffers(prenorm):
    weight, _ = parameters(torch.float32)
    x = leaf(3, HIDDEN, dtype=torch.bfloat16)
    out = triton.rms_norm_fn(x, weight, None, prenorm=prenorm, residual_in_fp32=True, out_dtype=torch.float32)
    out, *total = out if prenorm else (out,)
    assert out.dtype == torch.float32
    assert [t.dtype for t in total] == [torch.float32] * prenorm
    buffer, total_buffer = torch.empty(3, HIDDEN), torch.empty(3, HIDDEN)
    result = triton.rms_norm_fn(
        x, weight, None, prenorm=prenorm, residual_in_fp32=True, out=buffer, residual_out=total_buffer
    )
    result = result if prenorm else (result,)
    assert result[0].data_ptr() == buffer.data_ptr()
    assert_close(buffer, norm(x.double(), weight.double(), None, True, 1e-6), torch.bfloat16)
    if prenorm:
        assert torch.equal(total_buffer, x.float())


@RMS
def test_triton_dropout(rms):
    function = triton.rms_norm_fn if rms else triton.layer_norm_fn
    weight, bias = parameters(torch.float32)
    x, x1, residual = leaf(40, HIDDEN), leaf(40, HIDDEN), leaf(40, HIDDEN)
    out, total, mask, mask1 = function(
        x, weight, bias, residual, x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert mask.dtype == mask1.dtype == torch.bool
    assert not torch.equal(mask, mask1)
    expected = x.double() * mask / 0.75 + x1.double() * mask1 / 0.75 + residual.double()
    assert_close(total, expected)
    assert_close(out, norm(expected, weight.double(), bias.double(), rms, 1e-6), scale=4)
    form = triton.rms_norm_ref if rms else triton.layer_norm_ref
    masks = {"dropout_mask": mask, "dropout_mask1": mask1}
    assert_close(form(x, weight, bias, residual, x1, dropout_p=0.25, **masks), out.double(), scale=4)
    *_, mask, mask1 = function(x, weight, bias, residual, return_dropout_mask=True)
    assert mask is None
    assert mask1 is None


@RMS
@pytest.mark.parametrize("prenorm", BOOLS)
def test_norm_linear(rms, prenorm):
    weight, bias = parameters(torch.float32)
    x, residual = leaf(2, 3, HIDDEN), leaf(2, 3, HIDDEN)
    linear_weight, linear_bias = leaf(7, HIDDEN), leaf(7)

    def call(*args):
        return triton.layer_norm_linear_fn(*args, eps=EPS, prenorm=prenorm, is_rms_norm=rms)

    def expected(x, weight, bias, linear_weight, linear_bias, residual):
        total = x + residual
        out = norm(total, weight, bias, rms) @ linear_weight.T + linear_bias
        return (out, total) if prenorm else out

    check(call, expected, [x, weight, bias, linear_weight, linear_bias, residual])


def test_malformed_calls():
    weight, bias = parameters(torch.float32)
    x = leaf(3, HIDDEN)
    with pytest.raises(ValueError, match="weight must be"):
        fused.layer_norm(leaf(3, HIDDEN + 1), weight, bias, EPS)
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        triton.rms_norm_fn(x, weight, bias, residual=leaf(1, HIDDEN))
    with pytest.raises(NotImplementedError, match="rowscale together with x1"):
        triton.rms_norm_fn(x, weight, bias, x1=x, rowscale=torch.ones(3))


@pytest.mark.parametrize(
    ("module", "rms", "names"),
    [
        (fused_rms.RMSNorm(HIDDEN), True, ["weight"]),
        (triton.RMSNorm(HIDDEN, zero_centered_weight=True), True, ["weight"]),
        (fused.DropoutAddLayerNorm(HIDDEN, p=0.5).eval(), False, ["weight", "bias"]),
        (fused_rms.DropoutAddRMSNorm(HIDDEN, p=0.5).eval(), True, ["weight"]),
    ],
    ids=lambda value: type(value).__module__ if isinstance(value, nn.Module) else "",
)
def test_modules(module, rms, names):
    assert list(module.state_dict()) == names
    x = leaf(4, HIDDEN)
    one = torch.ones(HIDDEN, dtype=torch.float64)
    expected = norm(x.double(), one, None, rms)
    assert_close(module(x), expected, scale=4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_()
    other = pickle.loads(pickle.dumps(module))
    fresh = copy.deepcopy(module)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(fresh(x), module(x))
    fresh.reset_parameters()
    assert_close(fresh(x), expected, scale=4)


def test_module_residual_and_dropout():
    x, residual = leaf(4, HIDDEN, dtype=torch.bfloat16), leaf(4, HIDDEN)
    for module in (fused.DropoutAddLayerNorm, fused_rms.DropoutAddRMSNorm):
        drop = module(HIDDEN, prenorm=True, p=0.5)
        _, total = drop(x, residual)
        branch = total - residual
        dropped = branch.abs() < 1e-6
        assert 0 < dropped.sum() < dropped.numel()
        torch.testing.assert_close(branch[~dropped], 2 * x.float()[~dropped], rtol=1e-4, atol=1e-5)
    drop = triton.RMSNorm(HIDDEN, dropout_p=0.5)
    assert not torch.equal(drop(x), drop(x))
    assert torch.equal(drop.eval()(x), drop(x))
    _, total = drop(x, residual, prenorm=True)
    assert_close(total, x.double() + residual.double())
    _, total = drop(x, prenorm=True, residual_in_fp32=True)
    assert total.dtype == torch.float32


def test_compiles_without_a_break_for_any_length():
    weight, bias = parameters(torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def block(x, residual):
        x, residual = fused.dropout_add_layer_norm(x, residual, weight, bias, 0.0, EPS, prenorm=True)
        return triton.rms_norm_fn(x, weight, None, residual) + fused_rms.rms_norm(x, weight, EPS)

    for length in (5, 6, 7, 11):
        x, residual = torch.randn(2, 1, length, HIDDEN)
        y = fused.layer_norm(x + residual, weight, bias, EPS)
        want = norm(y.double() + x.double() + residual.double(), weight.double(), None, True, 1e-6)
        want = want + norm(y.double(), weight.double(), None, True)
        assert_close(block(x, residual), want, torch.float32, scale=4)
    assert len(graphs) <= 2
