"""Faults planted in correct kernels.

The compiler or an instrumented run must report each, at its line; the kernels as they are must be clean. A fault that
only changes numbers must make the result wrong, so that a test against a reference sees it.
"""

import re
from dataclasses import dataclass

import pytest
import torch

from metal_host import KernelFault, compile_shader, observe

from . import attention

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
TG_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Plant:
    """Replace the `occurrence`-th `old` by `new`; expect `kind`, on the line of the replacement or of `seen_at`.

    kind: a Fault's kind, "compiler", "refused" (when the pipeline is made), or "result".
    """

    name: str
    old: str
    new: str
    kind: str
    seen_at: str = ""
    occurrence: int = 1
    staged: bool = True


def replaced(text: str, plant: Plant) -> str:
    at = -1
    for _ in range(plant.occurrence):
        at = text.index(plant.old, at + 1)
    return text[:at] + plant.new + text[at + len(plant.old) :]


def line_of(text: str, part: str) -> set[int]:
    return {i for i, line in enumerate(text.split("\n"), 1) if part in line}


STAGE_CALL = "    stage(k_tile, k, first_key, seqlen, thread_index);\n"
K_LOAD = "simdgroup_load(k_fragment, k_tile"
V_LOAD = "simdgroup_load(v_fragment, v_tile"
TILE_WRITE = "tile[row * (HEAD_DIM + PAD) + column] ="
ATTENTION = [
    # barriers, of each kind and for each purpose
    Plant("barrier before staging removed", f"    {TG_BARRIER}\n", "\n", "race", TILE_WRITE),
    Plant("barrier after staging removed", f"    {TG_BARRIER}\n", "\n", "race", K_LOAD, occurrence=2),
    Plant(
        "barrier after staging is of a simdgroup",
        TG_BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "race",
        K_LOAD,
        2,
    ),
    Plant("barrier names device memory", "mem_threadgroup", "mem_device", "race", K_LOAD, 2),
    Plant("barrier names no memory", "mem_threadgroup", "mem_none", "race", TILE_WRITE),
    Plant("simdgroup barrier removed", "  simdgroup_barrier(mem_flags::mem_threadgroup);", "", "race", "= o_rows[row"),
    Plant(
        "simdgroup barrier names no memory",
        "simdgroup_barrier(mem_flags::mem_threadgroup)",
        "simdgroup_barrier(mem_flags::mem_none)",
        "race",
        "= o_rows[row",
    ),
    Plant("one tile for K and V", "stage(v_tile, v,", "stage(k_tile, v,", "uninitialised", V_LOAD),
    Plant(
        "output tiles of simdgroups overlap",
        "o_tile + simdgroup * 8 * HEAD_DIM",
        "o_tile + simdgroup * 7 * HEAD_DIM",
        "race",
        "simdgroup_store(result",
    ),
    # divergence
    Plant("barrier under a branch", f"    {TG_BARRIER}", f"    if (simdgroup < 3) {TG_BARRIER}", "divergent barrier"),
    Plant(
        "early return before a barrier",
        "  const Coordinate at = Coordinate",
        "  if (first_row >= seqlen) return;\n  const Coordinate at = Coordinate",
        "divergent barrier",
        TG_BARRIER,
    ),
    Plant(
        "simdgroup barrier under a branch",
        "  simdgroup_barrier(mem",
        "  if (lane < 16) simdgroup_barrier(mem",
        "divergent simdgroup operation",
    ),
    Plant(
        "shuffle under a branch",
        "x = max(x, simd_shuffle_xor(x, 1));",
        "if (x > 0.5f) x = max(x, simd_shuffle_xor(x, 1));",
        "divergent simdgroup operation",
    ),
    Plant(
        "matrix product under a branch",
        "        simdgroup_multiply_accumulate(s[j]",
        "        if (at.row < 7) simdgroup_multiply_accumulate(s[j]",
        "divergent simdgroup operation",
    ),
    Plant(
        "shuffle from a lane that is not there",
        "x += simd_shuffle_xor(x, 1);",
        "x += simd_shuffle(x, ushort(33));",
        "inactive lane",
    ),
    # bounds, on each side
    Plant(
        "rows past the end are read",
        "row < rows ? p[row * HEAD_DIM + column] : half(0)",
        "p[row * HEAD_DIM + column]",
        "out of bounds",
    ),
    Plant("off by one above in staging", "first_row + row < rows ?", "first_row + row <= rows ?", "out of bounds"),
    Plant(
        "off by one above in the output",
        "if (first_row + row < seqlen)",
        "if (first_row + row <= seqlen)",
        "out of bounds",
        "o[(first_row + row)",
    ),
    Plant(
        "off by one above in the log-sum-exp",
        "at.row < seqlen) {",
        "at.row <= seqlen) {",
        "out of bounds",
        "lse[group.y",
    ),
    Plant(
        "off by one below in the input",
        "? p[row * HEAD_DIM + column] : half(0);",
        "? p[row * HEAD_DIM + column - 1] : half(0);",
        "out of bounds",
    ),
    Plant(
        "off by one below in the output",
        "o[(first_row + row) * HEAD_DIM + column]",
        "o[(first_row + row - 1) * HEAD_DIM + column]",
        "out of bounds",
    ),
    Plant(
        "the head's offset counted twice", "  o += head;", "  o += 2 * head;", "out of bounds", "o[(first_row + row)"
    ),
    Plant(
        "the tile is too small",
        "k_tile[BLOCK_K * (HEAD_DIM + PAD)]",
        "k_tile[BLOCK_K * HEAD_DIM]",
        "out of bounds",
        TILE_WRITE,
    ),
    Plant(
        "one byte past the tile",
        "v_tile[BLOCK_K * (HEAD_DIM + PAD)]",
        "v_tile[BLOCK_K * (HEAD_DIM + PAD) - PAD - 1]",
        "out of bounds",
        TILE_WRITE,
    ),
    Plant(
        "the loop stages past the tile",
        "i < BLOCK_K * HEAD_DIM;",
        "i < (BLOCK_K + 1) * HEAD_DIM;",
        "out of bounds",
        TILE_WRITE,
    ),
    Plant(
        "an index past a local array",
        "HEAD_DIM / 8];\n  simdgroup_float8x8 o",
        "HEAD_DIM / 8 - 2];\n  simdgroup_float8x8 o",
        "index",
        "load_fragment<false>(q_fragment",
    ),
    Plant(
        "transposed load without its bound",
        "seqlen, at);\n#endif\n        simdgroup_multiply_accumulate(s[j]",
        "seqlen + 64, at);\n#endif\n        simdgroup_multiply_accumulate(s[j]",
        "out of bounds",
        "? p[row * HEAD_DIM",
        staged=False,
    ),
    Plant(
        "a wrong leading dimension",
        "d * 8, HEAD_DIM + PAD, ulong2(0, 0), true)",
        "d * 8, HEAD_DIM + 3 * PAD, ulong2(0, 0), true)",
        "out of bounds",
        K_LOAD,
    ),
    # uninitialised threadgroup memory
    Plant("half of the tile is never staged", "i += SIMDGROUPS * 32", "i += SIMDGROUPS * 64", "uninitialised", K_LOAD),
    Plant("V is never staged", "    stage(v_tile, v, first_key, seqlen, thread_index);", "", "uninitialised", V_LOAD),
    Plant(
        "the padding is read",
        "d * 8, HEAD_DIM + PAD, ulong2(0, 0), true)",
        "d * 8, HEAD_DIM + PAD, ulong2(8, 0), true)",
        "uninitialised",
        K_LOAD,
    ),
    # what the compiler refuses
    Plant("device passed for threadgroup", "stage(k_tile, k,", "stage(k, k,", "compiler"),
    Plant("threadgroup passed for device", "stage(k_tile, k,", "stage(k_tile, v_tile,", "compiler"),
    Plant(
        "a matrix of integers",
        "simdgroup_half8x8 p[",
        "simdgroup_matrix<int, 8, 8> p[",
        "compiler",
        "simdgroup_matrix<int, 8, 8> p[",
    ),
    Plant(
        "float read as half",
        "const device half* k [[buffer(1)]]",
        "const device float* k [[buffer(1)]]",
        "compiler",
        "stage(k_tile, k",
    ),
    Plant("a double constant", "float maximum = -INFINITY", "double maximum = -INFINITY", "compiler"),
    Plant(
        "a write to an input",
        "  float maximum = -INFINITY",
        "  q[0] = 0;\n  float maximum = -INFINITY",
        "compiler",
        "q[0] = 0;",
    ),
    Plant("a pointer without an address space", "threadgroup half* o_rows", "half* o_rows", "compiler"),
    Plant(
        "threadgroup memory over 32 KiB",
        "half o_tile[SIMDGROUPS * 8 * HEAD_DIM]",
        "half o_tile[24 * 8 * HEAD_DIM]",
        "refused",
    ),
    # numbers only
    Plant(
        "a swapped lane map",
        "c.row = (lane >> 2 & 4) | (lane >> 1 & 3);",
        "c.row = (lane >> 1 & 4) | (lane >> 1 & 3);",
        "result",
    ),
    Plant("a missing tail mask", "key <= first_row + at.row && key < seqlen", "key <= first_row + BLOCK_K", "result"),
    Plant("a missing causal mask", "key <= first_row + at.row && key < seqlen", "key < seqlen", "result"),
    Plant(
        "a half accumulator",
        "maximum = new_maximum;",
        "maximum = new_maximum;\n    sum = half(sum * 64.0f) / 64.0h;",
        "result",
    ),
    Plant("the output is not rescaled", "o_fragment[d].thread_elements() *= correction;", "", "result"),
    Plant(
        "the row of the wrong lanes",
        "return x + simd_shuffle_xor(x, 8);",
        "return x + simd_shuffle_xor(x, 4);",
        "result",
    ),
]
SEQLEN = 70


