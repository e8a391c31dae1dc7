"""Integer and bit functions against Python's integers, for every width."""

import pytest
import torch

from metal_host import compile_shader

TYPES = {
    "char": torch.int8,
    "uchar": torch.uint8,
    "short": torch.int16,
    "ushort": torch.uint16,
    "int": torch.int32,
    "uint": torch.uint32,
    "long": torch.int64,
    "ulong": torch.uint64,
}


class Int:
    """One of Metal's integer types, for the references."""

    def __init__(self, name):
        self.name, self.signed = name, not name.startswith("u")
        self.bits = 8 * torch.empty(0, dtype=TYPES[name]).element_size()
        self.low = -(1 << self.bits - 1) if self.signed else 0
        self.high = (1 << self.bits - self.signed) - 1

    def wrap(self, x):
        x &= (1 << self.bits) - 1
        return x - (1 << self.bits) if self.signed and x > self.high else x

    def bits_of(self, x):
        return x & (1 << self.bits) - 1

    def saturate(self, x):
        return max(self.low, min(self.high, x))


def rotate(t, x, n):
    n %= t.bits
    u = t.bits_of(x)
    return t.wrap(u << n | u >> (t.bits - n))


def extract(t, x, offset, bits):
    u = t.bits_of(x) >> offset & ((1 << bits) - 1)
    return u - (1 << bits) if t.signed and bits and u >> (bits - 1) else u


def insert(t, x, y, offset, bits):
    mask = ((1 << bits) - 1) << offset
    return t.wrap(t.bits_of(x) & ~mask | t.bits_of(y) << offset & mask)


FUNCTIONS = {
    "max(x, y)": lambda t, x, y, z: max(x, y),
    "min(x, y)": lambda t, x, y, z: min(x, y),
    "max3(x, y, z)": lambda t, x, y, z: max(x, y, z),
    "min3(x, y, z)": lambda t, x, y, z: min(x, y, z),
    "median3(x, y, z)": lambda t, x, y, z: sorted((x, y, z))[1],
    "clamp(x, T(3), T(90))": lambda t, x, y, z: max(3, min(90, x)),
    "abs(x)": lambda t, x, y, z: t.wrap(abs(x)),
    "T(absdiff(x, y))": lambda t, x, y, z: t.wrap(abs(x - y)),
    "addsat(x, y)": lambda t, x, y, z: t.saturate(x + y),
    "subsat(x, y)": lambda t, x, y, z: t.saturate(x - y),
    "hadd(x, y)": lambda t, x, y, z: (x + y) >> 1,
    "rhadd(x, y)": lambda t, x, y, z: (x + y + 1) >> 1,
    "mulhi(x, y)": lambda t, x, y, z: (x * y) >> t.bits,
    "madhi(x, y, z)": lambda t, x, y, z: t.wrap((x * y >> t.bits) + z),
    "clz(x)": lambda t, x, y, z: t.bits - t.bits_of(x).bit_length(),
    "ctz(x)": lambda t, x, y, z: (t.bits_of(x) & -t.bits_of(x)).bit_length() - 1 if x else t.bits,
    "popcount(x)": lambda t, x, y, z: (
        t.bits_of(x).bit_count() if hasattr(int, "bit_count") else bin(t.bits_of(x)).count("1")
    ),
    "reverse_bits(x)": lambda t, x, y, z: t.wrap(int(f"{t.bits_of(x):0{t.bits}b}"[::-1], 2)),
    "rotate(x, T(3))": lambda t, x, y, z: rotate(t, x, 3),
    "extract_bits(x, 2, 4)": lambda t, x, y, z: extract(t, x, 2, 4),
    "insert_bits(x, y, 1, 5)": lambda t, x, y, z: insert(t, x, y, 1, 5),
}


@pytest.mark.parametrize("type_", list(TYPES))
def test_integer_functions(device, type_):
    t = Int(type_)
    body = "\n".join(f"  out[{i} * n + g] = {call};" for i, call in enumerate(FUNCTIONS))
    lib = compile_shader(f"""#include <metal_stdlib>
    using namespace metal;
    typedef {type_} T;
    kernel void k(device T* out, const device T* a, const device T* b, const device T* c, constant long& n,
        uint g [[thread_position_in_grid]]) {{
      T x = a[g], y = b[g], z = c[g];
    {body}
    }}""")
    edges = [t.low, t.high, 0, 1, 5, 77, t.high // 3, t.low // 2 + 9, t.wrap(-2)]
    triples = [(edges[i], edges[(3 * i + 1) % 9], edges[(5 * i + 2) % 9]) for i in range(9)]
    columns = [torch.tensor([v[k] for v in triples], dtype=TYPES[type_], device=device) for k in range(3)]
    out = torch.zeros(len(FUNCTIONS) * 9, dtype=TYPES[type_], device=device)
    lib.k(out, *columns, 9, threads=9)
    got = out.cpu().tolist()
    for i, (call, reference) in enumerate(FUNCTIONS.items()):
        expected = [reference(t, *v) for v in triples]
        assert got[i * 9 : i * 9 + 9] == expected, f"{call} of {type_} for {triples}"


def test_24_bits_saturating_products_and_vectors(device):
    lib = compile_shader("""#include <metal_stdlib>
    using namespace metal;
    kernel void k(device long* out) {
      out[0] = mul24(-3000, 1000);  out[1] = mad24(70000u, 70u, 5u);  out[2] = madsat(2000000000, 2, 1);
          out[3] = madsat(short(-300), short(300), short(-5));
      int4 v = max(int4(1, -2, 3, -4), 0);  out[4] = v.x + v.y + v.z + v.w;
      uint2 c = popcount(uint2(7, 255));  out[5] = c.x * 100 + c.y;
      out[6] = as_type<int>(1.0f);  out[7] = as_type<uint>(half2(1.0h, 2.0h));  out[8] = as_type<long>(int2(1, 2));
      out[9] = clamp(short3(-5, 5, 50), short3(0), short3(9)).z;
    }""")
    out = torch.zeros(10, dtype=torch.int64, device=device)
    lib.k(out, threads=1)
    assert out.tolist() == [-3000000, 4900005, 2147483647, -32768, 4, 308, 0x3F800000, 0x40003C00, 1 + (2 << 32), 9]
