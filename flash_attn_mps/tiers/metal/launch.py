"""From an `AttentionProblem` to a kernel and its arguments: shared by the tiers that run in Metal."""

from __future__ import annotations

import operator
import struct

import torch

from ...problem import AttentionProblem, Result
from . import compiler
from .specialization import OPTIONAL_BUFFERS, Mask, Specialization, Variant

_TYPES = {
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.float32: "float",
    torch.bool: "uchar",
    torch.int32: "int",
    torch.int64: "long",
}
MAX_HEAD_DIM = 256
_INT, _FLOAT = struct.Struct("<i"), struct.Struct("<f")
_OF_PROBLEM = operator.attrgetter(*OPTIONAL_BUFFERS)


# What every Metal kernel for attention honours. (A kernel's gradient is another tier's.)
FEATURES = frozenset(
    {
        "causal",
        "window",
        "softcap",
        "alibi",
        "varlen",
        "seqused",
        "paged",
        "kv_batch_idx",
        "leftpad_k",
        "mask",
        "sinks",
        "scale_tensor",
        "gradients",
    }
)


def limits(p: AttentionProblem) -> list[str]:
    """Why no Metal kernel serves `p` although they serve its features, in words."""
    if p.q.device.type not in compiler.device_types:
        return [f"tensors are on {p.q.device}"]
    reasons = []
    if p.empty:
        reasons.append("there are no scores")
    if p.q.shape[-1] > MAX_HEAD_DIM or p.v.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim above {MAX_HEAD_DIM}")
    if "scale_tensor" in p.features and p.softmax_scale.dtype not in _TYPES:
        reasons.append("softmax_scale is a tensor of another dtype than float")
    return reasons


def run(p: AttentionProblem, entry: str, variant: Variant) -> Result | None:
    """One launch, without waiting for it. None where the kernel does not compile on this machine."""
    q, k, v = _with_whole_rows(p.q), _with_whole_rows(p.k), _with_whole_rows(p.v)
    buffers = optional_buffers(p)
    kernel = compiler.kernel(specialize(p, q, k, v, buffers, entry, variant))
    if kernel is None:
        return None
    result = outputs(p)
    out, lse = result.out, result.lse
    threads, group_size = grid(p, entry, variant)
    kernel(
        q,
        k,
        v,
        out,
        out if lse is None else lse,  # a kernel without WANT_LSE does not look
        parameters(p, q, k, v, out),
        *buffers.values(),
        threads=threads,
        group_size=group_size,
    )
    return result


def _with_whole_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def optional_buffers(p: AttentionProblem) -> dict[str, torch.Tensor]:
    """Those of `OPTIONAL_BUFFERS` that `p` has. Strides of the mask are arguments; the others are contiguous."""
    return {
        name: t if name == "mask" or t.is_contiguous() else t.contiguous()
        for name, t in zip(OPTIONAL_BUFFERS, _OF_PROBLEM(p), strict=True)
        if t is not None and isinstance(t, torch.Tensor)  # softmax_scale may be a number
    }


def specialize(
    p: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    entry: str,
    variant: Variant,
) -> Specialization:
    head_dim_v = v.shape[-1]
    return Specialization(
        entry,
        _TYPES[q.dtype],
        q.shape[-1],
        head_dim_v,
        min(_alignment(q), _alignment(k)),
        min(_alignment(v), _lowest_bit(head_dim_v)),
        p.window_left >= 0,
        p.window_right >= 0,
        p.softcap > 0,
        p.want_lse,
        tuple(buffers),
        mask_layout(p.mask) if p.mask is not None else None,
        _TYPES[p.softmax_scale.dtype] if "softmax_scale" in buffers else "float",
        variant,
    )


def mask_layout(mask: torch.Tensor) -> Mask:
    """What the kernel is compiled for: three alignments, whatever the lengths."""
    rows, columns = (0 if n == 1 else stride for n, stride in zip(mask.shape[2:], mask.stride()[2:], strict=True))
    aligned = 0
    if columns == 1:
        together = mask.storage_offset() | 16 // mask.itemsize
        for n, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True):
            together |= stride if n > 1 else 0
        aligned = (together & -together) * mask.itemsize
        aligned = 16 if aligned == 16 else 4 if aligned >= 4 else 1
    return Mask(_TYPES[mask.dtype], aligned, rows == 0, columns == 0)


def outputs(p: AttentionProblem) -> Result:
    """Memory for the results. No kernel writes the rows that no sequence has: with seqused_q there may be some."""
    q, lse = p.q, None
    if p.seqused_q is None:
        out = q.new_empty(p.out_shape)
        if p.want_lse:
            lse = q.new_empty(p.lse_shape, dtype=torch.float32)
    else:
        out = q.new_zeros(p.out_shape)
        if p.want_lse:
            lse = q.new_full(p.lse_shape, -torch.inf, dtype=torch.float32)
    return Result(out, lse)


def grid(p: AttentionProblem, entry: str, variant: Variant) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Threads in all and in a group: tiles of queries, heads, sequences. scoring.metal has the other half, tile_of."""
    threads = 32 * variant.simdgroups
    rows = variant.rows * variant.simdgroups if entry == "attention_forward" else threads
    if p.cu_seqlens_q is None:
        return (-(-p.max_seqlen_q // rows) * threads, p.heads, p.batch), (threads, 1, 1)
    return ((p.q.shape[0] // rows + p.batch) * threads, p.heads, 1), (threads, 1, 1)


def parameters(p: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> list[int]:
    """The values of `params.metal`'s names, in their order."""
    seqlen_q = p.max_seqlen_q
    heads = p.heads
    lse_batch, lse_head = (0, q.shape[0]) if p.cu_seqlens_q is not None else (heads * seqlen_q, seqlen_q)
    scale = 0.0 if isinstance(p.softmax_scale, torch.Tensor) else p.softmax_scale
    alibi_batch = heads if p.alibi_slopes is not None and p.alibi_slopes.dim() == 2 else 0
    page_size, table_row = (0, 0) if p.block_table is None else (k.shape[1], p.block_table.shape[1])
    return [
        seqlen_q,
        p.max_seqlen_k,
        p.batch,
        heads // p.heads_k,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        lse_batch,
        lse_head,
        # A side that a model's window leaves open at this length keeps its kernel: only the bound fits the length.
        min(p.window_left, p.max_seqlen_k),
        min(p.window_right, seqlen_q),
        _bits(scale),
        _bits(p.softcap),
        alibi_batch,
        page_size,
        table_row,
        *(p.mask.stride() if p.mask is not None else (0, 0, 0, 0)),
    ]


def _strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (0 in a packed tensor), row and head."""
    strides = t.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def _alignment(t: torch.Tensor) -> int:
    """Elements to which every row is aligned: a power of two, 16 bytes at most."""
    together = t.storage_offset() | 16 // t.itemsize
    for stride in t.stride()[:-1]:
        together |= stride
    return together & -together


def _lowest_bit(n: int) -> int:
    return n & -n if n else 16


def _bits(value: float) -> int:
    """The bits of a float32."""
    return _INT.unpack(_FLOAT.pack(value))[0]
