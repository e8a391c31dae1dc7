"""What a launch passes to a kernel: parameters in the kernel's order, strides and offsets of any size."""

import mmap
import struct
from unittest import mock

import pytest
import torch

from flash_attn_mps.problem import AttentionProblem, Result
from flash_attn_mps.tiers.metal import compiler, launch, scalar, simdgroup, specialization
from flash_attn_mps.tiers.metal.kernel import OPTIONAL_BUFFERS, Buffer, Kernel
from flash_attn_mps.tiers.metal.simdgroup import Variant
from metal_host import observe

from .calls import Spec, draw, int32
from .test_values import KERNELS

KERNEL = (simdgroup.FORWARD, Variant(8, 2, 8, False))


def passed(problem: AttentionProblem) -> tuple[tuple, dict]:
    """The arguments of the kernel, by position and by name."""
    kernel = mock.Mock()
    with mock.patch.object(compiler, "kernel", return_value=kernel):
        launch.run(problem, *KERNEL)
    return kernel.call_args


def as_a_kernel_reads(p: AttentionProblem, values: list[str]) -> list[int]:
    """What `values`, Metal expressions, are in a kernel that has the buffers of a forward pass and one more."""
    probe = Kernel(
        entry="probe",
        headers=("metal_stdlib",),
        sources=("probe",),
        buffers={**launch.FORWARD_BUFFERS, "read": Buffer("long")},
        optional=tuple(OPTIONAL_BUFFERS),
        grid=lambda _p, _variant: ((1, 1, 1), (1, 1, 1)),
        threads=lambda _: 1,
    )
    lines = " ".join(f"read[{i}] = long({value});" for i, value in enumerate(values))
    text = f"kernel void probe(BUFFERS uint i [[thread_position_in_grid]]) {{ Inputs in = INPUTS; {lines} }}"
    result, read = launch.outputs(p), torch.zeros(len(values), dtype=torch.int64)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": result.out, "lse": result.lse, "read": read}
    with mock.patch.object(specialization, "_text", lambda _name: text):
        assert launch.enqueue(probe, p, scalar.VARIANT, tensors)
    return read.tolist()


def bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def test_parameters_are_what_their_names_say():
    """Every value of this call is another number, so none can stand in another's place."""
    memory = torch.zeros(10_000)
    q = memory.as_strided((2, 11, 6, 8), (701, 61, 9, 1))
    k = memory.as_strided((2, 13, 3, 8), (703, 51, 10, 1))
    v = memory.as_strided((2, 13, 3, 16), (705, 52, 17, 1))
    mask = torch.zeros(10_000, dtype=torch.bool).as_strided((2, 6, 11, 13), (801, 131, 19, 4))
    dense = AttentionProblem(
        q,
        k,
        v,
        2,
        11,
        13,
        0.3,
        window_left=5,
        window_right=7,
        softcap=1.7,
        alibi_slopes=torch.zeros(2, 6),
        mask=mask,
        k_descale=memory.as_strided((2, 3), (21, 5)),
        v_descale=memory.as_strided((2, 3), (23, 3)),
        want_lse=True,
        dropout_p=0.25,
        seed=(5 << 32) + 3,
    )
    of_dense = {
        "SEQLEN_Q": 11,
        "SEQLEN_K": 13,
        "TOTAL_Q": 2,
        "BATCH": 2,
        "HEADS_PER_KV_HEAD": 2,
        "HEADS": 6,
        **{"SEED": (5 << 32) + 3, "DROPOUT_THRESHOLD": 1 << 14, "DROPOUT_SCALE": bits(4 / 3)},
        **{"Q_BATCH": 701, "Q_ROW": 61, "Q_HEAD": 9},
        **{"K_BATCH": 703, "K_ROW": 51, "K_HEAD": 10},
        **{"V_BATCH": 705, "V_ROW": 52, "V_HEAD": 17},
        **{"OUT_BATCH": 11 * 6 * 16, "OUT_ROW": 6 * 16, "OUT_HEAD": 16},
        **{"LSE_BATCH": 66, "LSE_HEAD": 11},
        **{"WINDOW_LEFT": 5, "WINDOW_RIGHT": 7, "SOFTMAX_SCALE": bits(0.3), "SOFTCAP": bits(1.7), "ALIBI_BATCH": 6},
        **{"PAGE_SIZE": 0, "BLOCK_TABLE_ROW": 0},
        **{"MASK_BATCH": 801, "MASK_HEAD": 131, "MASK_ROW": 19, "MASK_COLUMN": 4},
        **{"K_DESCALE_BATCH": 21, "K_DESCALE_HEAD": 5, "V_DESCALE_BATCH": 23, "V_DESCALE_HEAD": 3},
    }
    packed = AttentionProblem(
        q[0],
        memory.as_strided((4, 13, 3, 8), (703, 51, 10, 1)),
        memory.as_strided((4, 13, 3, 16), (705, 52, 17, 1)),
        1,
        11,
        13,
        0.3,
        cu_seqlens_q=int32([0, 11]),
        seqused_k=int32([13]),
        block_table=torch.zeros(1, 5, dtype=torch.int32),
        want_lse=True,
    )
    of_packed = {
        **of_dense,
        **{"TOTAL_Q": 11, "BATCH": 1, "Q_BATCH": 0, "OUT_BATCH": 0, "LSE_BATCH": 0, "LSE_HEAD": 11},
        **{"WINDOW_LEFT": -1, "WINDOW_RIGHT": -1, "SOFTCAP": 0},
        **dict.fromkeys(("SEED", "DROPOUT_THRESHOLD", "DROPOUT_SCALE"), 0),
        **{"ALIBI_BATCH": 0, "PAGE_SIZE": 13, "BLOCK_TABLE_ROW": 5},
        **dict.fromkeys((name for name in of_dense if name.startswith(("MASK", "K_DESCALE", "V_DESCALE"))), 0),
    }
    assert set(specialization.parameter_names(simdgroup.FORWARD)) == set(of_dense)
    for problem, expected in ((dense, of_dense), (packed, of_packed)):
        read = as_a_kernel_reads(problem, [f"params[{name}]" for name in expected])
        assert dict(zip(expected, read, strict=True)) == expected


