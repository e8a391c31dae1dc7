"""Whatever upstream has can be pickled and copied: functions and classes by upstream's names, modules with their state.

A pickle that is made here loads where upstream itself is installed, and the other way round: it must not name anything
else.
"""

import copy
import functools
import importlib
import io
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules import block, embedding, mha, mlp
from flash_attn.ops import fused_dense, layer_norm, rms_norm
from flash_attn.ops.triton.layer_norm import RMSNorm as TritonRMSNorm
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from flash_attn.utils import generation

from .test_imports import KERNEL_HELPERS, SIGNATURES

# Upstream's are made inside a function as well, and no pickle can name them.
LOCAL = {("flash_attn.utils.torch", "custom_fwd"), ("flash_attn.utils.torch", "custom_bwd")}
# Names that upstream takes from another package.
BORROWED = {"rearrange": "einops.einops", "repeat": "einops.einops", "deprecated": None}

NAMES = [
    (module, name)
    for module, names in SIGNATURES.items()
    for name in names
    if "." not in name and name not in KERNEL_HELPERS.get(module, ()) and (module, name) not in LOCAL
]


def modules_in(pickled):
    """The modules that a pickle names."""
    strings = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return {string for string in strings if string in sys.modules}


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_name(module, name, monkeypatch):
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    value = getattr(importlib.import_module(module), name)
    pickled = pickle.dumps(value)
    assert pickle.loads(pickled) == value
    assert copy.deepcopy(value) == value
    named = {part for part in modules_in(pickled) if part.startswith("flash_attn")}
    assert named <= set(SIGNATURES)
    if callable(value) and name not in BORROWED:
        assert named, "a function or class of upstream's modules"


WIDTH, HEADS = 16, 4
IDS = torch.tensor([[1, 3, 5], [2, 4, 0]])


def tokens():
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def linears(*names):
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


TWO_LAYERS = linears("fc1", "fc2")
NORM = ["weight", "bias"]
FLASH_MHA = functools.partial(mha.MHA, num_heads=HEADS, causal=True, use_flash_attn=True)
MIXER = functools.partial(mha.MHA, num_heads=HEADS)
QKV = torch.randn(2, 3, 3, HEADS, 8, generator=torch.Generator().manual_seed(1))

# What makes a module, what it is called with, and the names of its state, which are upstream's.
MODULES = {
    "PatchEmbed": (lambda: PatchEmbed(4, 2, 1, 8), (torch.ones(1, 1, 4, 4),), linears("proj")),
    "RotaryEmbedding": (lambda: RotaryEmbedding(8), (QKV,), []),
    "CrossEntropyLoss": (CrossEntropyLoss, (torch.ones(3, 5), torch.tensor([0, 1, 4])), []),
    "MHA": (lambda: mha.MHA(WIDTH, HEADS), (tokens(),), linears("Wqkv", "out_proj")),
    "MHA, grouped, flash": (lambda: FLASH_MHA(WIDTH, num_heads_kv=2), (tokens(),), linears("Wqkv", "out_proj")),
    "MHA, cross": (
        lambda: mha.MHA(WIDTH, HEADS, cross_attn=True),
        (tokens(), tokens()),
        linears("Wq", "Wkv", "out_proj"),
    ),
    "MHA, rotary": (lambda: FLASH_MHA(WIDTH, rotary_emb_dim=4), (tokens(),), linears("Wqkv", "out_proj")),
    "MHA, alibi": (lambda: FLASH_MHA(WIDTH, use_alibi=True), (tokens(),), linears("Wqkv", "out_proj")),
    "MHA, convolutions": (
        lambda: mha.MHA(WIDTH, HEADS, dwconv=True),
        (tokens(),),
        linears("Wqkv", "dwconv_qkv", "out_proj"),
    ),
    "SelfAttention": (mha.SelfAttention, (QKV,), []),
    "CrossAttention": (mha.CrossAttention, (QKV[:, :, 0], QKV[:, :, 1:]), []),
    "FlashSelfAttention": (mha.FlashSelfAttention, (QKV,), []),
    "FlashCrossAttention": (mha.FlashCrossAttention, (QKV[:, :, 0], QKV[:, :, 1:]), []),
    "FlashSelfAttention, alibi": (
        lambda: mha.FlashSelfAttention(alibi_slopes=torch.tensor(mha.get_alibi_slopes(HEADS))),
        (QKV,),
        [],
    ),
    "Mlp": (lambda: mlp.Mlp(WIDTH, activation=F.silu), (tokens(),), TWO_LAYERS),
    "GatedMlp": (lambda: mlp.GatedMlp(WIDTH, activation=F.silu), (tokens(),), TWO_LAYERS),
    "Block": (
        lambda: block.Block(WIDTH, MIXER, functools.partial(mlp.Mlp, hidden_features=8)),
        (tokens(),),
        [*linears("mixer.Wqkv", "mixer.out_proj", "norm1"), *linears("mlp.fc1", "mlp.fc2", "norm2")],
    ),
    "ParallelBlock": (
        lambda: block.ParallelBlock(WIDTH, MIXER, functools.partial(mlp.Mlp, hidden_features=8)),
        (tokens(),),
        [*linears("mixer.Wqkv", "mixer.out_proj", "norm1"), *linears("mlp.fc1", "mlp.fc2", "norm2")],
    ),
    "StochasticDepth": (lambda: block.StochasticDepth(0.5, "row").eval(), (tokens(),), []),
    "GPT2Embeddings": (
        lambda: embedding.GPT2Embeddings(WIDTH, 8, 4, word_embed_proj_dim=8),
        (IDS,),
        ["word_embeddings.weight", "project_in.weight", "position_embeddings.weight"],
    ),
    "BertEmbeddings": (
        lambda: embedding.BertEmbeddings(WIDTH, 8, 4, 2),
        (IDS,),
        [f"{kind}_embeddings.weight" for kind in ("word", "position", "token_type")],
    ),
    "VocabParallelEmbedding": (lambda: embedding.VocabParallelEmbedding(8, WIDTH), (IDS,), ["weight"]),
    "ColumnParallelEmbedding": (lambda: embedding.ColumnParallelEmbedding(8, WIDTH), (IDS,), ["weight"]),
    "FusedDense": (lambda: fused_dense.FusedDense(WIDTH, 8), (tokens(),), NORM),
    "FusedMLP": (lambda: fused_dense.FusedMLP(WIDTH), (tokens(),), TWO_LAYERS),
    "FusedDenseSqreluDense": (lambda: FusedDenseSqreluDense(WIDTH), (tokens(),), TWO_LAYERS),
    "DropoutAddLayerNorm": (lambda: layer_norm.DropoutAddLayerNorm(WIDTH), (tokens(), tokens()), NORM),
    "DropoutAddRMSNorm": (lambda: rms_norm.DropoutAddRMSNorm(WIDTH), (tokens(), tokens()), ["weight"]),
    "RMSNorm": (lambda: rms_norm.RMSNorm(WIDTH), (tokens(),), ["weight"]),
    "RMSNorm of ops.triton": (lambda: TritonRMSNorm(WIDTH), (tokens(),), ["weight"]),
}


