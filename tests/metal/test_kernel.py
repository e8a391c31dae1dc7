"""A kernel is its Metal text and a `Kernel`: here one with other buffers, outputs and parameters than ours."""

import math
from typing import NamedTuple

import pytest
import torch

from flash_attn_mps.tiers.metal import launch, specialization
from flash_attn_mps.tiers.metal.kernel import Buffer, Kernel
from metal_host import KernelFault, observe

from .calls import Spec, draw

# delta = sum(dout * out) * times - dlse of each row, and the rows of dout, turned round, in the other output.
TEXT = """
kernel void row_sums(
    BUFFERS
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_index [[thread_position_in_threadgroup]]) {
  Inputs in = INPUTS;
  int head = int(group.y);
  Tile tile = tile_of(int(group.x), int(group.z), THREADS, in);
  Sequence sequence = tile.sequence;
  int row = tile.index * THREADS + int(thread_index.x);
  if (row >= sequence.seqlen_q) return;
  long row_of_all = sequence.first_q + row;
  long b = sequence.batch;
  device const T* of_dout = dout + b * params[DOUT_BATCH] + row_of_all * params[DOUT_ROW] + head * params[DOUT_HEAD];
  device const T* of_out = out + b * params[OUT_BATCH] + row_of_all * params[OUT_ROW] + head * params[OUT_HEAD];
  device T* turned = back + b * params[BACK_BATCH] + row_of_all * params[BACK_ROW] + head * params[BACK_HEAD];
  float sum = 0.0f;
  for (int d = 0; d < HEAD_DIM_V; ++d) {
    sum += float(of_dout[d]) * float(of_out[d]) * params[TIMES];
    turned[HEAD_DIM_V - 1 - d] = of_dout[d];
  }
  long of_row = b * params[LSE_BATCH] + row_of_all + head * params[LSE_HEAD];
#if HAS_DLSE
  sum -= dlse[of_row];
#endif
  delta[of_row] = sum + params[LESS];
}
"""


class Variant(NamedTuple):
    threads: int


def grid(p, variant):
    return launch.tiles_of_queries(p, variant.threads, variant.threads)


ROW_SUMS = Kernel(
    entry="row_sums",
    headers=("metal_stdlib",),
    sources=("codes", "scoring", "row_sums"),
    buffers={
        "out": Buffer("const T", row="head_dim_v"),
        "delta": Buffer("float"),
        "dlse": Buffer("const float", optional=True),
        "dout": Buffer("const T", row="head_dim_v"),
        "back": Buffer("T", row="head_dim_v"),
    },
    optional=("cu_seqlens_q", "seqused_q"),
    grid=grid,
    threads=lambda variant: variant.threads,
    parameters=("times", "less"),
)


@pytest.fixture(autouse=True)
def _text(monkeypatch):
    ours = specialization._text
    monkeypatch.setattr(specialization, "_text", lambda name: TEXT if name == "row_sums" else ours(name))


def tensors(p, **changes):
    shape, rows = p.out_shape, p.lse_shape
    return {
        "out": torch.randn(shape).to(p.v.dtype),
        "dout": torch.randn(shape).to(p.v.dtype),
        "delta": torch.full(rows, math.nan),
        "dlse": torch.randn(rows),
        "back": torch.full(shape, math.nan, dtype=p.v.dtype),
        **changes,
    }


def enqueue(p, buffers):
    return launch.enqueue(ROW_SUMS, p, Variant(16), buffers, {"less": -3, "times": 2})


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("storage", ["dense", "varlen", "varlen-used"])
def test_a_kernel_of_its_own_buffers_and_parameters(storage, with_dlse):
    call = draw(Spec([(33, 9)] * 2 if storage == "dense" else [(33, 9), (0, 4), (20, 7)], (16, 24), storage=storage))
    given = tensors(call.problem, **({} if with_dlse else {"dlse": None}))
    turned = given["dout"].mT.contiguous().mT  # the elements of a row lie apart: the launch copies what is read
    with observe():
        assert enqueue(call.problem, {**given, "dout": turned})
    expected = (given["out"].double() * given["dout"].double()).sum(-1).transpose(-1, -2) * 2 - 3
    if with_dlse:
        expected -= given["dlse"]
    written = torch.zeros(call.problem.out_shape[:-1], dtype=torch.bool)
    for sequence in call.sequences:
        written[sequence.place] = True
    torch.testing.assert_close(given["delta"].double()[written.mT], expected[written.mT], rtol=1e-4, atol=1e-4)
    assert torch.equal(given["back"][written], given["dout"].flip(-1)[written])
    assert given["delta"][~written.mT].isnan().all()


def test_an_output_whose_rows_lie_apart_is_refused():
    """A copy of it would take what the kernel writes."""
    p = draw(Spec([(9, 9)], (16, 24))).problem
    apart = torch.empty(1, 9, 4, 48, dtype=p.v.dtype)[..., ::2]
    with pytest.raises(ValueError, match=r"row_sums writes back: its last dimension must be contiguous.*2\)"):
        enqueue(p, tensors(p, back=apart))


def test_rows_are_as_aligned_as_the_least_aligned_tensor_of_their_kind():
    p = draw(Spec([(9, 9)], (16, 24), torch.float16)).problem
    memory = torch.zeros(9 * 4 * 24 + 8, dtype=torch.float16)

    def vectors(offset):
        apart = memory[offset : offset + 9 * 4 * 24].view(p.out_shape)
        given = tensors(p, dout=apart)
        asked, _ = launch.arguments(ROW_SUMS, p, Variant(16), given, {"less": 0, "times": 1})
        return asked.vector_v

    assert [vectors(offset) for offset in (0, 1, 2, 4)] == [8, 1, 2, 4]


def test_a_buffer_that_is_forgotten_is_missed():
    p = draw(Spec([(9, 9)], (16, 24))).problem
    given = tensors(p)
    with pytest.raises(ValueError, match="row_sums needs dout, got None"):
        enqueue(p, {**given, "dout": None})
    del given["dout"]
    with pytest.raises(KeyError, match="dout"):
        enqueue(p, given)
    with pytest.raises(KeyError, match="less"):
        launch.enqueue(ROW_SUMS, p, Variant(16), tensors(p), {"times": 2})


def test_outside_the_outputs_nothing_is_written():
    p = draw(Spec([(9, 9)], (16, 24))).problem
    with observe(), pytest.raises(KernelFault):
        enqueue(p, tensors(p, delta=torch.zeros(1)))
