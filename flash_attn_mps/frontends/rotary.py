"""Rotary position embedding (RoFormer, arXiv:2104.09864): by a Metal kernel, or in torch for any device.

A pair `(x0, x1)` of one head at position `p` becomes `(x0 cos - x1 sin, x0 sin + x1 cos)`, with `cos` and `sin` read
from row `p` of two tables. The pairs are `(x[i], x[i + R/2])` (GPT-NeoX) or `(x[2i], x[2i + 1])` (GPT-J,
interleaved); elements past the rotary dimension R stay as they are. Lengths and offsets that are tensors stay on their
device: nothing here waits for it.
"""

import torch
from torch import Tensor

from .. import trace
from ..capture import capturing
from ..graph import transforms
from ..tiers.metal import rotary as kernel
from ..tiers.metal.movement import Queries, Rotary


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first `rotary_dim` elements of every head of `x` by its position.

    Args:
        x: `(batch, seqlen, nheads, head_dim)`; with `cu_seqlens`, packed sequences `(total, nheads, head_dim)`. More
            axes of heads are allowed, such as `(batch, seqlen, 2, nheads, head_dim)`. Any floating dtype, any strides.
        cos, sin: `(seqlen_ro, rotary_dim / 2)`, one row a position; the dtype may differ from that of `x`.
        seqlen_offsets: position of the first token of every sequence: an int, or an integer tensor `(batch,)`.
        cu_seqlens: `(batch + 1,)`, integer: where each packed sequence starts and the last one ends. Tokens after the
            end stay as they are.
        max_seqlen: the longest packed sequence; required with `cu_seqlens`, as upstream requires it.
        interleaved: pairs of neighbours instead of pairs of halves.
        inplace: write into `x` and return it.
        conjugate: rotate backwards, which is the gradient of the rotation.

    Returns:
        A tensor like `x`. The arithmetic is fp32 (fp64 for fp64 input) whatever the dtype of `x`. A position at or
        past `seqlen_ro`, which only offsets or lengths in a tensor can reach unseen, is not rotated.

    Raises:
        ValueError: shapes do not fit, or a position known on the host lies outside the tables.
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if not capturing(x):
        rotary = Rotary(cos, sin, interleaved, seqlen_offsets, conjugate)
        reasons = _unsupported_reasons(x, rotary, cu_seqlens, inplace)
        out = None if reasons else _by_kernel(x, rotary, cu_seqlens, inplace)
        trace.record_step("rotary embedding", reasons or kernel.NOT_COMPILED if out is None else [])
        if out is not None:
            return out
    return rotated(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, inplace, conjugate)


def _unsupported_reasons(x: Tensor, rotary: Rotary, cu_seqlens: Tensor | None, inplace: bool) -> list[str]:
    """Why the kernel does not rotate `x`, in words; empty if it does."""
    reasons = kernel.unsupported_reasons(rotary, Queries(x, x, cu_seqlens), None)
    if reasons:
        return reasons
    if x.requires_grad and torch.is_grad_enabled():
        reasons.append("autograd takes the gradient of torch's operations")
    if transforms.active():
        reasons.append("under a transform of torch.func, or in forward mode")
    indices = [t for t in (cu_seqlens, rotary.start) if isinstance(t, Tensor)]
    if any(t.device != x.device for t in (rotary.cos, rotary.sin, *indices)):
        reasons.append("tensors are on different devices")
    if any(t.dtype not in (torch.int32, torch.int64) for t in indices):
        reasons.append("lengths are neither int32 nor int64")
    if _one_axis_of_heads(x, cu_seqlens) is None:
        reasons.append("the axes of the heads cannot be seen as one")
    if inplace and (x.stride(-1) != 1 or 0 in x.stride()):
        reasons.append("in place, and elements of a row are not neighbours, or rows are expanded")
    return reasons


