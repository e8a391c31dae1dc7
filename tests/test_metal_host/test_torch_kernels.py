"""Metal that nobody here wrote: the attention kernels and headers inside the installed torch, compiled unmodified.

Code that runs on real Macs must run here, and give what attention is: this is how we know that the runner is faithful.
"""

import itertools
import math
import struct
import zlib
from dataclasses import dataclass

import pytest
import torch

from metal_host import compile_shader, observe, source

PREFILL = "ATen/native/mps/kernels/PrefillAttention.h"
DECODE = "ATen/native/mps/kernels/DecodeAttention.h"
HEADER = "#include <metal_stdlib>\nusing namespace metal;\n#include <c10/metal/utils.h>\n"
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
METAL = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}


def needs(header):
    """torch brings PrefillAttention.h since 2.13 and DecodeAttention.h as its release has it."""
    there = any((d / header).is_file() for d in source.include_directories())
    return pytest.mark.skipif(not there, reason=f"the installed torch {torch.__version__} has no {header}")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float16
    head_dim: int = 64
    seqlen_q: int = 70
    seqlen_k: int = 70
    causal: bool = False
    mask: str = "none"  # none, same (as dtype) or bool
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    softcap: float = 1.0  # 1: off, as the kernel has it

    def __str__(self):
        parts = [NAMES[self.dtype], f"d{self.head_dim}", f"{self.seqlen_q}x{self.seqlen_k}", f"mask-{self.mask}"]
        parts += (
            ["causal"] * self.causal
            + [f"h{self.heads[0]}-{self.heads[1]}"]
            + [f"cap{self.softcap}"] * (self.softcap != 1)
        )
        return "-".join(parts)


class Problem:
    """Random inputs of a case, and its answer in float64."""

    def __init__(self, case: Case, device: str):
        g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        self.case = case
        heads_q, heads_k = case.heads

        def tensor(heads, length):
            # (B, L, H, D) seen as (B, H, L, D): the kernels take strides
            x = torch.randn(case.batch, length, heads, case.head_dim, generator=g)
            return x.to(case.dtype).to(device).transpose(1, 2)

        self.q, self.k, self.v = (
            tensor(heads_q, case.seqlen_q),
            tensor(heads_k, case.seqlen_k),
            tensor(heads_k, case.seqlen_k),
        )
        self.out = torch.full_like(self.q, float("nan"))
        shape = (case.batch, heads_q, case.seqlen_q, case.seqlen_k)
        self.mask = None
        if case.mask == "bool":
            self.mask = torch.rand(shape, generator=g) > 0.4
            self.mask[..., 0] = True
            self.mask[:, :, 3:4] = False  # a row that sees nothing
        elif case.mask == "same":
            self.mask = torch.randn(shape, generator=g).to(case.dtype)
        if self.mask is not None:
            self.mask = self.mask.to(device)
        self.scale = 1 / math.sqrt(case.head_dim)

    def expected(self):
        case = self.case
        repeat = case.heads[0] // case.heads[1]
        q, k, v = (x.double().cpu() for x in (self.q, self.k, self.v))
        s = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) * self.scale
        if case.mask == "same":
            s = s + self.mask.double().cpu()
        if case.causal:  # torch's: row r sees columns 0 to r
            s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        if case.mask == "bool":
            s = s.masked_fill(~self.mask.cpu(), -math.inf)
        p = s.softmax(-1).nan_to_num(0)
        return p @ v.repeat_interleave(repeat, 1)

    def check(self):
        error = (self.out.double().cpu() - self.expected()).abs().max().item()
        assert error < TOLERANCE[self.case.dtype], f"{self.case}: error {error:.3g}"


@pytest.fixture(scope="module")
def prefill_library():
    return compile_shader(HEADER + f"#include <{PREFILL}>\n")