def made(name):
    """The module with numbers that its initialisation does not give, and what it is called with."""
    make, inputs, _ = MODULES[name]
    module = make().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module, inputs


def call(module, inputs):
    """The result on copies: rotary embedding turns its input in place."""
    results = module(*(tensor.clone() for tensor in inputs))
    return [results] if isinstance(results, torch.Tensor) else [r for r in results if isinstance(r, torch.Tensor)]


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    """A copy, a pickle and a fresh module with its state all compute what it computes, and share nothing with it."""
    module, inputs = made(name)
    expected = call(module, inputs)
    names = MODULES[name][2]
    assert sorted(module.state_dict()) == sorted(names)
    fresh = MODULES[name][0]().eval()
    fresh.load_state_dict(module.state_dict())
    pickled = pickle.dumps(module)
    others = {"copy": copy.deepcopy(module), "pickle": pickle.loads(pickled), "state": fresh}
    assert {part for part in modules_in(pickled) if part.startswith("flash_attn")} <= set(SIGNATURES)
    for how, other in others.items():
        for got, want in zip(call(other, inputs), expected, strict=True):
            assert torch.equal(got, want), how
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for other in others.values():
        for got, want in zip(call(other, inputs), expected, strict=True):
            assert torch.equal(got, want)


def test_every_module_is_tried():
    """But those that need a process group, which no pickle takes; `test_parallel` has their state."""
    borrowed = {"StochasticDepth"}  # from torchvision, upstream
    needs_a_group = {
        *("ParallelMHA", "ParallelMLP", "ParallelGatedMlp", "ParallelFusedMLP", "ParallelGPT2Embeddings"),
        *("ColumnParallelLinear", "RowParallelLinear"),
    }
    found = {
        name
        for module, names in SIGNATURES.items()
        for name in names
        if "." not in name
        and name not in KERNEL_HELPERS.get(module, ())
        and isinstance(value := getattr(importlib.import_module(module), name), type)
        and issubclass(value, torch.nn.Module)
    }
    assert found | borrowed == {type(made(name)[0]).__name__ for name in MODULES} | needs_a_group


LOAD = """
import pickle, sys
import flash_attn_shim

flash_attn_shim.install()
modules = pickle.load(sys.stdin.buffer)
import torch

for name, (module, inputs, expected) in modules.items():
    results = module(*(tensor.clone() for tensor in inputs))
    results = [results] if isinstance(results, torch.Tensor) else [r for r in results if isinstance(r, torch.Tensor)]
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want), name
print(len(modules))
"""


def test_modules_load_in_another_process():
    """It imports nothing of flash_attn by itself: the pickle says what it needs."""
    modules = {}
    for name in MODULES:
        module, inputs = made(name)
        modules[name] = module, inputs, [tensor.detach() for tensor in call(module, inputs)]
    buffer = io.BytesIO()
    pickle.dump(modules, buffer)
    environment = {"MTLFLASHATTN_SHIM": "on", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "error::UserWarning", "-c", LOAD]
    done = subprocess.run(program, env=environment, input=buffer.getvalue(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == len(MODULES)


@pytest.mark.parametrize(
    "value",
    [
        generation.InferenceParams(max_seqlen=8, max_batch_size=2, seqlen_offset=3),
        generation.GreedySearchDecoderOnlyOutput(sequences=IDS, scores=(tokens(),)),
        generation.SampleDecoderOnlyOutput(sequences=IDS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_generation(value):
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert type(other) is type(value)
        assert repr(other) == repr(value)
