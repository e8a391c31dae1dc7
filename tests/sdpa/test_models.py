"""Whole models under the patch: their own results where calls are left to torch, right ones where they are taken."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from flash_attn_mps import mha, sdpa


class DiffusersLikeBlock(nn.Module):
    """Self attention over an image's tokens and cross attention to 77 of a text, as diffusion models have them."""

    def __init__(self, dim=80, heads=2, text=48):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.to_q = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.to_k = nn.ModuleList(nn.Linear(n, dim, bias=False) for n in (dim, text))
        self.to_v = nn.ModuleList(nn.Linear(n, dim, bias=False) for n in (dim, text))
        self.to_out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def attention(self, n, x, context, mask=None):
        q, k, v = (
            linear(tokens).view(len(x), -1, self.heads, linear.out_features // self.heads).transpose(1, 2)
            for linear, tokens in ((self.to_q[n], x), (self.to_k[n], context), (self.to_v[n], context))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return self.to_out[n](out.transpose(1, 2).reshape(len(x), -1, q.shape[1] * q.shape[3]).to(q.dtype))

    def forward(self, image, text, mask):
        x = self.norms[0](image)
        image = image + self.attention(0, x, x)
        image = image + self.attention(1, self.norms[1](image), text, mask)
        return image + self.mlp(self.norms[2](image))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.arange(12).expand(2, -1) >= torch.tensor([[12], [7]])
    return model, (torch.randn(2, 12, 32),), {"src_key_padding_mask": padding}


def block():
    mask = (torch.arange(77) < 50).view(1, 1, 77)
    return DiffusersLikeBlock(), (torch.randn(2, 64, 80), torch.randn(2, 77, 48), mask), {}


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert():
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SMALL, **dropouts, intermediate_size=64, attn_implementation="sdpa")
    ids = torch.randint(0, 100, (2, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [6]])).long()
    return transformers.BertModel(config), (ids,), {"attention_mask": mask}


def gpt2():
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**SMALL, **dropouts, attn_implementation="sdpa")
    return transformers.GPT2LMHeadModel(config), (torch.randint(0, 100, (2, 11)),), {}


MODELS = {"TransformerEncoder": encoder, "diffusers": block, "BERT": bert, "GPT-2": gpt2}


def result(model, args, how):
    out = model(*args, **how)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.fixture
def made(request):
    model, args, how = MODELS[request.param]()
    return model.eval(), args, how


@pytest.mark.parametrize("made", MODELS, indirect=True)
@pytest.mark.parametrize("training", [False, True])
def test_on_the_cpu_models_give_their_own_results_bit_for_bit(made, training):
    model, args, how = made
    model.train(training)

    def both():
        model.zero_grad()
        out = result(model, args, how)
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = both()
    with sdpa.installed():
        mha.install()
        assert all(torch.equal(a, b) for a, b in zip(expected, both(), strict=True))
    assert sdpa.stats() == {"taken": {}, "left": {}, "fell through": {}}, "no call comes here"


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_taken_calls_give_the_same_results(tier, made):
    model, args, how = made
    torch.backends.mha.set_fastpath_enabled(False)  # torch has it for the CPU and CUDA, not for MPS
    try:
        with torch.no_grad():
            expected = result(model, args, how)
            with sdpa.installed():
                out = result(model, args, how)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert sum(sdpa.stats()["taken"].values()) == 2
    assert sdpa.stats()["left"] == sdpa.stats()["fell through"] == {}
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_taken_calls_train_alike(as_mps, given, made):
    given(budget=0)
    model, args, how = made

    def grads():
        model.zero_grad()
        result(model, args, how).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = grads()
    with sdpa.installed():
        ours = grads()
    assert sdpa.stats()["taken"] == {"memory": 2}
    largest = max(float(theirs.abs().max()) for theirs in expected)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * largest, rtol=1e-3)