def _one_axis_of_heads(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """A view of `x`, as a kernel takes it; None if there is none."""
    leading = 2 if cu_seqlens is None else 1
    if x.ndim == leading + 2:
        return x
    try:
        return x.view(*x.shape[:leading], -1, x.shape[-1])
    except RuntimeError:
        return None


def _by_kernel(x: Tensor, rotary: Rotary, cu_seqlens: Tensor | None, inplace: bool) -> Tensor | None:
    """None where the kernel does not compile on this machine."""
    out = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    heads = _one_axis_of_heads(x, cu_seqlens)
    assert heads is not None
    to = heads if inplace else out.view(heads.shape)
    return out if kernel.enqueue(rotary, Queries(heads, to, cu_seqlens), None) else None


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`apply_rotary` of arguments that have been checked."""
    if cu_seqlens is not None:
        positions, valid = _packed_positions(x.shape[0], cu_seqlens, seqlen_offsets)
        cos, sin = _rows(cos, sin, positions, valid)
    elif isinstance(seqlen_offsets, Tensor):
        steps = torch.arange(x.shape[1], device=x.device)
        cos, sin = _rows(cos, sin, seqlen_offsets[:, None] + steps)
    else:
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        cos, sin = cos[rows], sin[rows]

    # Head axes stand between the position axes of the rows and their last axis.
    n_head_axes = x.ndim - (2 if cu_seqlens is not None else 3)
    index = (..., *[None] * n_head_axes, slice(None))
    return _rotate(x, cos[index], sin[index], interleaved, inplace, conjugate)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool, conjugate: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    if conjugate:
        sin = -sin
    half = rotary_dim // 2
    first, second = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)) if interleaved else (slice(half), slice(half, rotary_dim))
    )
    x0, x1 = x[..., first].to(dtype), x[..., second].to(dtype)
    # Both results exist before either is stored: in place, the first store changes x0.
    o0, o1 = x0 * cos - x1 * sin, x0 * sin + x1 * cos

    out = _memory(x) if inplace else torch.empty_like(x)
    out[..., first] = o0
    out[..., second] = o1
    if inplace:
        return x
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def _memory(x: Tensor) -> Tensor:
    """`x` to write to; for a view, without the version counter that all views of a tensor share in autograd.

    Callers rotate q in its part of a qkv tensor, and then k in its own (upstream's `MHA` with fewer heads for k): the
    second write must not make autograd reject the first result. Upstream's kernels do not bump the counter either.
    """
    if not torch.compiler.is_compiling() and not x._is_view():
        return x
    return x.data


def _packed_positions(total: int, cu_seqlens: Tensor, seqlen_offsets: int | Tensor) -> tuple[Tensor, Tensor]:
    """The position of each packed token, and whether the token belongs to a sequence at all; both `(total,)`."""
    batch = cu_seqlens.shape[0] - 1
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    valid = (sequence < batch) & (tokens >= cu_seqlens[0])
    sequence = sequence.clamp(max=batch - 1)
    offsets = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return tokens - cu_seqlens[sequence] + offsets, valid


def _rows(cos: Tensor, sin: Tensor, positions: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of the tables at `positions`; where a position is not valid or has no row, cos 1 and sin 0."""
    seqlen_ro = cos.shape[0]
    inside = (positions >= 0) & (positions < seqlen_ro)
    if valid is not None:
        inside = inside & valid
    inside = inside[..., None]
    index = positions.clamp(0, seqlen_ro - 1).long()
    return cos[index].masked_fill(~inside, 1.0), sin[index].masked_fill(~inside, 0.0)


def _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen) -> None:
    packed = cu_seqlens is not None
    layout = "(total, nheads, head_dim)" if packed else "(batch, seqlen, nheads, head_dim)"
    if x.ndim < (3 if packed else 4):
        raise ValueError(f"x must be {layout}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, got {x.dtype}")
    if cos.ndim != 2 or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must both be (seqlen_ro, rotary_dim / 2), got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise ValueError(f"cos and sin must be of a floating dtype, got {cos.dtype} and {sin.dtype}")
    seqlen_ro, half = cos.shape
    if 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos and sin have {half} columns, a rotary_dim of {2 * half}: "
            f"x must have a head_dim of at least that, got {x.shape[-1]}"
        )
    if packed:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be (batch + 1,), integer, got {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given with cu_seqlens, got None")
    batch = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    seqlen = max_seqlen if packed else x.shape[1]
    if isinstance(seqlen_offsets, Tensor):
        if seqlen_offsets.shape != (batch,) or seqlen_offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"seqlen_offsets must be an int or an int32 or int64 tensor of shape ({batch},), "
                f"got {tuple(seqlen_offsets.shape)}, {seqlen_offsets.dtype}"
            )
        first = 0
    else:
        first = seqlen_offsets
        if first < 0:
            raise ValueError(f"seqlen_offsets must not be negative, got {first}")
    # A max_seqlen that is a tensor is on the device, and reading it would wait for the device.
    if not isinstance(seqlen, Tensor) and first + seqlen > seqlen_ro:
        raise ValueError(f"cos and sin have {seqlen_ro} rows, but positions up to {first + seqlen - 1} are asked for")
