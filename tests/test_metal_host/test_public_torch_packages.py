"""Attention kernels of Hugging Face's kernels-community and of natten_mps, unmodified, against float64.

METAL_HOST_SOURCES names a folder with a checkout `kernels-community` and `natten`, natten_mps's wheel unpacked; what is
not there is skipped."""

import importlib
import math

import pytest
import torch

from metal_host import compile_shader, observe

from .public_sources import MARKS, NAMES, SOURCES, check, inputs, library, reference, structure

pytestmark = MARKS

FLASH_SDPA = "kernels-community/metal-flash-sdpa/sdpa-metal/scaled_dot_product_attention.metal"


def packed(tensors):
    return torch.cat([t[0].transpose(0, 1) for t in tensors]).contiguous()


@pytest.mark.parametrize("kind", ["plain", "causal", "softcap"])
@pytest.mark.parametrize("d", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_flash_sdpa(dtype, d, kind):
    if d == 256 and dtype == torch.float32:
        pytest.skip("it wants more threadgroup memory than Metal has")
    bq, bk, wm = (16, 8, 2) if d == 256 else (32, 16, 4) if d == 128 else (32, 32, 4)
    heads, heads_k, softcap = 4, 2, 20.0 if kind == "softcap" else 1.0
    lengths = [(45, 70), (32, 32), (1, 9)]
    sequences = [inputs(dtype, heads, heads_k, *n, d) for n in lengths]
    q, k, v = (packed(t) for t in zip(*sequences, strict=True))
    out = torch.zeros_like(q)
    starts = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in zip(*lengths, strict=True)]
    most_q, most_k = 45, 70
    fields = {"B": 3, "H": heads, "D": d, "qL": most_q, "kL": most_k, "gqa_factor": heads // heads_k}
    fields |= {"scale": 1 / math.sqrt(d), "softcapping": softcap, "NQ": -(-most_q // bq), "NK": -(-most_k // bk)}
    fields |= {"NQ_aligned": 0, "NK_aligned": 0, "qL_rem": 0, "kL_rem": 0, "qL_off": 0}
    fields |= {f"{n}_strides": [0, 0, 0] for n in "QKVO"}
    fields |= {"total_q": len(q), "total_k": len(k), "max_q": most_q, "max_k": most_k}
    lib = library(FLASH_SDPA, "kernels-community", {200: False, 201: False, 300: False, 301: kind == "causal"})
    name = f"steel_attention_{NAMES[dtype]}_bq{bq}_bk{bk}_bd{d}_wm{wm}_wn1_mask{NAMES[dtype]}"
    with observe(allow_partial_collectives=True):
        grid = (-(-most_q // bq) * 32, heads * wm, 3)
        arguments = (q, k, v, out, structure(fields), None, None, *starts)
        getattr(lib, name)(*arguments, threads=grid, group_size=(32, wm, 1))
    # It takes tanh of scores in base 2: what it caps at is ln 2 times what it was given.
    cap = softcap * math.log(2) if kind == "softcap" else 0.0
    expected = [reference(*t, kind == "causal", softcap=cap) for t in sequences]
    check(out, packed(expected), dtype)


PAGED = "kernels-community/paged-attention/paged-attention-metal/attention/paged_attention.metal"


@pytest.mark.parametrize("partition", [0, 512])
@pytest.mark.parametrize(("d", "page"), [(64, 16), (128, 8), (256, 32)])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_paged_attention(dtype, d, page, partition):
    heads, heads_k, lengths = 4, 2, [700, 33]
    kind = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16_t"}[dtype]
    sequences = [inputs(dtype, heads, heads_k, 1, n, d) for n in lengths]
    pages = [-(-n // page) for n in lengths]
    table = torch.zeros(2, max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).int()
    x = 16 // dtype.itemsize
    k_cache = torch.zeros(sum(pages), heads_k, d // x, page, x, dtype=dtype)
    v_cache = torch.zeros(sum(pages), heads_k, d, page, dtype=dtype)
    for i, (_, k, v) in enumerate(sequences):
        table[i, : pages[i]] = order[sum(pages[:i]) : sum(pages[: i + 1])]
        for t in range(lengths[i]):
            at, row = int(table[i, t // page]), t % page
            k_cache[at, :, :, row] = k[0, :, t].view(heads_k, d // x, x)
            v_cache[at, :, :, row] = v[0, :, t]
    q = torch.stack([s[0][0, :, 0] for s in sequences])
    out = torch.zeros_like(q)
    parts = -(-max(lengths) // partition) if partition else 1
    sums, maxima = torch.zeros(2, heads, parts), torch.zeros(2, heads, parts)
    partial = torch.zeros(2, heads, parts, d, dtype=dtype)
    context = torch.tensor(lengths, dtype=torch.int32)
    lib = library(PAGED, "kernels-community", {10: bool(partition), 20: False, 30: False}, kernels=[])
    name = f"paged_attention_{kind}_cache_{kind}_hs{d}_bs{page}_nt256_nsl32_ps{partition}"
    unread = torch.zeros(1)  # scales of an fp8 cache, ALiBi's slopes
    numbers = (heads_k, 1 / math.sqrt(d), 1.0)
    strides = (q.stride(0), k_cache.stride(0), k_cache.stride(1))
    arguments = [
        sums,
        maxima,
        partial if partition else out,
        q,
        k_cache,
        v_cache,
        unread,
        unread,
        *numbers,
        table,
        context,
    ]
    arguments += [table.shape[1], unread, *strides]
    bytes_needed = max((partition or -(-max(lengths) // page) * page) * 4, 8 // 2 * d * 4)
    casts = {8: "int32", 13: "int32", 15: "int32", 16: "int32", 17: "int32"}
    with observe(allow_partial_collectives=True):
        grid = {"threads": (heads * 256, 2, parts), "group_size": (256, 1, 1)}
        getattr(lib, name)(*arguments, **grid, arg_casts=casts, threadgroup_bytes={0: bytes_needed})
        if partition:
            reduce = getattr(lib, f"paged_attention_v2_reduce_{kind}_hs{d}_nt256_nsl32_ps{partition}")
            grid["threads"] = (heads * 256, 2, 1)
            arguments = [out, sums, maxima, partial, context, parts]
            reduce(*arguments, **grid, arg_casts={5: "int32"}, threadgroup_bytes={0: 2 * 4 * parts})
    check(out, torch.stack([reference(*s)[0, :, 0] for s in sequences]), dtype)


@pytest.mark.parametrize(("queries", "cached", "window"), [(5, 0, 1000), (3, 40, 1000), (3, 40, 16)])
def test_gpt_oss(queries, cached, window):
    heads, heads_k, d = 64, 8, 64
    keys = cached + queries
    q, k, v = inputs(torch.float32, heads, heads_k, queries, keys, d)
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(1)).bfloat16()
    kv = torch.stack([k[0], v[0]], 2).contiguous()  # (heads_k, keys, 2, d)
    qkv = torch.zeros(queries, (heads + 2 * heads_k) * d)
    qkv[:, : heads * d] = q[0].transpose(0, 1).reshape(queries, -1) / math.sqrt(d)  # it has no scale of its own
    out = torch.zeros(queries, heads * d)
    fields = {"qkv_dim": qkv.shape[1], "num_kv_tokens": cached, "kv_stride": kv.stride(0), "window": window}
    lib = library("kernels-community/gpt-oss-metal-kernels/gptoss_kernels/source/sdpa.metal", "kernels-community", {})
    simdgroups = 4
    arguments = [structure(fields), qkv, kv, sinks, out, None, structure({"abort": 0})]
    with observe(allow_partial_collectives=True):
        lib.gptoss_f32_sdpa_q8_d64(
            *arguments,
            threads=(queries * simdgroups * 32, heads_k, 1),
            group_size=(simdgroups * 32, 1, 1),
            threadgroup_bytes={0: simdgroups * 32 * 8 * 4 * 4},
        )
    position = cached + torch.arange(queries)[:, None]
    seen = (torch.arange(keys) <= position) & (torch.arange(keys) > position - window)
    expected = reference(q, k, v, mask=seen.expand(1, heads, queries, keys), sinks=sinks)
    check(out, expected[0].transpose(0, 1).reshape(queries, -1), torch.float32)


@pytest.fixture
def natten(monkeypatch):
    folder = SOURCES / "natten"
    if not folder.is_dir():
        pytest.skip("natten is not there")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(torch.mps, "compile_shader", lambda text: compile_shader(text, version="3.2"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    package = importlib.import_module("natten_mps")
    monkeypatch.setattr(importlib.import_module("natten_mps._core.metal"), "_on_mps", lambda *tensors: True)
    package.set_backend("metal")
    return package


def neighbours(length, kernel, dilation, causal):
    """(queries, keys): which keys a query of one axis sees."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        same = torch.arange(i % dilation, length, dilation)
        at = i // dilation
        first = at - kernel + 1 if causal else min(max(at - kernel // 2, 0), len(same) - kernel)
        seen[i, same[max(first, 0) : (at + 1 if causal else first + kernel)]] = True
    return seen


@pytest.mark.parametrize(("kernel", "dilation", "causal"), [(7, 1, False), (5, 2, False), (5, 1, True), (3, 3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", [(37,), (11, 9), (7, 9, 10)], ids=["1d", "2d", "3d"])
def test_natten(natten, shape, dtype, kernel, dilation, causal):
    kernel, dilation = (min(kernel, 3), min(dilation, 2)) if len(shape) == 3 else (kernel, dilation)
    if any(kernel * dilation > n for n in shape):
        pytest.skip("a window wider than the input")
    keys = math.prod(shape)
    q, k, v = (t.transpose(1, 2).reshape(1, *shape, 2, 32) for t in inputs(dtype, 2, 2, keys, keys, 32))
    attention = getattr(natten, f"na{len(shape)}d")
    with observe(allow_partial_collectives=True) as launches:
        out = attention(q, k, v, kernel_size=kernel, dilation=dilation, is_causal=causal)
    assert launches
    seen = torch.ones(1, 1, dtype=torch.bool)
    for n in shape:
        axis = neighbours(n, kernel, dilation, causal)
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).reshape(len(seen) * n, -1)
    heads_first = [t.reshape(1, keys, 2, 32).transpose(1, 2) for t in (q, k, v)]
    check(out.reshape(1, keys, 2, 32).transpose(1, 2), reference(*heads_first, mask=seen[None, None]), dtype)
