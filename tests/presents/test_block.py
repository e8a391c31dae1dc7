"""`modules.block` against the same steps written out."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm

from .reference import assert_close

DIM = 32
BOOLS = [False, True]
PARTS = {"mixer_cls": partial(MHA, num_heads=2), "mlp_cls": partial(Mlp, hidden_features=48)}


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def norm(layer, x):
    if isinstance(layer, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight
    return y if layer.bias is None else y + layer.bias


def same(gots, wants, inputs):
    weights = [torch.randn_like(w) for w in wants]
    for got, want in zip(gots, wants, strict=True):
        assert_close(got, want, scale=10)
    for g, w in zip(
        torch.autograd.grad(gots, inputs, weights), torch.autograd.grad(wants, inputs, weights), strict=True
    ):
        assert_close(g, w, scale=100)


@pytest.mark.parametrize("fused", BOOLS)
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("first", BOOLS)
def test_prenorm(fused, norm_cls, first):
    block = Block(DIM, **PARTS, norm_cls=norm_cls, fused_dropout_add_ln=fused).double()
    x, residual = leaf(2, 5, DIM), leaf(2, 5, DIM)
    total = x if first else x + residual
    total2 = total + block.mixer(norm(block.norm1, total))
    want = block.mlp(norm(block.norm2, total2)), total2
    inputs = [x, *([] if first else [residual]), *block.parameters()]
    same(block(x, None if first else residual), want, inputs)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x)[0], block(x)[0])
    names = {name.split(".")[0] for name in block.state_dict()}
    assert names == {"mixer", "norm1", "mlp", "norm2"}


@pytest.mark.parametrize("fused", BOOLS)
@pytest.mark.parametrize("return_residual", BOOLS)
def test_postnorm(fused, return_residual):
    mixer = partial(MHA, num_heads=2, return_residual=return_residual)
    mlp = partial(Mlp, hidden_features=48, return_residual=return_residual)
    block = Block(DIM, mixer, mlp, prenorm=False, fused_dropout_add_ln=fused, return_residual=return_residual).double()
    x = leaf(2, 5, DIM)
    first = (lambda out: out[0]) if return_residual else (lambda out: out)
    hidden = norm(block.norm1, x + first(block.mixer(x)))
    want = norm(block.norm2, hidden + first(block.mlp(hidden)))
    same([block(x)], [want], [x, *block.parameters()])
    with pytest.raises(ValueError, match="residual must be None"):
        block(x, x)


def test_mixer_arguments_and_no_mlp():
    block = Block(DIM, partial(MHA, num_heads=2, cross_attn=True), nn.Identity).double()
    assert not hasattr(block, "norm2")
    x, x_kv = leaf(2, 5, DIM), leaf(2, 3, DIM)
    kwargs = {"x_kv": x_kv}
    out, residual = block(x, mixer_subset=slice(0, 1), mixer_kwargs=kwargs)
    assert kwargs == {"x_kv": x_kv}
    want = block.mixer(norm(block.norm1, x), x_kv, mixer_subset=slice(0, 1))
    same([out, residual], [want, x[:, :1]], [x, x_kv])
    assert block.allocate_inference_cache(2, 7).shape == (2, 7, 2, 2, DIM // 2)
    post = Block(DIM, partial(MHA, num_heads=2), nn.Identity, prenorm=False).double()
    assert_close(post(x), norm(post.norm1, x + post.mixer(x)), scale=10)


@pytest.mark.parametrize("fused", BOOLS)
def test_residual_in_fp32(fused):
    block = Block(DIM, **PARTS, residual_in_fp32=True, fused_dropout_add_ln=fused).to(torch.bfloat16)
    x = torch.randn(2, 5, DIM).bfloat16()
    out, residual = block(x)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    out, residual = block(out, residual)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="residual_in_fp32 needs prenorm"):
        Block(DIM, **PARTS, prenorm=False, residual_in_fp32=True)


@pytest.mark.parametrize("fused", BOOLS)
@pytest.mark.parametrize("kind", ["dropout", "stochastic depth"])
def test_dropout(fused, kind):
    """An identity for mixer and MLP makes both halves visible."""
    options = {"resid_dropout1": 0.5, "resid_dropout2": 0.5} if kind == "dropout" else {"drop_path1": 0.5}
    block = Block(DIM, nn.Identity, lambda dim: nn.Sequential(), fused_dropout_add_ln=fused, **options)
    x = torch.ones(64, 3, DIM)
    _, residual = block(x, torch.zeros_like(x))
    _, dropped = block(x, torch.zeros_like(x))
    if kind == "dropout":
        assert not torch.equal(residual, dropped)
    else:
        half = Block(DIM, nn.Identity, nn.Identity, fused_dropout_add_ln=fused, **options)
        _, residual = half(x, torch.zeros_like(x))
        # Whole rows, and those that stay are twice as large.
        assert set(residual.unique().tolist()) == {0.0, 2.0}
        assert (residual == residual[:, :1, :1]).all()
        assert 0.2 < residual.mean() / 2 < 0.8
    block.eval()
    _, residual = block(x, torch.zeros_like(x))
    assert torch.equal(block(x, torch.zeros_like(x))[1], residual)


def test_stochastic_depth():
    assert torch.equal(StochasticDepth(1.0)(torch.ones(4, 2)), torch.zeros(4, 2))
    x = torch.randn(4, 2)
    assert StochasticDepth(0.0)(x) is x
    assert StochasticDepth(0.7).eval()(x) is x
    with pytest.raises(ValueError, match="p must be between 0 and 1, got 2"):
        StochasticDepth(2)
    with pytest.raises(NotImplementedError, match="mode must be 'row', got 'batch'"):
        StochasticDepth(0.5, mode="batch")


@pytest.mark.parametrize("fused", BOOLS)
@pytest.mark.parametrize("tied", BOOLS)
@pytest.mark.parametrize("stage", ["embedding", "first residual", "later"])
def test_parallel_block(fused, tied, stage):
    block = ParallelBlock(DIM, **PARTS, tied_norm=tied, fused_dropout_add_ln=fused).double()
    x1, x2, residual = leaf(2, 5, DIM), leaf(2, 5, DIM), leaf(2, 5, DIM)
    given = {"embedding": (x1,), "first residual": (x1, x2), "later": (x1, x2, residual)}[stage]
    total = sum(given)
    norm2 = block.norm1 if tied else block.norm2
    want = block.mixer(norm(block.norm1, total)), block.mlp(norm(norm2, total)), total
    same(block(*given), want, [*given, *block.parameters()])
    assert hasattr(block, "norm2") != tied
    assert block.allocate_inference_cache(2, 7, dtype=torch.float16).dtype == torch.float16


def test_marks_and_defaults():
    for cls in (Block, ParallelBlock):
        block = cls(128, sequence_parallel=True, mark_shared_params=True)
        assert block.mixer.num_heads == 2
        assert block.mlp.fc1.out_features == 512
        for name, parameter in block.named_parameters():
            marked = name.startswith("norm")
            assert getattr(parameter, "_sequence_parallel", False) == marked
            assert getattr(parameter, "_shared_params", False) == marked
        with pytest.raises(NotImplementedError, match="fused_dropout_add_ln needs nn"):
            cls(128, norm_cls=lambda dim: nn.Identity(), fused_dropout_add_ln=True)