def detected(text: str, staged: bool):
    """What the runner says about the attention kernel: (kind, message, lines)."""
    q, k, v = attention.inputs(2, SEQLEN)
    try:
        library = compile_shader(attention.source(64, staged, text))
    except SyntaxError as error:
        return [("compiler", str(error), {int(n) for n in re.findall(r"program_source:(\d+)", str(error))})]
    try:
        with observe():
            result = attention.run(library, q, k, v)
    except KernelFault as error:
        return [(f.kind, str(f), {f.line, f.other_line}) for f in error.faults]
    except RuntimeError as error:
        return [("refused", str(error), set())]
    return [] if attention.is_right(result, attention.reference(q, k, v)) else [("result", "wrong result", set())]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("seqlen", [32, 70])
def test_the_kernel_is_clean(staged, seqlen, seed):
    library = compile_shader(attention.source(64, staged))
    q, k, v = attention.inputs(2, seqlen)
    with observe(seed=seed):
        result = attention.run(library, q, k, v)
    assert attention.is_right(result, attention.reference(q, k, v))


@pytest.mark.parametrize("plant", ATTENTION, ids=lambda p: p.name)
def test_planted(plant):
    text = replaced(attention.SOURCE, plant)
    assert text != attention.SOURCE
    found = detected(text, plant.staged)
    kinds = {kind for kind, _, _ in found}
    assert plant.kind in kinds, f"expected {plant.kind}, found: {found}"
    if plant.kind not in ("result", "refused"):
        changed = {
            i for i, (a, b) in enumerate(zip(text.split("\n"), attention.SOURCE.split("\n"), strict=False), 1) if a != b
        }
        expected = line_of(text, plant.seen_at) if plant.seen_at else {min(changed)}
        lines = set().union(*(lines for kind, _, lines in found if kind == plant.kind))
        assert expected & lines, f"expected line {expected}, found: {found}"


