"""Kernels on cooperative tensors as PTX on an NVIDIA GPU: are they right, and how fast are other projects'.

    METAL_HOST_SOURCES=FOLDER python bench/nvidia_tensor_ops.py prepare DIRECTORY     anywhere, with the test extra
    python bench/nvidia_tensor_ops.py run DIRECTORY       on a machine with a GPU, torch and ptxas; needs no compiler

`run` multiplies in every form that the tests have (types, transposes, operands in memory and in registers, one
simdgroup and four), reduces, and compares with float64; then it times MLX's `steel_attention_nax` (a checkout `mlx`
in FOLDER) and PyTorch's `MppAttention.h` (of the installed torch, or of METAL_HOST_TORCH_INCLUDE), where `prepare`
found them. Times rank no kernels for a Mac: the tensor cores take other fragments, and right operands are exchanged
between lanes (metal_host/include/msl/nvptx_matmul2d.h).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvidia_forward as forward
import torch

from metal_host import nvidia

HEADS = 16
TYPES = {
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
    "char": torch.int8,
    "int": torch.int32,
}
# Relative to the largest result: the rounding of its type; of floats that were split into two bfloats.
BOUNDS = {"half": 2e-3, "bfloat": 1e-2, "float": 1e-6, "int": 0.0}
SPLIT = 2e-4
NAX = "mlx/mlx/backend/metal/kernels/steel/attn/kernels/steel_attention_nax.metal"
MPP = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
MPP += "#include <ATen/native/mps/kernels/MppAttention.h>\n"
TIMED = list(itertools.product(("float16", "bfloat16"), (64, 128), (False, True)))  # type, head dim, causal


def products() -> list[tuple[str, list, list]]:
    """(name, [m, n, k, transpose left, transpose right, add], types of left, right and destination)."""
    forms = list(itertools.product((False, True), repeat=3))
    shapes = [[*size, *form] for size in ((16, 32, 16), (32, 32, 32), (32, 16, 32)) for form in forms]
    types = ["bfloat bfloat float", "float half float", "float bfloat float", "float float float", "half bfloat float"]
    types += ["char char int", "char half half", "bfloat half bfloat"]
    cases = [(shape, ["half", "half", "float"]) for shape in shapes]
    cases += [([16, 32, 16, False, b, True], t.split()) for t in types for b in (False, True)]
    return [(f"product{i}", *case) for i, case in enumerate(cases)]


def gemms() -> list[tuple[str, list]]:
    """(name, template arguments of the tests' GEMM): scope, k of a tile, transposes, into registers, in steps of k."""
    scopes = ("execution_simdgroup", "execution_simdgroups<4>")
    cases = itertools.product(scopes, (0, 16), (False, True), (False, True), (False, True))
    return [(f"gemm{i}", [*case, case[1] > 0]) for i, case in enumerate(cases)]


def prepare(directory: Path) -> None:
    from metal_host import compile_shader
    from tests.test_metal_host import test_cooperative_tensors, test_tensors

    directory.mkdir(parents=True, exist_ok=True)
    entries = {}

    def write(library, name: str, kernel: str, threads: int) -> None:
        module = library.module(kernel)
        entries[name] = module.entries[kernel]
        (directory / f"{name}.ptx").write_text(nvidia.for_group(module.ptx, threads))

    def compiled(source: str, **options):
        return compile_shader(source, version="4.0", kernels=[], **options)

    cooperative = test_cooperative_tensors
    library = compiled(cooperative.PRODUCT + cooperative.instantiate(*products()))
    for name, *_ in products():
        write(library, name, name, 32)
    library = compiled(test_tensors.GEMM + test_tensors.instantiate(*gemms()))
    for name, case in gemms():
        write(library, name, name, test_tensors.SCOPES[case[0]])
    write(compiled(test_tensors.SOFTMAX), "softmax", "softmax", 32)

    path = Path(os.environ.get("METAL_HOST_SOURCES", "/nonexistent")) / NAX
    for kind, d, causal in TIMED if path.is_file() else []:
        constants = {200: True, 201: True, 300: False, 301: causal, 302: False}
        library = compiled(path.read_text(), constants=constants, include=path.parents[:8])
        kernel = f"steel_attention_{kind}_bq64_bk32_bd{d}_wm4_wn1_mask{kind}"
        write(library, f"mlx_{kind}_{d}_{int(causal)}", kernel, 128)
    try:
        library = compiled(MPP)
    except SyntaxError:
        print("no MppAttention.h")
    else:
        for kind, d, causal in TIMED:
            kernel = f"prefill_attention_mpp_a10_{kind}_bq64_bk32_bd{d}_wm4_wn1_hm0_dc{int(causal)}_mask{kind}"
            write(library, f"torch_{kind}_{d}_{int(causal)}", kernel, 128)
    (directory / "entries.json").write_text(json.dumps(entries))
    print(f"{len(entries)} kernels")


def values(rows: int, columns: int, kind: str) -> torch.Tensor:
    if kind == "char":
        return torch.randint(-100, 100, (rows, columns), dtype=torch.int8, device="cuda")
    return (
        torch.randint(-100, 100, (rows, columns), dtype=torch.int32, device="cuda")
        if kind == "int"
        else (torch.randn(rows, columns, device="cuda").to(TYPES[kind]))
    )


def multiplied(kernel: forward.Kernel, shape: list, types: list) -> float:
    """The error of a product, as a part of what is allowed."""
    m, n, k, left, right, add = shape
    a, b, c = (values(r, s, t) for (r, s), t in zip(((m, k), (k, n), (m, n)), types, strict=True))
    expected = a.double() @ b.double() + (c.double() if add else 0)
    stored = [(x.T if transposed else x).contiguous() for x, transposed in ((a, left), (b, right))]
    kernel.launch([*stored, c], (32, 1, 1), 32)()
    split = "float" in types[:2] or set(types[:2]) == {"half", "bfloat"}
    bound = max(BOUNDS[types[2]], SPLIT if split else 0) * expected.abs().max().item()
    error = (c.double() - expected).abs().max().item()
    return error / bound if bound else float(error != 0)


def in_memory(kernel: forward.Kernel, case: list, sizes: tuple[int, int, int]) -> float:
    scope, tile, left, right, _, steps = case
    m, n = sizes[:2]
    k = sizes[2] if not tile else 48 if steps else tile
    a, b, c = values(m, k, "half"), values(k, n, "half"), torch.zeros(m, n, device="cuda")
    stored = [(x.T if transposed else x).contiguous() for x, transposed in ((a, left), (b, right))]
    threads = 128 if "<4>" in scope else 32
    lengths = torch.tensor([m, n, k], dtype=torch.int32, device="cuda")
    kernel.launch([*stored, c, lengths], (-(-n // 32) * threads, -(-m // 32), 1), threads)()
    error = (c.double() - a.double() @ b.double()).abs().max().item()
    return error / (1e-6 * k)


def reduced(kernel: forward.Kernel) -> float:
    a, b, v = (values(rows, 32, "half") for rows in (16, 32, 32))
    out, columns = torch.zeros(16, 32, device="cuda"), torch.zeros(32, device="cuda")
    path = torch.zeros(2, dtype=torch.int32, device="cuda")
    kernel.launch([a, b, v, out, columns, path], (32, 1, 1), 32)()
    p = (a.double() @ b.double().T).softmax(-1)
    errors = [(out.double() - p @ v.double()).abs().max(), (columns.double() - p.sum(0)).abs().max()]
    return max(errors).item() / 5e-3 if path.tolist() == [1, 1] else math.nan


def attention(kernel: forward.Kernel, project: str, q, k, v, out):
    """`(batch, heads, length, head dim)` each; MLX's and PyTorch's parameters."""
    batch, heads, length, d = q.shape
    numbers = [batch, heads, d, length, length, heads // k.shape[1]]
    ints = torch.tensor(numbers, dtype=torch.int32)
    scale = torch.tensor([d**-0.5, 1.0][: 2 if project == "torch" else 1])
    blocks = torch.tensor([length // 64, length // 32, length // 64, length // 32, 0, 0, 0], dtype=torch.int32)
    strides = torch.tensor([s for t in (q, k, v, out) for s in t.stride()[:3]])
    parts = [ints, scale, strides] if project == "torch" else [ints, scale, blocks, strides]
    parameters = torch.cat([part.view(torch.uint8) for part in parts]).cuda()
    nothing = torch.zeros(64, device="cuda")
    grid = (length // 64 * 128, heads, batch)
    return kernel.launch([q, k, v, out, parameters, nothing, nothing, nothing], grid, 128)


def run(directory: Path) -> None:
    nvidia._driver()
    entries = json.loads((directory / "entries.json").read_text())
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: forward.Kernel(directory, name, entries[name], None), entries)
        kernels = {kernel.name: kernel for kernel in made}
    print(torch.cuda.get_device_name(), flush=True)
    torch.manual_seed(0)
    found = {f"{name} {shape} {types}": multiplied(kernels[name], shape, types) for name, shape, types in products()}
    for (name, case), sizes in itertools.product(gemms(), ((32, 32, 32), (40, 21, 50))):
        found[f"{name} {case} {sizes}"] = in_memory(kernels[name], case, sizes)
    found["softmax"] = reduced(kernels["softmax"])
    wrong = {name: error for name, error in found.items() if not error <= 1}
    print(f"{len(found) - len(wrong)} of {len(found)} products and reductions are right", flush=True)
    for name, error in wrong.items():
        print(f"  {name}: {error:.3g} times what is allowed")
    for length, (kind, d, causal) in itertools.product((2048, 8192), TIMED):
        dtype = getattr(torch, kind)
        q, k, v = (torch.randn(1, h, length, d, device="cuda", dtype=dtype) for h in (HEADS, HEADS // 2, HEADS // 2))
        launches, outs = {}, {}
        for project in ("mlx", "torch"):
            if kernel := kernels.get(f"{project}_{kind}_{d}_{int(causal)}"):
                outs[project] = torch.empty_like(q)
                launches[project] = attention(kernel, project, q, k, v, outs[project])
        if not launches:
            continue
        times = forward.median_ms(launches)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        flops = 4 * HEADS * length * length * d / (2 if causal else 1)
        for project, milliseconds in times.items():
            kernel = kernels[f"{project}_{kind}_{d}_{int(causal)}"]
            differ = (outs[project].float() - expected.float()).abs().max().item()
            speed = f"{flops / milliseconds / 1e9:6.1f} TF/s"
            what = f"{kind:8} D{d:<3} {'causal' if causal else 'full':6} L{length:<5} {project:5}"
            print(f"{what} {speed} ({kernel.resources()}) differ {differ:.0e}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("prepare", "run"):
        raise SystemExit(__doc__)
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
