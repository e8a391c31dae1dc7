"""nn.MultiheadAttention hands F.linear the usual strides, and nothing else changes (pytorch#181725)."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attn_mps import mha

ORIGINAL = F.multi_head_attention_forward
DIM, HEADS, LENGTH, KEYS = 16, 2, 7, 5


@pytest.fixture
def linears(monkeypatch):
    """(shape, strides, is it contiguous?) of what each F.linear receives."""
    received = []
    linear = F.linear

    def recording(x, *args):
        received.append((tuple(x.shape), x.stride(), x.is_contiguous()))
        return linear(x, *args)

    monkeypatch.setattr(F, "linear", recording)
    return received


def usual(shape):
    strides = [1]
    for n in shape[:0:-1]:
        strides.insert(0, strides[0] * n)
    return tuple(strides)


def odd(received):
    return [call for call in received if call[2] and call[1] != usual(call[0])]


def inputs(batch, kind, **dims):
    query = torch.randn(batch, LENGTH, DIM)
    if kind == "self":
        return query, query, query
    key = torch.randn(batch, KEYS, dims.get("kdim", DIM))
    return (query, key, key) if kind == "cross" else (query, key, torch.randn(batch, KEYS, dims.get("vdim", DIM)))


def masks(which, batch, keys):
    if which == "key_padding_mask":
        return {"key_padding_mask": torch.arange(keys).expand(batch, -1) == 1}
    if which == "attn_mask":
        return {"attn_mask": torch.randn(LENGTH, keys)}
    if which == "attn_mask of heads":
        return {"attn_mask": torch.rand(batch * HEADS, LENGTH, keys) > 0.9}
    return {}


def run(module, tensors, how):
    """Outputs and the gradients of inputs and weights."""
    leaves = {id(t): t.clone().requires_grad_() for t in tensors}
    module = copy.deepcopy(module)
    torch.manual_seed(3)
    out, weights = module(*(leaves[id(t)] for t in tensors), **how)
    (out.square().sum() + (0 if weights is None else weights.square().sum())).backward()
    grads = [leaf.grad for leaf in leaves.values()] + [p.grad for p in module.parameters()]
    return [out, *([] if weights is None else [weights]), *grads]


CASES = list(
    itertools.product(
        (1, 4),
        ("self", "cross", "three"),
        ("none", "key_padding_mask", "attn_mask", "attn_mask of heads"),
        (False, True),
        ({}, {"add_bias_kv": True}, {"kdim": 12, "vdim": 20}, {"add_zero_attn": True, "bias": False, "dropout": 0.2}),
    )
)


@pytest.mark.parametrize("batch,kind,mask,need_weights,options", CASES)
def test_strides_are_usual_and_numbers_the_same(linears, batch, kind, mask, need_weights, options):
    if kind != "three" and "kdim" in options:
        options = {}
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options)
    tensors = inputs(batch, kind, **options)
    how = {**masks(mask, batch, tensors[1].shape[1]), "need_weights": need_weights}
    before = run(module, tensors, how)
    assert bool(odd(linears)) is (batch == 1), "this torch hands F.linear usual strides: is the change still needed?"
    linears.clear()
    mha.install(devices=["cpu"])
    after = run(module, tensors, how)
    assert linears
    assert not odd(linears)
    for theirs, ours in zip(before, after, strict=True):
        assert torch.equal(theirs, ours)


def test_nothing_is_copied(monkeypatch):
    received, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: received.append(x.data_ptr()) or linear(x, *args))
    mha.install(devices=["cpu"])
    query, key = torch.randn(1, LENGTH, DIM), torch.randn(1, KEYS, DIM)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    module(query, key, key)
    module.train()(query, query, query)
    assert received[:2] == [query.data_ptr(), key.data_ptr()]
    assert received[3] == query.data_ptr()
    x = torch.randn(1, LENGTH, DIM).transpose(0, 1)
    normal = mha.with_usual_strides(x)
    assert (x.stride(), normal.stride()) == ((DIM, LENGTH * DIM, 1), (DIM, DIM, 1))
    assert normal.data_ptr() == x.data_ptr()
    for other in (x.transpose(0, 1), torch.randn(4, LENGTH, DIM).transpose(0, 1), x[0], x[:0]):
        assert mha.with_usual_strides(other) is other


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(DIM, HEADS), nn.MultiheadAttention(DIM, HEADS, batch_first=True)]
)
@pytest.mark.parametrize("shape", [(LENGTH, DIM), (LENGTH, 1, DIM), (1, 1, DIM), (3, 0, DIM)])
def test_other_inputs(linears, module, shape):
    x = torch.randn(shape)
    expected = module(x, x, x)[0]
    mha.install(devices=["cpu"])
    assert torch.equal(module(x, x, x)[0], expected)
    assert not odd(linears[3:])


def test_devices_that_are_not_named_are_left_alone(linears):
    mha.install()
    x = torch.randn(1, LENGTH, DIM)
    nn.MultiheadAttention(DIM, HEADS, batch_first=True)(x, x, x)
    assert odd(linears)


def test_uninstall_leaves_the_very_same_object():
    mha.install()
    mha.install(devices=["cpu"])
    assert mha.is_installed()
    mha.uninstall()
    assert F.multi_head_attention_forward is ORIGINAL
    mha.uninstall()
    assert not mha.is_installed()


class Sub(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_pickles_subclasses_and_hooks(linears):
    x = torch.randn(1, LENGTH, DIM)
    module = Sub(DIM, HEADS, batch_first=True)
    expected = module(x, x, x)[0]
    before = pickle.dumps(module)
    mha.install(devices=["cpu"])
    after = pickle.dumps(module)
    linears.clear()
    calls = []
    for loaded in (pickle.loads(before), pickle.loads(after), copy.deepcopy(module)):
        loaded.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(loaded(x, x, x)[0], expected)
    assert not odd(linears)
    assert len(calls) == 3
    mha.uninstall()
    assert torch.equal(pickle.loads(after)(x, x, x)[0], expected)


def test_compile_checkpoint_autocast_and_threads(linears):
    x = torch.randn(1, LENGTH, DIM)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    expected = module(x, x, x)[0]
    mha.install(devices=["cpu"])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x, x, x)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()
    linears.clear()
    leaf = x.clone().requires_grad_()
    checkpoint(lambda x: module(x, x, x)[0], leaf, use_reentrant=False).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, x, x)[0].dtype == torch.bfloat16
    threads = [threading.Thread(target=module, args=(x, x, x)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(linears) >= 12
    assert not odd(linears)


def test_scripts_are_torchs():
    x = torch.randn(1, LENGTH, DIM)
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    expected = module(x, x, x)[0]
    mha.install(devices=["cpu"])
    torch.testing.assert_close(torch.jit.script(module)(x, x, x)[0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer(linears, training):
    model = nn.Transformer(DIM, HEADS, 1, 1, 32, dropout=0.0, batch_first=True).train(training)
    source, target = torch.randn(1, KEYS, DIM), torch.randn(1, LENGTH, DIM)
    expected = model(source, target)
    mha.install(devices=["cpu"])
    linears.clear()
    assert torch.equal(model(source, target), expected)
    assert not odd(linears)
