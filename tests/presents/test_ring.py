"""Ring attention through the shim: ring-flash-attn and yunchang themselves, over processes joined by gloo.

What the processes compute together, put back in order, is compared with the fp64 reference, and with one process.
"""

import functools

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func

from ..attention import oracle
from . import ring

WORLDS = pytest.mark.parametrize("world_size", [2, 4])
# No float32: both packages add to a gradient's float32 copy, which then is the buffer of the next gradient itself.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
NAMES = ("out", "lse", "dq", "dk", "dv")


@functools.cache
def reference(lengths, causal, dtype, heads_k):
    """out, lse, dq, dk, dv of the whole batch in fp64."""
    q, k, v, dout = (tensor.double() for tensor in ring.draw(dtype, lengths, heads_k))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    cu_seqlens = ring.ends(lengths)
    out, lse, _ = oracle.varlen(*leaves, cu_seqlens, cu_seqlens, causal=causal)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


@functools.cache
def on_one_process(lengths, causal, dtype, heads_k):
    *leaves, dout = ring.draw(dtype, lengths, heads_k)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    if len(set(lengths)) == 1:
        batch = [tensor.unflatten(0, (len(lengths), -1)) for tensor in leaves]
        out, lse, _ = flash_attn_func(*batch, causal=causal, return_attn_probs=True)
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    else:
        about = (ring.ends(lengths), ring.ends(lengths), max(lengths), max(lengths))
        out, lse, _ = flash_attn_varlen_func(*leaves, *about, causal=causal, return_attn_probs=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


def together(parts, like):
    """The tokens of all the processes in order; each of them is there once."""
    tokens = torch.cat([part[0] for part in parts])
    assert torch.equal(tokens.sort().values, torch.arange(len(tokens)))
    order = tokens.argsort()
    whole = []
    for n, expected in enumerate(like, 1):
        if parts[0][n] is None:
            whole.append(None)
            continue
        rows = 1 if n == 2 else 0  # lse is (heads, tokens)
        whole.append(torch.cat([part[n] for part in parts], rows).index_select(rows, order))
        assert whole[-1].shape == expected.shape
    return whole


def check(parts, lengths, causal, dtype, heads_k, dq_dtype=None):
    """What is merged was rounded to `dtype` each time: a few units in the last place of the greatest.

    In float32, the rounding of a sum of a hundred products counts too. The log-sum-exp is not rounded, but the kernel
    that PyTorch has for short types on the CPU takes an exp of 20 bits.
    """
    units = 16 if dtype == torch.float32 else 4
    expected = reference(lengths, causal, dtype, heads_k)
    alone = on_one_process(lengths, causal, dtype, heads_k)
    computed = together(parts, expected)
    eps = dict.fromkeys(NAMES, torch.finfo(dtype).eps)
    eps["lse"] = min(eps["lse"], 2**-18)
    if dq_dtype is not None:
        eps["dq"] = torch.finfo(dq_dtype).eps
    for name, value, exact, single in zip(NAMES, computed, expected, alone, strict=True):
        if value is None:
            continue
        unit = eps[name] * exact.abs().max().item()
        for other in (exact, single.double()):
            error = (value.double() - other).abs().max().item()
            assert error <= units * unit, f"{name}: {error / unit:.1f} units"


# The layout of the tokens, whether sequences are packed, whether a causal mask is needed, and the lengths.
FAMILIES = {
    "ring": ("ring", False, False, ring.DENSE),
    "zigzag": ("zigzag", False, True, ring.DENSE),
    "stripe": ("stripe", False, True, ring.DENSE),
    "ring varlen": ("ring", True, False, ring.PACKED),
    "zigzag varlen": ("zigzag", True, True, ring.PACKED),
    "llama3 varlen": ("llama3", True, False, ring.RAGGED),
}
CASES = [(name, causal) for name, family in FAMILIES.items() for causal in ((True,) if family[2] else (False, True))]


@WORLDS
@DTYPES
@pytest.mark.parametrize("form", ["", "_kvpacked", "_qkvpacked"])
@pytest.mark.parametrize(("family", "causal"), CASES)
def test_ring_flash_attn(pool, world_size, family, causal, form, dtype):
    layout, is_varlen, _, lengths = FAMILIES[family]
    heads_k = ring.HEADS if form == "_qkvpacked" else 2
    parts = pool.run(world_size, ring.attend_ring, layout, is_varlen, form, causal, dtype, lengths, heads_k)
    # The package returns the dq of plain ring attention as bfloat16, whatever the dtype of q.
    dq_dtype = torch.bfloat16 if layout == "ring" else None
    check(parts, lengths, causal, dtype, heads_k, dq_dtype)


# Over how many processes heads and tokens are spread.
DEGREES = [(1, 2), (1, 4), (2, 2)]


@DTYPES
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize(
    ("kind", "layout", "causal"),
    [
        ("hybrid", "basic", False),
        ("hybrid", "basic", True),
        ("hybrid", "zigzag", True),
        ("hybrid", "strip", True),
        ("qkvpacked", "zigzag", True),  # "basic" lacks an argument of its own function in 0.6.4
        ("qkvpacked", "strip", True),
    ],
)
def test_yunchang(pool, kind, layout, causal, degrees, dtype):
    """Heads over some processes (Ulysses), tokens over others (ring)."""
    heads_k = ring.HEADS if kind == "qkvpacked" else 2
    parts = pool.run(4, ring.attend_yunchang, kind, layout, degrees, causal, dtype, heads_k)
    size = degrees[0] * degrees[1]
    for first in range(0, 4, size):
        dq_dtype = torch.bfloat16 if layout == "basic" else None
        check(parts[first : first + size], ring.DENSE, causal, dtype, heads_k, dq_dtype)


@WORLDS
@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["fa", "fa3"])
def test_yunchang_over_heads_alone(pool, kind, causal, world_size, dtype):
    """Its `UlyssesAttention` with the public functions of FlashAttention 2 and 3."""
    parts = pool.run(4, ring.attend_yunchang, kind, "basic", (world_size, 1), causal, dtype, ring.HEADS)
    for first in range(0, 4, world_size):
        check(parts[first : first + world_size], ring.DENSE, causal, dtype, ring.HEADS)


@WORLDS
@pytest.mark.parametrize("heads_k", [1, 2, ring.HEADS])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [ring.DENSE, ring.PACKED], ids=["dense", "varlen"])
def test_float32(pool, world_size, lengths, causal, heads_k):
    parts = pool.run(world_size, ring.attend_float32, lengths is ring.PACKED, causal, lengths, heads_k)
    check(parts, lengths, causal, torch.float32, heads_k)


@WORLDS
@pytest.mark.parametrize("causal", [False, True])
def test_llama3_in_float32(pool, world_size, causal):
    """The one function of ring-flash-attn that is right in float32: it gathers the keys, and adds nothing up."""
    case = (causal, torch.float32, ring.RAGGED, 2)
    parts = pool.run(world_size, ring.attend_ring, "llama3", True, "", *case)
    check(parts, ring.RAGGED, causal, torch.float32, 2)
