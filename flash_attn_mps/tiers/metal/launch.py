"""From an `AttentionProblem` to a kernel and its arguments, for every `Kernel`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ... import quantised
from ...philox import threshold
from ...problem import AttentionProblem, Result
from . import compiler, recording
from .kernel import Buffer, Grid, Kernel, Parameters
from .specialization import Mask, Specialization

TYPES = {
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.float32: "float",
    torch.bool: "uchar",
    torch.int32: "int",
    torch.int64: "long",
}
MAX_HEAD_DIM = 256
_STRIDED = frozenset({"mask", "k_descale", "v_descale"})  # their strides are parameters; the others are contiguous
_INT, _FLOAT = struct.Struct("<i"), struct.Struct("<f")
_NO_MORE: Mapping[str, int] = MappingProxyType({})


def limits(p: AttentionProblem, widest: int = MAX_HEAD_DIM) -> list[str]:
    """Why no Metal kernel for head dims up to `widest` serves `p` although it serves its features, in words."""
    if p.q.device.type not in compiler.device_types:
        return [f"tensors are on {p.q.device}"]
    reasons = []
    if p.empty:
        reasons.append("there are no scores")
    if p.q.shape[-1] > widest or p.v.shape[-1] > widest:
        reasons.append(f"head_dim above {widest}")
    if isinstance(p.softmax_scale, torch.Tensor) and p.softmax_scale.dtype not in TYPES:
        reasons.append("softmax_scale is a tensor of another dtype than float")
    return reasons


# What kernels on matrix units begin with: who has which elements of a tile, and how they are loaded. Behind their own
# fragments those of the forward pass have scores, what is visible, and keys.
LANE_SOURCES = ("codes", "lanes", "elements")
FORWARD_SOURCES = ("scoring", "philox", "dropout", "range", "masking", "kept", "keys")
FORWARD_BUFFERS = {
    "q": Buffer("const T", row="head_dim"),
    "k": Buffer("const KV_T", row="head_dim"),
    "v": Buffer("const KV_T", row="head_dim_v"),
    "out": Buffer("T", row="head_dim_v"),
    "lse": Buffer("float", optional=True),
}


def run(p: AttentionProblem, kernel: Kernel, variant: Any) -> Result | None:
    """The forward pass, by a kernel of `FORWARD_BUFFERS`. None where that is not to be used on this machine."""
    result = outputs(p)
    tensors = {"q": p.q, "k": p.k, "v": p.v, "out": result.out, "lse": result.lse}
    return result if enqueue(kernel, p, variant, tensors) else None


def enqueue(
    kernel: Kernel,
    p: AttentionProblem,
    variant: Any,
    tensors: Mapping[str, torch.Tensor | None],
    parameters: Mapping[str, int] = _NO_MORE,
) -> bool:
    """One launch, without waiting for it. False where the kernel is not to be used on this machine.

    `tensors`: the kernel's own buffers; `parameters`: the values of its own parameters, by name.
    """
    specialization, values = arguments(kernel, p, variant, tensors, parameters)
    compiled = compiler.kernel(specialization)
    if compiled is None:
        return False
    threads, group_size = kernel.grid(p, variant)
    recording.enqueue(compiled, values, threads, group_size)
    return True


def arguments(
    kernel: Kernel,
    p: AttentionProblem,
    variant: Any,
    tensors: Mapping[str, torch.Tensor | None],
    parameters: Mapping[str, int] = _NO_MORE,
) -> tuple[Specialization, list[Any]]:
    """What the kernel is compiled for, and what it is called with: see `Specialization.source`."""
    q, scale = p.q, p.softmax_scale
    given: list[str] = []
    values: list[Any] = []
    params: list[Any] = [*problem_parameters(p)]
    # Offsets and strides, or-ed: the lowest bit set is what all rows of head_dim, or head_dim_v, are aligned to.
    aligned: Any = 16 // q.itemsize
    aligned_v: Any = aligned
    for name, (_, dim, optional) in kernel.buffers.items():
        t = tensors[name]
        if optional:
            if t is None:
                params += (0, 0, 0) if dim else ()
                continue
            given.append(name)
        elif t is None:
            raise ValueError(f"{kernel.entry} needs {name}, got None")
        values.append(t)
        if not dim:
            continue
        steps = t.stride()
        if steps[-1] != 1:
            t = values[-1] = _copied(t, name, kernel)
            steps = t.stride()
        batch, row, head, _ = steps if len(steps) == 4 else (0, *steps)
        params += (batch, row, head)
        if dim == "head_dim":
            aligned |= t.storage_offset() | batch | row | head
        else:
            aligned_v |= t.storage_offset() | batch | row | head
    for name in kernel.parameters:
        params.append(parameters[name])
    values.append(params)
    for name in kernel.optional:
        t = getattr(p, name)
        if t is None or not isinstance(t, torch.Tensor):  # softmax_scale may be a number
            continue
        given.append(name)
        values.append(t if name in _STRIDED or t.is_contiguous() else t.contiguous())
    specialization = Specialization(
        kernel,
        TYPES[q.dtype],
        "" if p.k.dtype is q.dtype else quantised.FORMATS[p.k.dtype].name,
        q.shape[-1],
        p.v.shape[-1],
        aligned & -aligned,
        aligned_v & -aligned_v,
        p.window_left >= 0,
        p.window_right >= 0,
        p.softcap > 0,
        p.dropout_p > 0,
        tuple(given),
        mask_layout(p.mask) if p.mask is not None else None,
        TYPES[scale.dtype] if isinstance(scale, torch.Tensor) else "float",
        variant,
    )
    return specialization, values


def _copied(t: torch.Tensor, name: str, kernel: Kernel) -> torch.Tensor:
    """`t` with the elements of a row next to each other."""
    if not kernel.buffers[name].type.startswith("const"):
        raise ValueError(
            f"{kernel.entry} writes {name}: its last dimension must be contiguous, got strides {t.stride()}"
        )
    return t.contiguous()


def mask_layout(mask: torch.Tensor) -> Mask:
    """What the kernel is compiled for: three alignments, whatever the lengths."""
    batch, heads, rows, columns = mask_strides(mask)
    aligned = 0
    if columns == 1:
        together = mask.storage_offset() | 16 // mask.itemsize | batch | heads | rows
        aligned = (together & -together) * mask.itemsize
        aligned = 16 if aligned == 16 else 4 if aligned >= 4 else 1
    return Mask(TYPES[mask.dtype], aligned, rows == 0, columns == 0)


def mask_strides(mask: torch.Tensor) -> list[Any]:
    """Of batch, heads, rows and columns: 0 where it is broadcast."""
    return [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]


def outputs(p: AttentionProblem) -> Result:
    """Memory for the results. Kernels write every row of it, also those that no sequence has."""
    q = p.q
    return Result(q.new_empty(p.out_shape), q.new_empty(p.lse_shape, dtype=torch.float32) if p.want_lse else None)


def tiles_of_queries(p: AttentionProblem, rows: int, threads: int) -> Grid:
    """A group of `threads` for each tile of `rows` queries, head and sequence; must match tile_of in scoring.metal."""
    if p.cu_seqlens_q is None:
        return (-(-p.max_seqlen_q // rows) * threads, p.heads, p.batch), (threads, 1, 1)
    return ((p.q.shape[0] // rows + p.batch) * threads, p.heads, 1), (threads, 1, 1)


def problem_parameters(p: AttentionProblem) -> Parameters:
    seqlen_q = p.max_seqlen_q
    heads, scale = p.heads, p.softmax_scale
    lse_batch, lse_head = (0, p.q.shape[0]) if p.cu_seqlens_q is not None else (heads * seqlen_q, seqlen_q)
    page_size, block_table_row = (0, 0) if p.block_table is None else (p.k.shape[1], p.block_table.shape[1])
    mask_batch, mask_head, mask_row, mask_column = (0, 0, 0, 0) if p.mask is None else mask_strides(p.mask)
    k_descale_batch, k_descale_head = (0, 0) if p.k_descale is None else p.k_descale.stride()
    v_descale_batch, v_descale_head = (0, 0) if p.v_descale is None else p.v_descale.stride()
    return Parameters(
        seqlen_q=seqlen_q,
        seqlen_k=p.max_seqlen_k,
        total_q=p.q.shape[0],
        batch=p.batch,
        heads=heads,
        heads_per_kv_head=heads // p.heads_k,
        lse_batch=lse_batch,
        lse_head=lse_head,
        # A window wider than the sequence stays a window: what a kernel is compiled for must not depend on the length.
        window_left=min(p.window_left, p.max_seqlen_k),
        window_right=min(p.window_right, seqlen_q),
        softmax_scale=float_bits(0.0 if isinstance(scale, torch.Tensor) else scale),
        softcap=float_bits(p.softcap),
        seed=int(p.seed),
        dropout_threshold=threshold(p.dropout_p) if p.dropout_p else 0,
        dropout_scale=float_bits(1.0 / (1.0 - p.dropout_p)) if p.dropout_p else 0,
        alibi_batch=heads if p.alibi_slopes is not None and p.alibi_slopes.dim() == 2 else 0,
        page_size=page_size,
        block_table_row=block_table_row,
        mask_batch=mask_batch,
        mask_head=mask_head,
        mask_row=mask_row,
        mask_column=mask_column,
        k_descale_batch=k_descale_batch,
        k_descale_head=k_descale_head,
        v_descale_batch=v_descale_batch,
        v_descale_head=v_descale_head,
    )


def float_bits(value: float) -> int:
    """The bits of a float32, as a parameter has them."""
    if not value:
        return 0
    return _INT.unpack(_FLOAT.pack(value))[0]