def test_optional_buffers_arrive_in_the_order_of_their_names():
    call = draw(Spec([(5, 9), (5, 7)], storage="cache", alibi="BH", sinks=True, mask="bool", scale=torch.tensor(0.5)))
    p = call.problem
    expected = [p.seqused_k, p.kv_batch_idx, p.leftpad_k, p.alibi_slopes, p.sinks, p.mask, p.softmax_scale]
    given = passed(p).args[6:]
    assert len(given) == len(expected)
    assert all(a is b for a, b in zip(given, expected, strict=True))


def test_optional_buffers_are_what_their_names_say():
    """The first element of each is another number."""
    p = draw(
        Spec([(5, 9), (5, 7)], dtype=torch.float32, storage="varlen-used", alibi="BH", sinks=True, mask="same")
    ).problem
    p.softmax_scale = torch.tensor(0.0)
    first = {"cu_seqlens_q": 2, "cu_seqlens_k": 3, "seqused_q": 4, "seqused_k": 5, "alibi_slopes": 6, "sinks": 7}
    first |= {"mask": 8, "softmax_scale": 9}
    for name, value in first.items():
        getattr(p, name)[(0,) * getattr(p, name).dim()] = value
    assert as_a_kernel_reads(p, [f"in.{name}[0]" for name in first]) == list(first.values())
    p = draw(Spec([(5, 9), (5, 7)], storage="cache")).problem
    p.block_table = torch.tensor([[12, 1], [2, 3]], dtype=torch.int32)
    first = {"kv_batch_idx": 10, "leftpad_k": 11, "block_table": 12, "seqused_k": 13}
    for name, value in first.items():
        getattr(p, name)[(0,) * getattr(p, name).dim()] = value
    assert as_a_kernel_reads(p, [f"in.{name}[0]" for name in first]) == list(first.values())


@pytest.fixture(scope="module")
def far_memory():
    """fp16 memory of more than 2 ** 31 elements, of which the system provides the pages that are touched."""
    size = 2 * ((1 << 31) + (1 << 20))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16)
    return memory


