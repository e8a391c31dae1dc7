"""Attention kernels of other projects, unmodified, against float64. METAL_HOST_SOURCES names a folder with their
checkouts: mlx, candle, ggml (llama.cpp's kernels), kernels-community; what is not there is skipped."""

import ctypes
import math
import os
from pathlib import Path

import pytest
import torch

from metal_host import compile_shader, observe

SOURCES = Path(os.environ.get("METAL_HOST_SOURCES", "/nonexistent"))
pytestmark = [
    pytest.mark.metal_full,
    pytest.mark.skipif(not SOURCES.is_dir(), reason="METAL_HOST_SOURCES is not a folder"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def library(path: str, root: str, constants: dict, kernels: list[str] | None = None, text=lambda t: t):
    file = SOURCES / path
    if not file.is_file():
        pytest.skip(f"{path} is not there")
    include = [SOURCES / root, file.parent, *file.parents[:4]]
    source = text(file.read_text(encoding="utf-8"))
    return compile_shader(source, constants=constants, version="4.0", include=include, kernels=kernels)


def structure(fields: dict) -> torch.Tensor:
    """A C structure: int is int32, [int] an array of int64, float is float; ("u8", n) an int64."""

    class Layout(ctypes.Structure):
        _fields_ = [
            (
                n,
                ctypes.c_float
                if isinstance(v, float)
                else ctypes.c_int64 * len(v)
                if isinstance(v, list)
                else ctypes.c_int64
                if isinstance(v, tuple)
                else ctypes.c_int32,
            )
            for n, v in fields.items()
        ]

    values = Layout()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(values, name)[:] = value
        else:
            setattr(values, name, value[1] if isinstance(value, tuple) else value)
    return torch.frombuffer(bytearray(bytes(values)), dtype=torch.uint8).clone()


def inputs(dtype, heads, heads_k, queries, keys, d, dv=None):
    g = torch.Generator().manual_seed(queries * keys + d)
    q = torch.randn(1, heads, queries, d, generator=g).to(dtype)
    k = torch.randn(1, heads_k, keys, d, generator=g).to(dtype)
    return q, k, torch.randn(1, heads_k, keys, dv or d, generator=g).to(dtype)


def reference(q, k, v, causal=False, mask=None, sinks=None):
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        rows = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        s = s.masked_fill(torch.arange(k.shape[2]) > rows, -math.inf)
    if mask is not None:
        s = s + mask.double() if mask.dtype != torch.bool else s.masked_fill(~mask, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = s.softmax(-1)
    return (p[..., : v.shape[2]]) @ v


def check(got, expected, dtype):
    error = (got.double() - expected).abs().max().item()
    assert error < TOLERANCE[dtype] * max(1.0, expected.abs().max().item()), error


def attention_params(q, k, v, out, bq, bk):
    """AttnParams of MLX's steel attention."""
    heads, queries, d = q.shape[1:]
    keys = k.shape[2]
    fields = {"B": 1, "H": heads, "D": d, "qL": queries, "kL": keys, "gqa_factor": heads // k.shape[1]}
    fields |= {"scale": 1 / math.sqrt(d), "NQ": -(-queries // bq), "NK": -(-keys // bk)}
    fields |= {"NQ_aligned": queries // bq, "NK_aligned": keys // bk, "qL_rem": queries % bq, "kL_rem": keys % bk}
    fields["qL_off"] = keys - queries
    return fields | {f"{n}_strides": list(t.stride()[:3]) for n, t in (("Q", q), ("K", k), ("V", v), ("O", out))}


STEEL = "mlx/mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.metal"


@pytest.mark.parametrize("kind", ["plain", "causal", "add", "bool", "sinks"])
@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mlx_steel_attention(dtype, d, kind):
    bq, bk = 32, 16 if d > 96 else 32
    queries, keys = (64, 64) if kind == "plain" else (45, 70)
    q, k, v = inputs(dtype, 4, 2, queries, keys, d)
    out = torch.zeros_like(q)
    mask = sinks = None
    if kind == "add":
        mask = torch.randn(1, 4, queries, keys).to(dtype)
    if kind == "bool":
        mask = torch.rand(1, 4, queries, keys) < 0.7
        mask[..., 0] = True
    if kind == "sinks":
        sinks = torch.randn(4).to(dtype)
    constants = {200: queries % bq == 0, 201: keys % bk == 0, 300: mask is not None, 301: kind == "causal"}
    lib = library(STEEL, "mlx", constants | {302: sinks is not None})
    name = (
        f"steel_attention_{NAMES[dtype]}_bq{bq}_bk{bk}_bd{d}_wm4_wn1_mask{'bool_' if kind == 'bool' else NAMES[dtype]}"
    )
    params = structure(attention_params(q, k, v, out, bq, bk))
    mask_params = structure({"M": list(mask.stride()[:3])}) if mask is not None else None
    with observe(allow_partial_collectives=True):
        kernel = getattr(lib, name)
        grid = (-(-queries // bq) * 32, 4 * 4, 1)
        kernel(q, k, v, out, params, mask_params, mask, sinks, threads=grid, group_size=(32, 4, 1))
    check(out, reference(q, k, v, kind == "causal", mask, sinks), dtype)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("project", ["mlx", "candle"])
def test_sdpa_vector(project, dtype, d, causal):
    heads, heads_k, keys = 4, 2, 100
    q, k, v = inputs(dtype, heads, heads_k, 1, keys, d)
    out = torch.zeros_like(q)
    strides = [k.stride(1), k.stride(2), v.stride(1), v.stride(2)]
    if project == "mlx":
        constants = {20: False, 21: False, 22: causal, 23: False, 24: False, 25: False, 26: 1}
        lib = library("mlx/mlx/backend/metal/kernels/scaled_dot_product_attention.metal", "mlx", constants)
        kind = {torch.float32: "float", torch.float16: "float16_t", torch.bfloat16: "bfloat16_t"}[dtype]
        arguments = [q, k, v, out, heads // heads_k, keys, *strides, 1 / math.sqrt(d)]
        casts = {4: "int32", 5: "int32"}
        name, grid = f"sdpa_vector_{kind}_{d}_{d}", (heads * 1024, 1, 1)
    else:
        if causal:
            pytest.skip("candle's has no mask")
        lib = library(
            "candle/candle-metal-kernels/src/metal_src/scaled_dot_product_attention.metal", "candle", {20: False}
        )
        kind = {torch.float32: "float", torch.float16: "float16_t", torch.bfloat16: "bfloat16_t"}[dtype]
        arguments = [q, k, v, out, heads // heads_k, keys, strides[0], strides[2], 1 / math.sqrt(d), 1.0]
        casts = {4: "int32", 5: "int32"}
        name, grid = f"sdpa_vector_{kind}_{d}", (1024, heads, 1)
    with observe(allow_partial_collectives=True):
        getattr(lib, name)(*arguments, threads=grid, group_size=(1024, 1, 1), arg_casts=casts)
    check(out, reference(q, k, v), dtype)


GGML = "ggml/src/ggml-metal/ggml-metal.metal"


def flash_attn_fields(q, k, v, out):
    """ggml_metal_kargs_flash_attn_ext and ..._vec, which are alike; strides in bytes."""

    def strides(t):
        return [("u8", t.stride(i) * t.element_size()) for i in (2, 1, 0)]

    heads, queries, _ = q.shape[1:]
    fields = {"ne01": queries, "ne02": heads, "ne03": 1} | dict(zip(("nb01", "nb02", "nb03"), strides(q), strict=True))
    fields |= {"ne11": k.shape[2], "ne_12_2": k.shape[1], "ne_12_3": 1, "ns10": k.shape[3]}
    fields |= dict(zip(("nb11", "nb12", "nb13"), strides(k), strict=True)) | {"ns20": v.shape[3]}
    fields |= dict(zip(("nb21", "nb22", "nb23"), strides(v), strict=True))
    fields |= {"ne31": 1, "ne32": 1, "ne33": 1, "nb31": ("u8", 2), "nb32": ("u8", 2), "nb33": ("u8", 2)}
    fields |= {"ne1": heads, "ne2": queries, "ne3": 1, "scale": 1 / math.sqrt(q.shape[3]), "max_bias": 0.0}
    return fields | {"m0": 0.0, "m1": 0.0, "n_head_log2": 4, "logit_softcap": 0.0}


def run_flash_attn(base, constants, q, k, v, threads, group, lengths, **options):
    kind = {torch.float32: "f32", torch.float16: "f16"}[k.dtype]
    name = f"{base}_{kind}_dk{k.shape[3]}_dv{v.shape[3]}"
    lib = library(GGML, "ggml/src/ggml-metal", constants, kernels=[])
    out = torch.zeros(q.shape[2], q.shape[1], v.shape[3])
    nothing = torch.zeros(16, dtype=torch.uint8)
    arguments = [structure(flash_attn_fields(q, k, v, out)), q, k, v, nothing, nothing, nothing]
    arguments += [nothing, out] if base.endswith("ext") else [out]
    with observe(allow_partial_collectives=True, **options):
        getattr(lib, name)(*arguments, threads=threads, group_size=group, threadgroup_bytes={0: lengths})
    return out.permute(1, 0, 2)[None]


@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 64), (torch.float16, 128), (torch.float32, 64)])
def test_llama_cpp_flash_attn_ext_vec(dtype, d):
    q, k, v = inputs(torch.float32, 2, 1, 3, 64, d)
    k, v = k.to(dtype), v.to(dtype)
    constants = dict.fromkeys(range(400, 405), False) | {420: d, 421: d, 422: 1, 423: 1}
    padded = -(-d // 128) * 128
    lengths = -(-(padded + 4 * 32 + 2 * padded) * 2 // 16) * 16
    got = run_flash_attn(
        "kernel_flash_attn_ext_vec", constants, q, k, v, (3 * 32, 2, 1), (32, 1, 1), lengths, lockstep=True
    )
    check(got, reference(q, k, v), torch.float16)


@pytest.mark.parametrize("d", [64, 128])
def test_llama_cpp_flash_attn_ext(d):
    q, k, v = inputs(torch.float32, 2, 1, 13, 128, d)
    k, v = k.half(), v.half()
    constants = dict.fromkeys(range(300, 305), False) | {310: False, 320: d, 321: d, 322: 4}
    lengths = -(-(8 * (d + 2 * d + 4 * 64)) * 2 // 16) * 16
    got = run_flash_attn(
        "kernel_flash_attn_ext", constants, q, k, v, (2 * 32, 2 * 4, 1), (32, 4, 1), lengths, lockstep=True
    )
    check(got, reference(q, k, v), torch.float16)