# Small kernels for what the attention kernel has no place for.
SMALL = {
    "clean neighbour exchange": ("d[g] = i; threadgroup_barrier(mem_flags::mem_device); o[g] = d[g ^ 32];", None),
    "device memory between threads without a barrier": ("d[g] = i; o[g] = d[g ^ 32];", "race"),
    "device memory and a threadgroup-only barrier": (f"d[g] = i; {TG_BARRIER} o[g] = d[g ^ 32];", "race"),
    "device memory between threadgroups": (
        "d[g] = g; threadgroup_barrier(mem_flags::mem_device); o[g] = d[g ^ 64];",
        "race",
    ),
    "clean simdgroup exchange": ("t[i] = i; simdgroup_barrier(mem_flags::mem_threadgroup); o[g] = t[i ^ 1];", None),
    "a simdgroup barrier does not order simdgroups": (
        "t[i] = i; simdgroup_barrier(mem_flags::mem_threadgroup); o[g] = t[i ^ 32];",
        "race",
    ),
    "a shuffle orders nothing": ("t[i] = i; float x = simd_shuffle_xor(1.0f, 1); o[g] = t[i ^ 1] + x;", "race"),
    "two writers": ("t[0] = i;", "race"),
    "two writers of one value": ("t[0] = 1; o[g] = 0;", None),
    "write after read": (f"t[i] = i; {TG_BARRIER} float x = t[i ^ 1]; t[i] = x; o[g] = x;", "race"),
    "plain write and atomic": (
        "if (i == 0) atomic_store_explicit(a, 1, memory_order_relaxed); if (i == 40) ((device int*)a)[0] = 2;",
        "race",
    ),
    "a byte past an odd-sized buffer": ("o[g] = ((const device uchar*)in)[g == 3 ? 512 : 0];", "out of bounds"),
    "before the start of a buffer": ("o[g] = in[long(g) - 129];", "out of bounds"),
    "inside the storage, outside the view": ("o[g] = in[129];", "out of bounds"),
    "a vector across the end": ("o[g] = *(const device ulong*)((const device uchar*)in + 505);", "out of bounds"),
    "a misaligned vector": ("o[g] = ((const device float2*)(in + 1))[0].x;", "misaligned"),
    "a misaligned scalar": ("o[g] = *(const device float*)((const device uchar*)in + 2);", "misaligned"),
    "inline constants": ("o[g] = c[2];", "out of bounds"),
    "a threadgroup variable never written": ("o[g] = t[i];", "uninitialised"),
    "read-modify-write of what nobody wrote": ("t[i] += 1; o[g] = t[i];", "uninitialised"),
    "a matrix from unwritten memory": (
        "simdgroup_float8x8 m; simdgroup_load(m, t); simdgroup_store(m, o + (g & ~31u));",
        "uninitialised",
    ),
    "matrix stored and loaded without a barrier": (
        "simdgroup_float8x8 m(1.0f); threadgroup float* p = t + (i & 32) * 2; simdgroup_store(m, p); "
        "simdgroup_load(m, p); o[g] = m.thread_elements()[0];",
        "race",
    ),
    "clean matrix round trip": (
        "simdgroup_float8x8 m(1.0f); threadgroup float* p = t + (i & 32) * 2; simdgroup_store(m, p); "
        "simdgroup_barrier(mem_flags::mem_threadgroup); simdgroup_load(m, p); o[g] = m.thread_elements()[0];",
        None,
    ),
    "index of a local array": ("float local[4] = {1, 2, 3, 4}; o[g] = local[i % 5];", "index"),
    "two barriers that do not match": (
        f"if (i < 32) {{ {TG_BARRIER} }} else {{ threadgroup_barrier(mem_flags::mem_device); }} o[g] = 0;",
        "divergent barrier",
    ),
    "a barrier in a loop of unequal length": (
        f"for (uint n = 0; n < 1 + i / 32; ++n) {TG_BARRIER} o[g] = 0;",
        "divergent barrier",
    ),
    "clean tables in constant memory": ("o[g] = pick(i & 1 ? odd : even, i / 2 % 4) + i;", None),
    "a vote of some lanes": ("if (i & 1) o[g] = simd_any(true);", "divergent simdgroup operation"),
    "a reduction of some lanes": ("if (i & 1) o[g] = simd_sum(1.0f);", "divergent simdgroup operation"),
}


