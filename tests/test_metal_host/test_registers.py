"""Registers and spills, as ptxas tells them."""

import pytest

from metal_host import compile_shader, nvidia

from . import attention

pytestmark = pytest.mark.skipif(not nvidia.can_assemble(), reason="needs libdevice and ptxas of a CUDA toolkit")

LOG = """ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 2976 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 230.924 ms
ptxas info    : Function properties for inner
    2976 bytes stack frame, 700 bytes spill stores, 800 bytes spill loads
ptxas info    : Function properties for innermost
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_what_called_functions_spill_counts_as_the_kernel_s():
    assert nvidia.said_of(LOG, "first") == nvidia.Resources(255, 704, 808, 2976, 64)
    assert nvidia.said_of(LOG, "second") == nvidia.Resources(32, 0, 0, 0, 0)


# COUNT values of a thread that are read before any is used: all of them live at once.
MANY_VALUES = """#include <metal_stdlib>
using namespace metal;
#define UNROLL _Pragma("clang loop unroll(full)")
kernel void many(device float* x, constant long* sizes, uint i [[thread_position_in_grid]]) {
  float values[COUNT];
  UNROLL for (int n = 0; n < COUNT; ++n) values[n] = x[i * COUNT + n + sizes[n % 8]];
  threadgroup_barrier(mem_flags::mem_device);
  float sum = 0;
  UNROLL for (int a = 0; a < 3; ++a) UNROLL for (int n = 0; n < COUNT; ++n) sum = sum * values[n] + values[(n * 7 + 3) % COUNT];
  x[i] = sum;
}
"""


def test_a_kernel_with_more_values_than_registers_spills():
    assert compile_shader(MANY_VALUES.replace("COUNT", "64")).resources("many", 32).spill_stores == 0
    used = compile_shader(MANY_VALUES.replace("COUNT", "400")).resources("many", 32)
    assert used.registers == 255
    assert used.spill_stores >= (400 - 255) * 4


@pytest.mark.parametrize("n", [40, 100])
def test_live_registers_are_the_live_values_and_little_else(n):
    live = compile_shader(MANY_VALUES.replace("COUNT", str(n))).live_registers("many")
    assert n < live <= n + 16
    assert live % 4 == 0


# FACTOR times each of 16 numbers of the host are needed in every round of a loop.
FACTORS = """#include <metal_stdlib>
using namespace metal;
#define UNROLL _Pragma("clang loop unroll(full)")
kernel void factors(
    device float* x, constant int* n, uint3 group [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  for (int round = 0; round < n[0]; ++round) {
    UNROLL for (int i = 0; i < 16; ++i) x[lane] = x[lane] * float(n[i] * int(FACTOR));
  }
}
"""


def test_only_what_a_launch_shares_is_uniform():
    """What comes from the threadgroup's position or the lane takes a register of each lane; neither of them itself does."""
    counted = {
        factor: compile_shader(FACTORS.replace("FACTOR", factor)).live_registers("factors")
        for factor in ("n[16]", "group.y", "lane")
    }
    assert counted["n[16]"] <= 12
    assert counted["n[16]"] + 12 <= counted["group.y"] <= counted["n[16]"] + 20
    assert counted["n[16]"] + 12 <= counted["lane"] <= counted["n[16]"] + 20


MATRICES = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define UNROLL _Pragma("clang loop unroll(full)")
kernel void matrices(device const ELEMENT* x, device float* out, constant long& row, ushort lane [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<ELEMENT, 8, 8> a[8], b;
  simdgroup_matrix<float, 8, 8> sum[8];
  UNROLL for (int i = 0; i < 8; ++i) {
    simdgroup_load(a[i], x + 64 * i, row);
    sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int k = 0; k < 100; ++k) {
    simdgroup_load(b, x + k * row, row);
    UNROLL for (int i = 0; i < 8; ++i) simdgroup_multiply_accumulate(sum[i], a[i], b, sum[i]);
  }
  UNROLL for (int i = 0; i < 8; ++i) simdgroup_store(sum[i], out + 64 * i, row);
}
"""


@pytest.mark.parametrize(("element", "registers"), [("half", 1), ("float", 2)])
def test_live_registers_of_matrix_products(element, registers):
    """Eight left operands and eight sums; NVIDIA's own products take twice as much."""
    library = compile_shader(MATRICES.replace("ELEMENT", element))
    needed = 8 * registers + 8 * 2
    live = library.live_registers("matrices")
    assert needed < live <= needed + 20
    assert library.resources("matrices", 32).registers > live


@pytest.mark.parametrize(("staged", "shared"), [(True, 2 * 32 * 72 * 2 + 4 * 8 * 64 * 2), (False, 4 * 8 * 64 * 2)])
def test_registers_spills_and_shared_memory(staged, shared):
    library = compile_shader(attention.source(64, staged))
    used = library.resources("attention", 128)
    assert used.shared == shared
    assert used.spill_stores == used.spill_loads == used.stack == 0
    assert 32 < used.registers <= 255
    assert 32 < library.live_registers("attention") <= 128


COOPERATIVE = """#include <metal_stdlib>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;
kernel void k(device half* a, device half* b, device float* c, uint lane [[thread_index_in_simdgroup]]) {
  constexpr auto descriptor =
      matmul2d_descriptor(16, 32, 16, false, TRANSPOSED, true, matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<descriptor, execution_simdgroup> operation;
  auto left = operation.get_left_input_cooperative_tensor<half, half, float>();
  auto right = operation.get_right_input_cooperative_tensor<half, half, float>();
  auto sum = operation.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  _Pragma("clang loop unroll(full)") for (ushort i = 0; i < left.get_capacity(); ++i) left[i] = a[8 * lane + i];
  _Pragma("clang loop unroll(full)") for (ushort i = 0; i < right.get_capacity(); ++i) right[i] = b[16 * lane + i];
  _Pragma("clang loop unroll(full)") for (ushort i = 0; i < sum.get_capacity(); ++i) sum[i] = 0;
  operation.run(left, right, sum);
  _Pragma("clang loop unroll(full)") for (ushort i = 0; i < sum.get_capacity(); ++i) {
    auto at = sum.get_multidimensional_index(i);
    c[at[1] * 32 + at[0]] = sum[i];
  }
}
"""


@pytest.mark.parametrize(("transposed", "exchanges"), [(True, (8, 0)), (False, (8, 8))])
def test_cooperative_tensors_are_registers(transposed, exchanges):
    """On an NVIDIA GPU four products of m16n8k16; of a right operand every pair of registers goes to another lane, and what is
    stored by k is transposed. With Apple's operands two fragments' products, of 8 elements each."""
    lib = compile_shader(COOPERATIVE.replace("TRANSPOSED", str(transposed).lower()), version="4.0")
    ptx = lib.module("k").ptx
    copies = ptx.count("st.global.b32") // 16  # the function, and it again inside its entry
    products = ptx.count("mma.sync.aligned.m16n8k16")
    assert (products, ptx.count("shfl.sync"), ptx.count("movmatrix")) == tuple(copies * n for n in (4, *exchanges))
    assert ".local" not in ptx
    assert lib.apple_ptx("k").count("matrix product") == 2
    # 16 registers of the sum, 4 of the left operand, and 4 of the right one's fragment that is multiplied last
    assert 24 <= lib.live_registers("k") <= 32