def run_prefill(library, problem: Problem):
    case = problem.case
    bq, bk, wm = {256: (16, 8, 2), 128: (32, 16, 4)}.get(case.head_dim, (32, 32, 4))
    name = NAMES[case.dtype]
    mask_name = {"none": name, "same": name, "bool": "bool_"}[case.mask]
    tile = f"bq{bq}_bk{bk}_bd{case.head_dim}_wm{wm}_wn1"
    features = f"hm{int(case.mask != 'none')}_dc{int(case.causal)}_mask{mask_name}"
    kernel = f"prefill_attention_{name}_{tile}_{features}"
    q, k, v, out = problem.q, problem.k, problem.v, problem.out
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    heads_q, heads_k = case.heads
    packed = struct.pack(
        "<6i2f12i",
        case.batch,
        heads_q,
        case.head_dim,
        case.seqlen_q,
        case.seqlen_k,
        heads_q // heads_k,
        problem.scale,
        case.softcap,
        *strides,
    )
    device = q.device
    parameters = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
    mask = problem.mask if problem.mask is not None else torch.zeros(1, device=device)
    mask_parameters = torch.tensor(mask.stride() if mask.dim() == 4 else [0] * 4, dtype=torch.int32, device=device)
    blocks = -(-case.seqlen_q // bq)
    getattr(library, kernel)(
        q,
        k,
        v,
        out,
        parameters,
        mask_parameters,
        mask,
        threads=(blocks * wm * 32, heads_q, case.batch),
        group_size=(wm * 32, 1, 1),
    )


PREFILL_CASES = [
    Case(),
    Case(causal=True, batch=2, heads=(4, 2)),
    Case(head_dim=32, mask="bool", seqlen_q=33, seqlen_k=100),
    Case(head_dim=72, seqlen_q=100, seqlen_k=40, causal=True),
    Case(head_dim=80, mask="same", dtype=torch.bfloat16, seqlen_q=40, seqlen_k=65),
    Case(head_dim=96, dtype=torch.float32, causal=True, mask="bool", seqlen_q=50, seqlen_k=50),
    Case(head_dim=128, dtype=torch.bfloat16, causal=True),
    Case(head_dim=128, mask="same", seqlen_q=1, seqlen_k=35),
    Case(head_dim=256, dtype=torch.float32, seqlen_q=20, seqlen_k=45, mask="same"),
    Case(head_dim=256, seqlen_q=33, seqlen_k=33, causal=True),
]
ALL_PREFILL = [
    Case(dtype=t, head_dim=d, causal=c, mask=m, seqlen_q=45, seqlen_k=70 - 20 * c)
    for t, d, c, m in itertools.product(NAMES, (32, 64, 72, 80, 96, 128, 256), (False, True), ("none", "same", "bool"))
]


@needs(PREFILL)
@pytest.mark.parametrize("case", PREFILL_CASES, ids=str)
def test_prefill(prefill_library, device, case):
    problem = Problem(case, device)
    run_prefill(prefill_library, problem)
    problem.check()


@needs(PREFILL)
@pytest.mark.metal_full
@pytest.mark.parametrize("case", ALL_PREFILL, ids=str)
def test_every_prefill_kernel(prefill_library, device, case):
    problem = Problem(case, device)
    run_prefill(prefill_library, problem)
    problem.check()


@needs(PREFILL)
def test_prefill_softcap(prefill_library, device):
    """The kernel caps in base 2: 2 ** (cap tanh(x log2(e) / cap)).

    Whole blocks only: it caps the -inf of a tail's columns too.
    """
    problem = Problem(Case(softcap=5.0, seqlen_q=40, seqlen_k=64, dtype=torch.float32), device)
    run_prefill(prefill_library, problem)
    q, k, v = (x.double().cpu() for x in (problem.q, problem.k, problem.v))
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * problem.scale / 5 * math.log2(math.e)
    p = 2 ** (5 * s.tanh())
    expected = p / p.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    assert (problem.out.double().cpu() - expected).abs().max() < 2e-5


@needs(PREFILL)
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("case", [PREFILL_CASES[1], PREFILL_CASES[2]], ids=str)
def test_prefill_has_no_faults(prefill_library, case, seed):
    problem = Problem(case, "cpu")
    with observe(seed=seed) as launches:
        run_prefill(prefill_library, problem)
    problem.check()
    if case.head_dim == 64:  # a product is 8x8x8: QK and PV of every visited block
        visited = sum(min(3, i + 1) for i in range(3)) * 32 // 8 * 32 // 8
        assert launches[0].counters["matrix_products"] == case.batch * case.heads[0] * visited * 64 // 8 * 2


@pytest.fixture(scope="module")
def decode_library():
    return compile_shader(HEADER + f"#include <{DECODE}>\n")


def run_decode(library, problem: Problem, two_pass: bool):
    case = problem.case
    type_, d = METAL[case.dtype], case.head_dim
    suffix = {"none": "_masknone" + "_causal" * case.causal, "same": f"_mask{type_}", "bool": "_maskbool"}[case.mask]
    q, k, v = problem.q, problem.k, problem.v
    device = q.device
    heads_q, heads_k = case.heads
    i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    head_strides = i32(*(t.stride(1) for t in (q, k, v)), 0)
    seq_strides = i32(*(t.stride(2) for t in (q, k, v)), 0)
    batch_strides = i32(*(t.stride(0) for t in (q, k, v)), heads_q)
    mask = problem.mask if problem.mask is not None else torch.zeros(4, dtype=torch.uint8, device=device)
    mask_strides = i32(*reversed(mask.stride())) if mask.dim() == 4 else i32(0, 0, 0, 0)
    scalars = (
        i32(heads_q // heads_k),
        i32(case.seqlen_k),
        head_strides,
        seq_strides,
        torch.tensor([problem.scale], device=device),
    )
    rows = case.batch * heads_q
    out = torch.full((case.batch, heads_q, case.seqlen_q, d), float("nan"), dtype=case.dtype, device=device)
    if not two_pass:
        kernel = getattr(library, f"sdpa_vector_{type_}_{d}_{d}{suffix}")
        kernel(
            q,
            k,
            v,
            out,
            *scalars,
            mask,
            mask_strides,
            batch_strides,
            threads=(rows * 1024, case.seqlen_q, 1),
            group_size=(1024, 1, 1),
        )
    else:
        partial = torch.full((*out.shape[:3], 32, d), float("nan"), dtype=case.dtype, device=device)
        sums, maxima = torch.zeros(*out.shape[:3], 32, device=device), torch.zeros(*out.shape[:3], 32, device=device)
        first = getattr(library, f"sdpa_vector_2pass_1_{type_}_{d}_{d}{suffix}")
        first(
            q,
            k,
            v,
            partial,
            sums,
            maxima,
            *scalars,
            mask,
            mask_strides,
            batch_strides,
            threads=(rows * 256, case.seqlen_q, 32),
            group_size=(256, 1, 1),
        )
        second = getattr(library, f"sdpa_vector_2pass_2_{type_}_{d}")
        second(partial, sums, maxima, out, threads=(rows * 1024, case.seqlen_q, 1), group_size=(1024, 1, 1))
    problem.out = out


DECODE_CASES = [
    (Case(seqlen_q=1, seqlen_k=50, heads=(4, 2)), False),
    (Case(seqlen_q=3, seqlen_k=40, head_dim=96, dtype=torch.bfloat16, mask="bool"), False),
    (Case(seqlen_q=2, seqlen_k=33, head_dim=128, dtype=torch.float32, mask="same"), False),
    (Case(seqlen_q=4, seqlen_k=45, head_dim=256, causal=True, batch=2), False),
    (Case(seqlen_q=1, seqlen_k=300, heads=(4, 1)), True),
    (Case(seqlen_q=2, seqlen_k=290, head_dim=128, dtype=torch.bfloat16, mask="same"), True),
    (Case(seqlen_q=2, seqlen_k=270, head_dim=96, dtype=torch.float32, mask="bool"), True),
]
ALL_DECODE = [
    (Case(dtype=t, head_dim=d, causal=c, mask=m, seqlen_q=4, seqlen_k=260 if two else 70), two)
    for t, d, (c, m), two in itertools.product(
        NAMES, (64, 96, 128, 256), ((False, "none"), (True, "none"), (False, "same"), (False, "bool")), (False, True)
    )
]


def mask_is_open(problem: Problem):
    """Rows that see nothing are outside what the decode kernels define."""
    if problem.case.mask == "bool":
        problem.mask[:, :, 3:4] |= torch.arange(problem.case.seqlen_k, device=problem.mask.device) % 2 == 0


@needs(DECODE)
@pytest.mark.parametrize(("case", "two_pass"), DECODE_CASES, ids=str)
def test_decode(decode_library, device, case, two_pass):
    problem = Problem(case, device)
    mask_is_open(problem)
    run_decode(decode_library, problem, two_pass)
    problem.check()


@needs(DECODE)
@pytest.mark.metal_full
@pytest.mark.parametrize(("case", "two_pass"), ALL_DECODE, ids=str)
def test_every_decode_kernel(decode_library, device, case, two_pass):
    problem = Problem(case, device)
    mask_is_open(problem)
    run_decode(decode_library, problem, two_pass)
    problem.check()


@needs(DECODE)
@pytest.mark.parametrize(("case", "two_pass"), [DECODE_CASES[0], DECODE_CASES[4]], ids=str)
def test_decode_has_no_faults(decode_library, case, two_pass):
    problem = Problem(case, "cpu")
    with observe():
        run_decode(decode_library, problem, two_pass)
    problem.check()


def headers(folder):
    found = [p for d in source.include_directories() for p in sorted((d / folder).glob("*.h"))]
    return [f"{folder}/{p.name}" for p in found]


@pytest.mark.parametrize("header", headers("c10/metal") + headers("ATen/native/mps/kernels"))
def test_header_compiles(header):
    lib = compile_shader(f"{HEADER}#include <{header}>\nkernel void after(device float* out) {{ out[0] = 1; }}")
    out = torch.zeros(1)
    lib.after(out)
    assert out.item() == 1


def test_c10_functions_are_right(device):
    """Functions of c10/metal against torch's own on the CPU."""
    functions = {
        "erf": torch.erf,
        "erfc": torch.erfc,
        "log1p": torch.log1p,
        "digamma": torch.digamma,
        "i0": torch.i0,
        "sinc": torch.sinc,
    }
    body = "\n".join(f"  out[{i} * n + g] = c10::metal::{name}(x[g]);" for i, name in enumerate(functions))
    lib = compile_shader(f"""{HEADER}#include <c10/metal/special_math.h>
    kernel void k(device float* out, const device float* x, constant long& n, uint g [[thread_position_in_grid]]) {{
    {body}
    }}""")
    x = torch.linspace(0.1, 3, 50, device=device)
    out = torch.zeros(len(functions), 50, device=device)
    lib.k(out, x, 50, threads=50)
    for row, (name, function) in zip(out.cpu(), functions.items(), strict=True):
        torch.testing.assert_close(row, function(x.cpu().double()).float(), rtol=2e-5, atol=2e-6, msg=name)


def test_c10_reductions_over_a_threadgroup(device):
    lib = compile_shader(f"""{HEADER}#include <c10/metal/reduction_utils.h>
    kernel void k(device float* out, const device float* x, device int* at, uint i [[thread_index_in_threadgroup]],
        uint n [[threads_per_threadgroup]]) {{
      threadgroup float shared[32];  threadgroup int index[32];
      float sum = c10::metal::threadgroup_sum(shared, x[i], i, n);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float most = c10::metal::threadgroup_max(shared, x[i], i, n);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      int where = c10::metal::threadgroup_argmax(shared, index, x[i], int(i), i, n);
      long total = c10::metal::simd_sum(long(i) << 33);
      if (i == 0) {{ out[0] = sum; out[1] = most; at[0] = where; at[1] = int(total >> 33); }}
    }}""")
    x = torch.randn(256, generator=torch.Generator().manual_seed(2))
    out, at = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    lib.k(out, x.to(device), at, threads=256, group_size=256)
    assert out.tolist() == pytest.approx([x.sum().item(), x.max().item()], rel=1e-5, abs=1e-5)
    assert at.tolist() == [int(x.argmax()), 31 * 16]
    with observe(allow_partial_collectives=True):
        host = torch.zeros(2)
        lib.k(host, x, torch.zeros(2, dtype=torch.int32), threads=256, group_size=256)
    assert host.tolist() == pytest.approx([x.sum().item(), x.max().item()], rel=1e-5, abs=1e-5)
