"""How programs call what is presented: `data/calls.tsv`, a row for each shape of call that programs contain.

A row has the module and name that is called, how many arguments are positional and which are named (`*` and `**`:
some or all of the rest come out of a list or a dict), in how many places of the programs it stands, one of these, and
the release that it is written for:

* 2.8, and 3 for FlashAttention 3 as it is now: it fits upstream's signature.
* 2.6, 3 beta: it fits an older signature, where window_size was one argument of the private functions.
* 1, 4, extension: for FlashAttention 1 or 4, or a compiled extension, which are not presented.
* another package, a mistake: it fits no release; the program calls something else, or fails wherever it runs.
"""

import csv
import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..attention import oracle
from .reference import assert_close

DATA = Path(__file__).parent / "data"
UPSTREAM = json.loads((DATA / "upstream-2.8.3.json").read_text())
UPSTREAM["flash_attn_interface"] = json.loads((DATA / "upstream-fa3.json").read_text())
with open(DATA / "calls.tsv", newline="") as _file:
    CALLS = list(csv.DictReader(_file, delimiter="\t", quoting=csv.QUOTE_NONE))
CURRENT, ELSEWHERE = ("2.8", "3"), ("1", "4", "extension")


def name_of(call):
    return f"{call['module']}.{call['function']}({call['n_positional']}, {call['keywords']})"


def upstream_signature(call):
    """The signature of upstream's function; None where upstream's name is not a function of its own."""
    names = UPSTREAM[call["module"]]
    text = names[call["function"]] or names.get(f"{call['function']}.__init__")
    if text is None:
        return None
    namespace = {"torch": torch, "nn": nn, "F": F}
    exec(f"def upstream{text.replace('(self, ', '(')}: pass", namespace)
    return inspect.signature(namespace["upstream"])


def presented(call):
    try:
        module = importlib.import_module(call["module"])
    except ModuleNotFoundError:
        return None
    return getattr(module, call["function"], None)


def bind(signature, call, argument=lambda name: None):
    """`(args, kwargs)` of the call; TypeError where the signature does not take them."""
    names = [name for name in call["keywords"].split(",") if name and "*" not in name]
    positional = list(signature.parameters)[: int(call["n_positional"])]
    if "*" in call["keywords"]:  # also of `**`: what is required and not there comes out of the list or dict
        required = [p.name for p in signature.parameters.values() if p.default is p.empty]
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names += [n for n in required if n not in (*positional, *names) and signature.parameters[n].kind not in kinds]
    args = [argument(name) for name in positional]
    kwargs = {name: argument(name) for name in names}
    signature.bind(*args, *[None] * (int(call["n_positional"]) - len(args)), **kwargs)
    return args, kwargs


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_call_fits_the_signature(call, monkeypatch):
    """It does exactly where it fits upstream's, and where it fits upstream's is written in its row."""
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    function = presented(call)
    if call["release"] in CURRENT:
        for signature in (inspect.signature(function), upstream_signature(call)):
            if signature is not None:
                bind(signature, call)
    elif call["release"] not in ELSEWHERE and function is not None:
        for signature in (inspect.signature(function), upstream_signature(call)):
            with pytest.raises(TypeError):
                bind(signature, call)
    elif function is not None:
        assert not callable(getattr(function, "fwd", None)), "an extension that is not there"
        assert call["function"] in ("flash_attn_gpu", "flash_attn_interface")


def test_most_calls_are_for_the_current_releases():
    assert sum(int(call["calls"]) for call in CALLS) == 350
    assert sum(int(call["calls"]) for call in CALLS if call["release"] in CURRENT) == 286


