"""From an `AttentionProblem` to a kernel and its arguments: shared by the tiers that run in Metal."""

from __future__ import annotations

import struct
from typing import Any

import torch

from ..problem import AttentionProblem, Result
from . import compiler
from .specialization import OPTIONAL_BUFFERS, Specialization, Variant

_TYPES = {
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.float32: "float",
    torch.bool: "bool",
    torch.int32: "int",
    torch.int64: "long",
}
MAX_HEAD_DIM = 256


def refuse(p: AttentionProblem) -> list[str]:
    """Why no Metal kernel serves `p`, in words."""
    if p.q.device.type not in compiler.device_types:
        return [f"tensors are on {p.q.device}"]
    limits = {
        "there are no scores": p.empty,
        f"head_dim above {MAX_HEAD_DIM}": max(p.q.shape[-1], p.v.shape[-1]) > MAX_HEAD_DIM,
        "dropout_p": p.dropout_p > 0,
        "attention_chunk": p.attention_chunk > 0,
        "gradients are needed": p.requires_grad,
        "softmax_scale is a tensor of another dtype than float": isinstance(p.softmax_scale, torch.Tensor)
        and p.softmax_scale.dtype not in _TYPES,
    }
    return [reason for reason, applies in limits.items() if applies]


def run(p: AttentionProblem, entry: str, variant: Variant) -> Result | None:
    """One launch, without waiting for it. None where the kernel does not compile on this machine."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (p.q, p.k, p.v))
    buffers = {name: t for name in OPTIONAL_BUFFERS if isinstance(t := getattr(p, name), torch.Tensor)}
    specialization = Specialization(
        entry,
        _TYPES[q.dtype],
        q.shape[-1],
        v.shape[-1],
        min(_alignment(q), _alignment(k)),
        min(_alignment(v), _lowest_bit(v.shape[-1])),
        p.window_left >= 0,
        p.window_right >= 0,
        p.softcap > 0,
        p.want_lse,
        tuple(buffers),
        _TYPES[p.mask.dtype] if p.mask is not None else "bool",
        _TYPES[p.softmax_scale.dtype] if "softmax_scale" in buffers else "float",
        variant,
    )
    kernel = compiler.kernel(specialization)
    if kernel is None:
        return None
    # Rows that no sequence has are not written: with seqused_q there may be some.
    make, fill = (torch.empty, None) if p.seqused_q is None else (torch.zeros, -torch.inf)
    out = make(p.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(p.lse_shape if p.want_lse else 0, dtype=torch.float32, device=q.device)
    if fill is not None:
        lse.fill_(fill)
    rows = variant.rows * variant.simdgroups if entry == "attention_forward" else 32 * variant.simdgroups
    packed = p.cu_seqlens_q is not None
    tiles = q.shape[0] // rows + p.batch if packed else -(-p.max_seqlen_q // rows)
    threads = 32 * variant.simdgroups
    kernel(
        q,
        k,
        v,
        out,
        lse,
        _parameters(p, q, k, v, out),
        *(t if t.dim() == 0 or name == "mask" else t.contiguous() for name, t in buffers.items()),
        threads=(tiles * threads, p.heads, 1 if packed else p.batch),
        group_size=(threads, 1, 1),
    )
    return Result(out, lse if p.want_lse else None)


def _parameters(p: AttentionProblem, q: Any, k: Any, v: Any, out: Any) -> list[int]:
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
        p.window_left,
        p.window_right,
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
    together = t.storage_offset()
    for stride in t.stride()[:-1]:
        together |= stride
    return min(_lowest_bit(together), 16 // t.itemsize)


def _lowest_bit(n: int) -> int:
    return n & -n if n else 16


def _bits(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
