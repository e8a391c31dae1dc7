"""Attention kernels of other projects, unmodified, against float64. METAL_HOST_SOURCES names a folder with their
checkouts: mlx, candle, ggml (llama.cpp's kernels); what is not there is skipped."""

import math

import pytest
import torch

from metal_host import observe

from .public_sources import MARKS, NAMES, check, inputs, library, reference, structure

pytestmark = MARKS


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