def far(memory, x, axis, base):
    """x in `memory`, with its entries along `axis` (of length 2) more than 2 ** 31 elements apart."""
    strides = list(x.contiguous().stride())
    strides[axis] = (1 << 31) + 1024
    view = memory.as_strided(x.shape, strides, base)
    view.copy_(x)
    return view


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "row", "head"])
@pytest.mark.parametrize("operand", ["q", "k", "v", "out"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_offsets_beyond_2_to_the_31(kernel, operand, axis, far_memory):
    call = draw(Spec([(2, 2)] * 2, (16, 16), torch.float16, heads=(2, 2)))
    p = call.problem
    if operand != "out":
        setattr(p, operand, far(far_memory, getattr(p, operand), axis, 0))
        call.check(launch.run(p, *kernel))
        return
    # Outputs are contiguous; so large a one is stood in for by one that is far apart.
    result = torch.full(p.out_shape, -7.0, dtype=torch.float16)
    out = far(far_memory, result, axis, 0)
    compiled = compiler.kernel

    def with_far_out(asked):
        def call_kernel(*arguments, **how):
            arguments = list(arguments)
            arguments[3] = out
            names = specialization.parameter_names(kernel[0])
            for name, stride in zip(("OUT_BATCH", "OUT_ROW", "OUT_HEAD"), out.stride(), strict=False):
                arguments[5][names.index(name)] = stride
            compiled(asked)(*arguments, **how)

        return call_kernel

    with mock.patch.object(compiler, "kernel", with_far_out):
        lse = launch.run(p, *kernel).lse
    call.check(Result(out.contiguous(), lse))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_pages_beyond_2_to_the_31(kernel, far_memory):
    call = draw(Spec([(3, 9), (2, 16)], (16, 16), torch.float16, storage="paged", page_size=16))
    p = call.problem
    for name, base in (("k", 0), ("v", 1 << 16)):
        near = getattr(p, name)  # 4 pages: two of them far, at places that overlap with the near ones nowhere
        stride = 16 * 2 * 16
        view = far_memory.as_strided(near.shape, (stride, *near.stride()[1:]), (1 << 31) + base)
        view.copy_(near)
        page = far_memory.as_strided(((1 << 31) // stride + 200, *near.shape[1:]), (stride, *near.stride()[1:]), base)
        setattr(p, name, page)
    used = p.block_table < 1 << 30
    p.block_table[used] += (1 << 31) // (16 * 2 * 16)
    call.check(launch.run(p, *kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_masks_beyond_2_to_the_31(kernel, far_memory):
    call = draw(Spec([(2, 9)] * 2, (16, 16), torch.float16, heads=(2, 2), mask="same"))
    call.problem.mask = far(far_memory, call.problem.mask, 2, 0)
    call.check(launch.run(call.problem, *kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_last_dimensions_of_stride_zero(kernel):
    call = draw(Spec([(9, 20)], (16, 16), torch.float16))
    p = call.problem
    p.q, p.k = (t[..., :1].expand(t.shape) for t in (p.q, p.k))
    (s,) = call.sequences
    s.q, s.k = (t[..., :1].expand(t.shape) for t in (s.q, s.k))
    with observe():
        call.check(launch.run(p, *kernel))


@pytest.mark.parametrize("offset", range(1, 9))
def test_every_storage_offset(offset):
    """Rows aligned to 2, 4, 8 or 16 bytes: vectors of the width that the offset of each operand leaves."""
    call = draw(Spec([(9, 20)], (32, 64), torch.float16))
    p = call.problem
    for n, name in enumerate("qkv"):
        near = getattr(p, name)
        memory = torch.full((near.numel() + 16,), float("nan"), dtype=near.dtype)
        view = memory[(place := offset if n == offset % 3 else 0) : place + near.numel()].view(near.shape)
        setattr(p, name, view.copy_(near))
    with observe():
        call.check(launch.run(p, *KERNEL))


def test_many_sequences_in_one_launch():
    """The tiles of 150 sequences, many of them empty, are found by search: each query is written once and right."""
    lengths = [(n * n % 23 if n % 3 else 0, n * 7 % 31) for n in range(150)]
    for kernel in KERNELS:
        call = draw(Spec(lengths, (16, 16), torch.float16, storage="varlen", window=(-1, 0)))
        with observe() as launches:
            result = launch.run(call.problem, *kernel)
        assert len(launches) == 1
        call.check(result)
