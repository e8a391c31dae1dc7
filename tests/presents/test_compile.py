"""What `flash_attn` presents under torch.compile: one graph for all lengths, values and gradients those of eager."""

from functools import partial

import pytest
import torch
from torch import nn

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules.block import Block
from flash_attn.modules.mha import MHA, FlashSelfAttention
from flash_attn.modules.mlp import GatedMlp
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import FusedMLP, fused_mlp_func
from flash_attn.ops.layer_norm import dropout_add_layer_norm
from flash_attn.ops.rms_norm import rms_norm
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import rms_norm_fn
from tests.compiled import assert_one_graph

ANGLES = torch.outer(torch.arange(64.0), 0.5 ** torch.arange(8))
COS, SIN = ANGLES.cos(), ANGLES.sin()
SCALE = torch.linspace(0.5, 2.0, 32)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def packed(n):
    cu_seqlens = torch.tensor([0, n, 3 * n], dtype=torch.int32)
    return leaf(3 * n, 4, 16), cu_seqlens, 2 * n


def labelled(n):
    return leaf(3 * n, 20), torch.randint(0, 20, (3 * n,))


class Layer(nn.Module):
    """A layer of a language model, as programs write it on these functions."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32))
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = self.qkv(rms_norm(x, self.norm1, 1e-5)).unflatten(-1, (8, 8)).split([4, 2, 2], 2)
        q, k = (apply_rotary_emb(t, COS[:, :4], SIN[:, :4]) for t in (q, k))
        x = x + self.out(flash_attn_func(q, k, v, causal=True, window_size=(10, 0)).flatten(2))
        y = rms_norm(x, self.norm2, 1e-5)
        up, down = self.up, self.down
        return x + fused_mlp_func(y, up.weight, down.weight, up.bias, down.bias, activation="gelu_approx")


def unpadded(x, mask, weight):
    """Attention of a padded batch without its padding. Lengths come from the mask: a graph does not know them."""
    tokens, indices, cu_seqlens, longest, _ = unpad_input(x * weight, mask)
    qkv = tokens.unsqueeze(1).expand(-1, 2, -1)
    out = flash_attn_varlen_func(qkv, qkv, qkv, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    return pad_input(out.flatten(1), indices, x.shape[0], x.shape[1])


def masked(n):
    return leaf(2, n, 16), torch.arange(n) < torch.tensor([[n - 2], [n]]), leaf(16)


x32 = lambda n: (leaf(2, n, 32),)  # noqa: E731
two = lambda n: (leaf(2, n, 32), leaf(2, n, 32))  # noqa: E731
FUNCTIONS = {
    "apply_rotary_emb": (lambda x: apply_rotary_emb(x, COS, SIN), lambda n: (leaf(2, n, 4, 16),)),
    "apply_rotary_emb, offset": (
        lambda x, offset: apply_rotary_emb(x, COS, SIN, True, seqlen_offsets=offset),
        lambda n: (leaf(2, n, 4, 16), n - 2),
    ),
    "apply_rotary_emb, packed": (
        lambda x, cu, n: apply_rotary_emb(x, COS, SIN, inplace=True, cu_seqlens=cu, max_seqlen=n),
        lambda n: packed(n) if n < 30 else packed(n - 10),
    ),
    "apply_rotary_emb_qkv_": (lambda x: apply_rotary_emb_qkv_(x, COS, SIN), lambda n: (leaf(2, n, 3, 4, 16),)),
    "RotaryEmbedding": (RotaryEmbedding(16), lambda n: (leaf(2, n, 3, 4, 16),)),
    "RotaryEmbedding, xPos": (RotaryEmbedding(16, scale_base=512), lambda n: (leaf(2, n, 3, 4, 16),)),
    "index_first_axis": (index_first_axis, lambda n: (leaf(2 * n, 4), torch.arange(n))),
    "unpad_input": (unpadded, masked),
    "dropout_add_layer_norm": (
        lambda x, r: dropout_add_layer_norm(x, r, SCALE, SCALE, 0.2, 1e-5, prenorm=True),
        two,
    ),
    "rms_norm_fn": (lambda x, r: rms_norm_fn(x, SCALE, None, residual=r, prenorm=True, dropout_p=0.2), two),
    "swiglu": (swiglu, two),
    "FusedMLP": (FusedMLP(32, 64, checkpoint_lvl=1), x32),
    "GatedMlp": (GatedMlp(32, 64), x32),
    "CrossEntropyLoss": (CrossEntropyLoss(inplace_backward=True), labelled),
    "cross_entropy_loss": (
        lambda x, y: cross_entropy_loss(x, y, label_smoothing=0.1, lse_square_scale=0.01)[0],
        labelled,
    ),
    "FlashSelfAttention": (FlashSelfAttention(causal=True), lambda n: (leaf(2, n, 3, 4, 16),)),
    "MHA": (MHA(32, 4, num_heads_kv=2, use_flash_attn=True, rotary_emb_dim=8, causal=True, dropout=0.2), x32),
    "Block": (
        Block(
            32,
            partial(MHA, num_heads=4, use_flash_attn=True, use_alibi=True, causal=True),
            partial(FusedMLP, hidden_features=64),
            fused_dropout_add_ln=True,
        ),
        two,
    ),
    "a layer": (Layer(), x32),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_all_lengths(name):
    function, make = FUNCTIONS[name]
    assert_one_graph(function, make, tolerance=1e-4)