HEADS, HEADS_K, DIM = 4, 2, 8
# What a program passes under each name. Where a mask, a cap or a scale does not matter, the numbers do not show it.
SCORING = {
    "dropout_p": 0.0,
    "softmax_scale": 0.6,
    "causal": True,
    "window_size": (3, 2),
    "window_size_left": 3,
    "window_size_right": 2,
    "softcap": 1.5,
    "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    "deterministic": True,
    "return_attn_probs": True,
    "return_softmax": True,
    "rng_state": torch.zeros(2, dtype=torch.int64),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), torch.ones(2, 2)),
}
CU_Q = torch.tensor([0, 3, 8], dtype=torch.int32)
CU_K = torch.tensor([0, 5, 11], dtype=torch.int32)
USED_Q = torch.tensor([3, 4], dtype=torch.int32)
USED_K = torch.tensor([4, 6], dtype=torch.int32)
BLOCK_TABLE = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values_for(call):
    """A value for each argument that a call of this function may name."""
    function, keywords = call["function"], call["keywords"].split(",")
    q, k, v = (numbers(2, n, h, DIM, seed=s) for s, (n, h) in enumerate(((7, HEADS), (9, HEADS_K), (9, HEADS_K))))
    if "varlen" in function:
        q, k, v = (numbers(n, h, DIM, seed=s) for s, (n, h) in enumerate(((8, HEADS), (11, HEADS_K), (11, HEADS_K))))
    if "block_table" in keywords:
        k, v = (numbers(4, 4, HEADS_K, DIM, seed=s) for s in (4, 5))
    packed = numbers(*((11,) if "varlen" in function else (2, 9)), 3, HEADS, DIM, seed=6)
    values = SCORING | {"q": q, "k": k, "v": v, "kv": torch.stack((k, v), -3) if k.shape == v.shape else None}
    values |= {"qkv": packed, "cu_seqlens": CU_K, "max_seqlen": 6, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    values |= {"max_seqlen_q": 5, "max_seqlen_k": 6, "seqused_q": USED_Q, "seqused_k": USED_K}
    if "block_table" in keywords:
        values["block_table"] = BLOCK_TABLE
    if "kvcache" in function:
        values |= {"k_cache": k, "v_cache": v, "cache_seqlens": USED_K, "cache_leftpad": torch.tensor([1, 2]).int()}
        values |= {name: numbers(2, 2, HEADS_K, DIM, seed=s) for s, name in enumerate(("k", "v"), 7)}
        values["q"] = numbers(2, 2, HEADS, DIM, seed=9)
    return values


def expected(function, given):
    """`(out, lse, leaves)` of the call in fp64, from what it names; leaves are its q, k and v, or what packs them."""
    leaves = {
        name: given[name].double().requires_grad_() for name in ("q", "k", "v", "kv", "qkv", "k_cache") if name in given
    }
    how = {n: given[n] for n in ("softmax_scale", "causal", "window_size", "softcap", "alibi_slopes") if n in given}
    if "window_size_left" in given:
        how["window_size"] = (given["window_size_left"], given["window_size_right"])
    if "kvcache" in function:
        cache = {n: given[n] for n in ("cache_seqlens", "cache_leftpad", "block_table") if n in given}
        new = [given[name].double() if name in given else None for name in ("k", "v")]
        tensors = (given[name].double() for name in ("q", "k_cache", "v_cache"))
        return (*oracle.kvcache(*tensors, *new, **cache, **how)[:2], None)
    if "qkv" in leaves:
        q, k, v = leaves["qkv"].unbind(-3)
    else:
        q, (k, v) = leaves["q"], leaves["kv"].unbind(-3) if "kv" in leaves else (leaves["k"], leaves["v"])
    if "varlen" not in function:
        return (*oracle.dense(q, k, v, **how)[:2], leaves)
    layout = {name: given[name] for name in ("seqused_q", "seqused_k", "block_table") if name in given}
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"]) if "cu_seqlens_q" in given else (CU_K, CU_K)
    return (*oracle.varlen(q, k, v, *lengths, **layout, **how)[:2], leaves)


def named(call):
    """The keywords of a call as they would be without positional arguments."""
    positional = list(upstream_signature(call).parameters)[: int(call["n_positional"])]
    return ",".join([*positional, call["keywords"]])


ATTENTION = [
    call
    for call in CALLS
    if call["release"] in CURRENT and call["function"].lstrip("_").startswith("flash_attn") and presented(call)
]
PUBLIC = [call for call in ATTENTION if call["function"].startswith("flash_attn")]
FORWARD = [call for call in ATTENTION if call["function"].endswith("_forward") and call["release"] == "2.8"]
BACKWARD = [call for call in ATTENTION if call["function"].endswith("_backward") and call["release"] == "2.8"]


def test_the_most_frequent_calls_are_among_them():
    frequent = [call for call in CALLS if call["release"] in CURRENT][:10]
    assert [int(call["calls"]) for call in frequent] == [24, 11, 10, 9, 8, 7, 6, 6, 5, 5]
    assert all(call in PUBLIC for call in frequent)


@pytest.mark.parametrize("call", PUBLIC, ids=name_of)
def test_values_and_gradients(call):
    function, values = presented(call), values_for(call)
    args, kwargs = bind(upstream_signature(call), call, values.__getitem__)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    if "q_descale" in given:
        with pytest.raises(NotImplementedError, match="q_descale"):
            function(*args, **kwargs)
        return
    out, lse, leaves = expected(call["function"], given)
    for name in leaves or ():
        given[name].requires_grad_()
    got = function(*args, **kwargs)
    if given.get("return_attn_probs"):
        assert len(got) == (2 if call["release"] == "3" else 3)
        torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-5)
        got = got[0]
    assert isinstance(got, torch.Tensor)
    assert got.is_contiguous()
    assert_close(got, out)
    if leaves is None:
        return
    dout = numbers(*out.shape, seed=20)
    grads = torch.autograd.grad(got, [given[name] for name in leaves], dout)
    for grad, exact in zip(grads, torch.autograd.grad(out, leaves.values(), dout.double()), strict=True):
        assert_close(grad, exact, scale=5)


@pytest.mark.parametrize("call", FORWARD, ids=name_of)
def test_private_forward(call):
    values = values_for(call)
    args, kwargs = bind(upstream_signature(call), call, values.__getitem__)
    given = upstream_signature(call).bind(*args, **kwargs).arguments
    out, lse, _ = expected(call["function"], given)
    got, got_lse, probs, rng_state = presented(call)(*args, **kwargs)
    assert_close(got, out)
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert probs.numel() == 0
    assert rng_state.shape == (2,)


@pytest.mark.parametrize("call", BACKWARD, ids=name_of)
def test_private_backward(call):
    values = values_for(call)
    # What the call names says what attention it is; then its output is there to be passed.
    given = dict.fromkeys(("dout", "out", "softmax_lse", "dq", "dk", "dv")) | values
    _, given = bind(upstream_signature(call), {**call, "n_positional": 0, "keywords": named(call)}, given.__getitem__)
    out, lse, leaves = expected(call["function"], given)
    values |= {"dout": numbers(*out.shape, seed=20), "out": out.detach().float(), "softmax_lse": lse.detach().float()}
    values |= {f"d{name}": torch.full_like(values[name], torch.nan) for name in leaves}
    args, kwargs = bind(upstream_signature(call), call, values.__getitem__)
    presented(call)(*args, **kwargs)
    grads = torch.autograd.grad(out, leaves.values(), values["dout"].double())
    for name, exact in zip(leaves, grads, strict=True):
        assert_close(values[f"d{name}"], exact, scale=10)
