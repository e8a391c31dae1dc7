"""Every math function of the library: float, half, bfloat and a vector of float, against float64."""

import math

import pytest
import torch

from metal_host import compile_shader

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
# Results are computed in float (a few ulp there) and rounded once.
TOLERANCE = {"float": 4e-6, "half": 2**-10, "bfloat": 2**-7}

ANY, POSITIVE, UNIT, ABOVE_ONE, SMALL, QUARTER = "any", "positive", "unit", "above one", "small", "quarter"

EXTRA = {ANY: [0.0, -0.0, 2.5, -2.5, 1.5], SMALL: [0.0], QUARTER: [0.0], ABOVE_ONE: [1.5]}


def samples(domain: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(64, generator=generator, dtype=torch.float64)
    spread = {
        ANY: 8 * x - 4,
        POSITIVE: 6 * x + 0.1,
        UNIT: 1.8 * x - 0.9,
        ABOVE_ONE: 4 * x + 1.1,
        SMALL: 2 * x - 1,
        QUARTER: 0.5 * x - 0.25,
    }[domain]
    return torch.cat([spread, torch.tensor(EXTRA.get(domain, [0.5]))])


def metal_round(x):
    return torch.where((x - x.trunc()).abs() >= 0.5, x.trunc() + x.sign(), x.trunc())


def clamp01(x):
    return x.clamp(0, 1)


UNARY = {
    "acos": (torch.acos, UNIT),
    "acosh": (torch.acosh, ABOVE_ONE),
    "asin": (torch.asin, UNIT),
    "asinh": (torch.asinh, ANY),
    "atan": (torch.atan, ANY),
    "atanh": (torch.atanh, UNIT),
    "cos": (torch.cos, ANY),
    "cosh": (torch.cosh, ANY),
    "cospi": (lambda x: torch.cos(math.pi * x), SMALL),
    "sin": (torch.sin, ANY),
    "sinh": (torch.sinh, ANY),
    "sinpi": (lambda x: torch.sin(math.pi * x), SMALL),
    "tan": (torch.tan, UNIT),
    "tanh": (torch.tanh, ANY),
    "tanpi": (lambda x: torch.tan(math.pi * x), QUARTER),
    "exp": (torch.exp, ANY),
    "exp2": (torch.exp2, ANY),
    "exp10": (lambda x: 10**x, SMALL),
    "log": (torch.log, POSITIVE),
    "log2": (torch.log2, POSITIVE),
    "log10": (torch.log10, POSITIVE),
    "sqrt": (torch.sqrt, POSITIVE),
    "rsqrt": (torch.rsqrt, POSITIVE),
    "abs": (torch.abs, ANY),
    "fabs": (torch.abs, ANY),
    "ceil": (torch.ceil, ANY),
    "floor": (torch.floor, ANY),
    "trunc": (torch.trunc, ANY),
    "rint": (torch.round, ANY),
    "round": (metal_round, ANY),
    "fract": (lambda x: x - x.floor(), ANY),
    "sign": (torch.sign, ANY),
    "saturate": (clamp01, ANY),
}
BINARY = {
    "atan2": (torch.atan2, ANY, POSITIVE),
    "pow": (torch.pow, POSITIVE, SMALL),
    "powr": (torch.pow, POSITIVE, SMALL),
    "fmod": (torch.fmod, ANY, POSITIVE),
    "copysign": (torch.copysign, ANY, ANY),
    "divide": (torch.div, ANY, POSITIVE),
    "fdim": (lambda x, y: (x - y).clamp(min=0), ANY, ANY),
    "fmax": (torch.maximum, ANY, ANY),
    "fmin": (torch.minimum, ANY, ANY),
    "max": (torch.maximum, ANY, ANY),
    "min": (torch.minimum, ANY, ANY),
    "step": (lambda edge, x: (x >= edge).double(), ANY, ANY),
}
TERNARY = {
    "fma": (lambda x, y, z: x * y + z, ANY),
    "max3": (lambda x, y, z: torch.maximum(x, torch.maximum(y, z)), ANY),
    "min3": (lambda x, y, z: torch.minimum(x, torch.minimum(y, z)), ANY),
    "median3": (lambda x, y, z: torch.stack([x, y, z]).median(0).values, ANY),
    "fmax3": (lambda x, y, z: torch.maximum(x, torch.maximum(y, z)), ANY),
    "fmin3": (lambda x, y, z: torch.minimum(x, torch.minimum(y, z)), ANY),
    "fmedian3": (lambda x, y, z: torch.stack([x, y, z]).median(0).values, ANY),
    "clamp": (lambda x, y, z: torch.minimum(torch.maximum(x, y), z), ANY),
    "mix": (lambda x, y, z: x + (y - x) * z, ANY),
}
MODES = [
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "cospi",
    "exp",
    "exp2",
    "exp10",
    "fabs",
    "abs",
    "floor",
    "fract",
    "log",
    "log2",
    "log10",
    "rint",
    "round",
    "rsqrt",
    "saturate",
    "sin",
    "sinh",
    "sinpi",
    "sqrt",
    "tan",
    "tanh",
    "tanpi",
    "trunc",
]
MODES_BINARY = ["atan2", "divide", "fmax", "fmin", "fmod", "max", "min", "pow", "powr"]


def kernel(name: str, function: str, type_: str, arguments: int) -> str:
    parameters = ", ".join(f"const device {type_}* x{i}" for i in range(arguments))
    values = ", ".join(f"x{i}[g]" for i in range(arguments))
    call = f"{{ out[g] = {type_}({function}({values})); }}"  # of a bfloat a float, which becomes one only explicitly
    return f"kernel void {name}(device {type_}* out, {parameters}, uint g [[thread_position_in_grid]]) {call}\n"


@pytest.fixture(scope="module")
def library():
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    for names, arguments in ((UNARY, 1), (BINARY, 2), (TERNARY, 3)):
        for name in names:
            for type_ in DTYPES:
                text += kernel(f"{name}_{type_}", name, type_, arguments)
            text += kernel(f"{name}_float4", name, "float4", arguments)
    for mode in ("fast", "precise"):
        for name in MODES:
            text += kernel(f"{mode}_{name}", f"{mode}::{name}", "float", 1)
        for name in MODES_BINARY:
            text += kernel(f"{mode}_{name}", f"{mode}::{name}", "float", 2)
    return compile_shader(text)


def inputs(domains):
    found = [samples(domain, seed) for seed, domain in enumerate(domains)]
    return [x[: min(map(len, found)) // 4 * 4] for x in found]


def run(library, name, arguments, dtype, device):
    given = [x.to(dtype).to(device) for x in arguments]
    out = torch.full_like(given[0], float("nan"))
    width = 4 if name.endswith("float4") else 1
    given = [x[: len(x) // 4 * 4] for x in given]
    out = out[: len(out) // 4 * 4]
    getattr(library, name)(out, *given, threads=len(out) // width)
    return out.double().cpu(), [x.double().cpu() for x in given]


def check(function, got, given, tolerance, name):
    expected = function(*given)
    error = (got - expected).abs()
    assert (error <= tolerance * expected.abs().clamp(min=1)).all(), f"{name}: largest error {error.max():.3g}"


CASES = [(n, f, (d,)) for n, (f, d) in UNARY.items()]
CASES += [(n, f, (d, e)) for n, (f, d, e) in BINARY.items()]
CASES += [(n, f, (d, d, d)) for n, (f, d) in TERNARY.items()]


@pytest.mark.parametrize(("name", "function", "domains"), CASES, ids=[c[0] for c in CASES])
def test_function(library, device, name, function, domains):
    for type_, dtype in DTYPES.items():
        got, given = run(library, f"{name}_{type_}", inputs(domains), dtype, device)
        check(function, got, given, TOLERANCE[type_], f"{name}({type_})")
    got, given = run(library, f"{name}_float4", inputs(domains), torch.float32, device)
    check(function, got, given, TOLERANCE["float"], f"{name}(float4)")


@pytest.mark.parametrize("mode", ["fast", "precise"])
def test_modes(library, device, mode):
    for name, function, domains in CASES:
        if name in MODES + MODES_BINARY:
            got, given = run(library, f"{mode}_{name}", inputs(domains), torch.float32, device)
            check(function, got, given, 1e-4 if mode == "fast" else 4e-6, f"{mode}::{name}")


def test_special_values(device):
    lib = compile_shader("""#include <metal_stdlib>
    using namespace metal;
    kernel void k(device float* out, constant float* x) {
      out[0] = max(NAN, 1.0f);  out[1] = min(1.0f, NAN);  out[2] = fast::exp2(-INFINITY);  out[3] = exp(-INFINITY);
      out[4] = isnan(x[0]);  out[5] = isinf(x[1]);  out[6] = isfinite(x[1]);  out[7] = isnormal(x[2]);
          out[8] = signbit(x[3]);
      out[9] = isunordered(x[0], x[1]);  out[10] = isordered(x[1], x[2]);  out[11] = log2(0.0f);  out[12] = sqrt(-1.0f);
      out[13] = -INFINITY - -INFINITY;  out[14] = tanh(100.0f);  out[15] = rsqrt(0.0f);
    }""")
    out = torch.zeros(16, device=device)
    lib.k(out, torch.tensor([math.nan, math.inf, 1e-40, -0.0], device=device), threads=1)
    inf, nan = math.inf, math.nan
    expected = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, -inf, nan, nan, 1, inf])
    assert torch.equal(out.cpu().nan_to_num(nan=99), expected.nan_to_num(nan=99))


def test_functions_with_two_results(device):
    lib = compile_shader("""#include <metal_stdlib>
    using namespace metal;
    kernel void k(device float* out, device int* whole, constant float& x) {
      float c;  out[0] = sincos(x, c);  out[1] = c;
      float w;  out[2] = modf(-x, w);  out[3] = w;
      int e;  out[4] = frexp(x, e);  whole[0] = e;  whole[1] = ilogb(x);  out[5] = ldexp(x, 3);
      half h;  out[6] = modf(half(2.25h), h);  out[7] = h;
      out[8] = frexp(0x1p-140f, e);  whole[2] = e;
    }""")
    out, whole = torch.zeros(9, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    lib.k(out, whole, 10.75, threads=1)
    expected = [math.sin(10.75), math.cos(10.75), -0.75, -10, 0.671875, 86, 0.25, 2, 0.5]
    assert out.tolist() == pytest.approx(expected, abs=1e-6)
    assert whole.tolist() == [4, 3, -139]


def test_geometry_and_logic(device):
    lib = compile_shader("""#include <metal_stdlib>
    using namespace metal;
    kernel void k(device float* out, constant float4* v) {
      float4 a = v[0], b = v[1];
      out[0] = dot(a, b);  out[1] = length(a);  out[2] = distance(a, b);  out[3] = length_squared(a);
          out[4] = distance_squared(a, b);
      out[5] = normalize(a).x;  float3 c = cross(a.xyz, b.xyz);  out[6] = c.x;  out[7] = c.y;  out[8] = c.z;
      bool4 less = a < b;
      out[9] = any(less);  out[10] = all(less);  out[11] = dot(select(a, b, less), float4(1));
      out[12] = select(1.0f, 2.0f, less.x);  out[13] = any(!less && bool4(true));  out[14] = all(isfinite(a));
      out[15] = dot(smoothstep(float4(0), float4(4), a), float4(1));
      half2 h = half2(a.xy);  out[16] = dot(h, h);
      out[17] = max(a, 2.0f).x + clamp(a, 0.0f, 3.0f).w + max(0.5f, a).x - min(-1, int4(3)).x;
    }""")
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 1, 5, 0])
    out = torch.zeros(18, device=device)
    lib.k(out, torch.stack([a, b]).to(device), threads=1)
    t = (a / 4).clamp(0, 1)
    cross = torch.linalg.cross(a[:3], b[:3]).tolist()
    expected = [21, 30**0.5, (a - b).norm(), 30, (a - b).square().sum(), 30**-0.5, *cross, 1, 0, 4 + 2 + 5 + 4, 2, 1, 1]
    expected += [(t * t * (3 - 2 * t)).sum(), 5, 7]
    assert out.tolist() == pytest.approx([float(e) for e in expected], rel=1e-6)
