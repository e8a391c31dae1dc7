"""Kernels of other projects on MetalPerformancePrimitives, unmodified, against float64.

A kernel that moves registers by a layout which it knows must be right under that one and wrong under the others; one that
asks for every element's place must be right under all. METAL_HOST_SOURCES names a folder with checkouts `mlx` and
`kernels-community`, and `mtlflashattn`, the wheel of 0.2 unpacked; METAL_HOST_TORCH_INCLUDE the headers of a torch that has
MppAttention.h, from 2.14. What is not there is skipped."""

import ast
import math

import pytest
import torch

from metal_host import KernelFault, compile_shader, layouts, observe

from . import test_public_sources, test_torch_kernels
from .public_sources import MARKS, NAMES, SOURCES, TOLERANCE, inputs, library, reference, structure

MPP_ATTENTION = "ATen/native/mps/kernels/MppAttention.h"
LAYOUTS = [*layouts.NAMES, 0, 1, 2, 3]
DRAWN_ALIKE = [1, 3]  # with destinations that may be operands: half of the seeds


def check_layouts(run, expected, tolerance, right):
    """run(): its result in the current layout. It must be right in the layouts `right`, and in no others."""
    for layout in LAYOUTS:
        try:
            with observe(layout=layout, allow_partial_collectives=True):
                got = run()
        except KernelFault as fault:
            assert layout not in right, fault
            continue
        error = (got.double() - expected).abs().max().item()
        found_right = error < tolerance * max(1.0, expected.abs().max().item())  # false for NaN
        assert found_right == (layout in right), (layout, error)


@pytest.fixture(scope="module")
def mpp_attention():
    header = test_torch_kernels.HEADER + f"#include <{MPP_ATTENTION}>\n"
    return compile_shader(header, version="4.0", kernels=[])


@pytest.mark.metal_full
@test_torch_kernels.needs(MPP_ATTENTION)
@pytest.mark.parametrize("kind", ["plain", "causal", "same", "bool"])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["a10", "a9"])
def test_mpp_attention(mpp_attention, family, dtype, d, kind):
    mask = kind if kind in ("same", "bool") else "none"
    causal = kind == "causal"
    case = test_torch_kernels.Case(dtype, d, 70, 75, causal, mask, heads=(2, 1))
    problem = test_torch_kernels.Problem(case, "cpu")
    name = NAMES[dtype]
    features = f"hm{int(mask != 'none')}_dc{int(causal)}_mask{'bool_' if mask == 'bool' else name}"
    kernel_name = f"prefill_attention_mpp_{family}_{name}_bq64_bk32_bd{d}_wm4_wn1_{features}"
    q, k, v, out = problem.q, problem.k, problem.v, problem.out
    fields = {"B": 1, "H": 2, "D": d, "qL": 70, "kL": 75, "gqa_factor": 2, "scale": problem.scale, "softcapping": 1.0}
    fields |= {n: list(t.stride()[:3]) for n, t in (("Q", q), ("K", k), ("V", v), ("O", out))}
    masked = problem.mask if problem.mask is not None else torch.zeros(1, 1, 1, 1)
    mask_fields = structure({"M": list(masked.stride())})
    with observe():
        kernel = getattr(mpp_attention, kernel_name)

    def run():
        out.fill_(math.nan)
        grid = {"threads": (2 * 128, 2, 1), "group_size": (128, 1, 1)}
        kernel(q, k, v, out, structure(fields), mask_fields, masked, **grid)
        return out

    known = {"a10": "apple10", "a9": "legacy"}[family]
    check_layouts(run, problem.expected(), test_torch_kernels.TOLERANCE[dtype], [known])


NAX = "mlx/mlx/backend/metal/kernels/steel/attn/kernels/steel_attention_nax.metal"
RELAXED = TOLERANCE | {torch.float32: 5e-3}  # float operands in relaxed precision


def _marked(function):
    for mark in MARKS:
        function = mark(function)
    return function