@pytest.fixture(scope="module")
def small_library():
    """All the small kernels in one source, each body on a line of its own."""
    text = (
        f"{HEADER}constant float even[4] = {{0, 2, 4, 6}};\nconstant float odd[4] = {{1, 3, 5, 7}};\n"
        "float pick(constant float* table, uint i) { return table[i]; }\n"
    )
    lines = {}
    for number, (name, (body, _)) in enumerate(SMALL.items()):
        text += (
            f"kernel void k{number}(device float* o, device float* d, const device float* in, constant long* c,\n"
            "  device atomic_int* a, uint g [[thread_position_in_grid]], uint i [[thread_index_in_threadgroup]]) {\n"
            "  threadgroup float t[128];\n"
        )
        lines[name] = text.count("\n") + 1
        text += body + "\n}\n"
    return compile_shader(text), lines


@pytest.mark.parametrize("name", list(SMALL))
def test_small(small_library, name):
    library, lines = small_library
    kind = SMALL[name][1]
    kernel = getattr(library, f"k{list(SMALL).index(name)}")
    buffers = [torch.zeros(128), torch.zeros(128), torch.arange(256.0)[128:], [5, 6], torch.zeros(1, dtype=torch.int32)]
    if name == "inside the storage, outside the view":
        buffers[2] = torch.arange(256.0)[127:]
    if kind is None:
        for seed in range(3):
            with observe(seed=seed):
                kernel(*buffers, threads=128, group_size=64)
        return
    with pytest.raises(KernelFault) as caught, observe():
        kernel(*buffers, threads=128, group_size=64)
    faults = [f for f in caught.value.faults if f.kind == kind]
    assert faults, caught.value
    assert lines[name] in {f.line for f in faults}, caught.value