@_marked
@pytest.mark.parametrize("kind", ["plain", "causal", "add", "bool", "sinks"])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mlx_steel_attention_nax(dtype, d, kind):
    queries, keys = (64, 64) if kind == "plain" else (45, 70)
    q, k, v = inputs(dtype, 2, 1, queries, keys, d)
    mask = sinks = None
    if kind == "add":
        mask = torch.randn(1, 2, queries, keys).to(dtype)
    if kind == "bool":
        mask = torch.rand(1, 2, queries, keys) < 0.7
        mask[..., 0] = True
    if kind == "sinks":
        sinks = torch.randn(2).to(dtype)
    constants = {200: queries % 64 == 0, 201: keys % 32 == 0, 300: mask is not None, 301: kind == "causal"}
    lib = library(NAX, "mlx", constants | {302: sinks is not None}, [])
    split = d == 256
    name = f"steel_attention_{'dsplit_' * split}{NAMES[dtype]}_bq64_bk32_bd{d}_wm4_wn{1 + split}"
    out = torch.zeros_like(q)
    params = structure(test_public_sources.attention_params(q, k, v, out, 64, 32))
    mask_params = structure({"M": list(mask.stride()[:3])}) if mask is not None else None
    with observe():
        kernel = getattr(lib, f"{name}_mask{'bool_' if kind == 'bool' else NAMES[dtype]}")

    def run():
        out.fill_(math.nan)
        group = (32, 4, 1 + split)
        grid = (-(-queries // 64) * 32, 2 * 4, 1 + split)
        kernel(q, k, v, out, params, mask_params, mask, sinks, threads=grid, group_size=group)
        return out

    expected = reference(q, k, v, kind == "causal", mask, sinks)
    check_layouts(run, expected, RELAXED[dtype], ["apple10"])


@_marked
@pytest.mark.parametrize("form", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mlx_steel_gemm_nax(dtype, form):
    m, n, k = 70, 90, 300
    constants = {10: False, 100: False, 110: False, 200: False, 201: False, 202: False}
    path = "mlx/mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused_nax.metal"
    lib = library(path, "mlx", constants, [])
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    stored = [(x.T if f == "t" else x).contiguous() for x, f in zip((a, b), form, strict=True)]
    out = torch.zeros(m, n, dtype=dtype)
    fields = {"M": m, "N": n, "K": k, "lda": stored[0].stride(0), "ldb": stored[1].stride(0), "ldd": n}
    fields |= {"tiles_n": -(-n // 64), "tiles_m": -(-m // 64), "a": ("int64", 0), "b": ("int64", 0), "d": ("int64", 0)}
    params = structure(fields | {"swizzle_log": 0, "gemm_k_iterations_aligned": k // 256, "batch_ndim": 0})
    with observe():
        kernel = getattr(lib, f"steel_gemm_fused_nax_{form}_{NAMES[dtype]}_{NAMES[dtype]}_bm64_bn64_bk256_wm2_wn2")

    def run():
        out.fill_(math.nan)
        grid = (32 * fields["tiles_n"], 2 * fields["tiles_m"], 2)
        kernel(*stored, None, out, params, None, None, None, threads=grid, group_size=(32, 2, 2))
        return out

    check_layouts(run, a.double() @ b.double(), RELAXED[dtype], ["apple10"])


@_marked
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_quantised_gemm_nax(dtype):
    """Hugging Face's copy of MLX's product with weights of 8 bits."""
    m, n, k, group = 50, 128, 128, 64
    path = "kernels-community/mlx-quantization-metal-kernels/quantization_mlx/quantized_nax.metal"
    lib = library(path, "kernels-community", {}, [])
    x, w = torch.randn(m, k).to(dtype), torch.randint(0, 256, (n, k), dtype=torch.uint8)
    scales, biases = (torch.rand(n, k // group) / 100).to(dtype), (torch.randn(n, k // group) / 10).to(dtype)
    out = torch.zeros(m, n, dtype=dtype)
    kind = {torch.float32: "float", torch.float16: "float16_t", torch.bfloat16: "bfloat16_t"}[dtype]
    with observe():
        kernel = getattr(lib, f"affine_qmm_t_nax_{kind}_gs_64_b_8_bm64_bn64_bk64_wm2_wn2_alN_true_batch_0")
    unused = [0, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)]

    def run():
        out.fill_(math.nan)
        grid = {"threads": (32 * n // 64, 2, 2), "group_size": (32, 2, 2)}
        casts = dict.fromkeys((5, 6, 7, 8, 11), "int32")
        arguments = [w, scales, biases, x, out, k, n, m, *unused, *unused, unused[2], unused[2]]
        kernel(*arguments, **grid, arg_casts=casts)
        return out

    weights = w.double().reshape(n, -1, group) * scales.double()[..., None] + biases.double()[..., None]
    check_layouts(run, x.double() @ weights.reshape(n, k).T, RELAXED[dtype], ["apple10"])


def mtlflashattn(kernel: str, d: int):
    """The string of the package's source that holds `kernel`, for head dim d."""
    path = SOURCES / "mtlflashattn/metal_flash_attn/_kernel.py"
    if not path.is_file():
        pytest.skip("mtlflashattn is not there")
    nodes = ast.walk(ast.parse(path.read_text()))
    strings = (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    source = next(s for s in strings if f"kernel void {kernel}(" in s)
    return compile_shader(source.replace("@D@", str(d)).replace("@SR@", "16"), version="4.0", kernels=[kernel])


@_marked
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("variant", ["v2", "v2r"])
def test_mtlflashattn_tensor_ops(variant, d, causal):
    """v2 asks for every place and takes P through threadgroup memory; v2r hands P over in registers, which its host allows
    where the device says that the two layouts are compatible."""
    heads, heads_k, queries, keys = 2, 1, 70, 85
    q, k, v = inputs(torch.float16, heads, heads_k, queries, keys, d)
    with observe():
        kernel = getattr(mtlflashattn(f"flash_attn_fwd_{variant}", d), f"flash_attn_fwd_{variant}")
    out = torch.zeros_like(q)
    rows = 32 if variant == "v2" else 64
    padded = keys if variant == "v2" else -(-keys // 32) * 32
    stored_k, stored_v = (torch.nn.functional.pad(x, (0, 0, 0, padded - keys)) for x in (k, v))
    sizes = torch.tensor([1, heads, heads_k, queries, keys, causal, padded], dtype=torch.int32)
    numbers = torch.tensor([1 / math.sqrt(d), 0.0, -1.0, -1.0, 0.0])

    def run():
        out.fill_(math.nan)
        grid = {"threads": (-(-queries // rows) * 128, heads, 1), "group_size": (128, 1, 1)}
        kernel(q, stored_k, stored_v, out, sizes, numbers, torch.zeros(heads), **grid)
        return out

    right = LAYOUTS if variant == "v2" else [*layouts.NAMES, *DRAWN_ALIKE]
    check_layouts(run, reference(q, k, v, causal), {"v2": 3e-3, "v2r": 2e-2}[variant], right)
