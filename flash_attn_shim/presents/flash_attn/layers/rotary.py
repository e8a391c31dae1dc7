"""`flash_attn.layers.rotary`: rotary position embedding as differentiable functions and as a module."""

from __future__ import annotations

from typing import Any

import flash_attn_shim.needs_torch  # noqa: F401

# isort: split
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from flash_attn.ops.triton.rotary import apply_rotary


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """`(x0, x1) -> (-x1, x0)` for every pair of the last axis: pairs of halves, or of neighbours if `interleaved`."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x0, x1 = x.chunk(2, dim=-1)
    return torch.cat((-x1, x0), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate in the dtype of the arguments, as plain differentiable torch.

    Args:
        x: `(batch, seqlen, nheads, head_dim)`.
        cos, sin: `(seqlen, rotary_dim / 2)` or `(batch, seqlen, rotary_dim / 2)`.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos asks for a rotary_dim of {rotary_dim}; x has a head_dim of only {x.shape[-1]}")
    pattern = "... d -> ... 1 (d 2)" if interleaved else "... d -> ... 1 (2 d)"
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat(
        [rotary * repeat(cos, pattern) + rotate_half(rotary, interleaved) * repeat(sin, pattern), rest], -1
    )


class ApplyRotaryEmb(torch.autograd.Function):
    """`apply_rotary` with the rotation backwards as its gradient; `cos` and `sin` get none.

    In place, `x` is deliberately not marked dirty: upstream does not either, so that leaves that require a gradient
    and slices made by `chunk` or `unbind` can be rotated in place. The gradient flows through the returned tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        _save(ctx, seqlen_offsets, cos, sin, cu_seqlens)
        ctx.interleaved = interleaved
        ctx.max_seqlen = max_seqlen
        return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        # Never in place: autograd may hand the same gradient to others, and an expanded one has no memory of its own.
        seqlen_offsets, cos, sin, cu_seqlens = _saved(ctx)
        dx = apply_rotary(do, cos, sin, seqlen_offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, conjugate=True)
        return dx, None, None, None, None, None, None, None


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first `rotary_dim` elements of every head; the gradient for `x` is the rotation backwards.

    Args:
        x: `(batch, seqlen, nheads, head_dim)`, or `(total, nheads, head_dim)` with `cu_seqlens`.
        cos, sin: `(seqlen_ro, rotary_dim / 2)`.
        interleaved: pairs of neighbours (GPT-J) instead of pairs of halves (GPT-NeoX).
        inplace: write into `x`; use the returned tensor, gradients flow through it alone.
        seqlen_offsets: position of the first token, an int or `(batch,)`.
        cu_seqlens, max_seqlen: bounds `(batch + 1,)` and the greatest length of packed sequences.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    return ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


apply_rotary_emb_func = apply_rotary_emb


def _apply_rotary_emb_qkv(
    qkv,
    cos,
    sin,
    cos_k=None,
    sin_k=None,
    interleaved=False,
    inplace=False,
    conjugate=False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
):
    """Rotate q and k of a packed tensor (see `apply_rotary_emb_qkv_`) and leave v."""
    if not inplace:
        qkv = qkv.clone()
    if qkv.ndim == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv must be (batch, seqlen, 3, nheads, head_dim), got {tuple(qkv.shape)}")
        n_q, n_qk = 1, 2
    elif qkv.ndim == 4:
        if num_heads_q is None:
            raise ValueError(f"num_heads_q must be given for a qkv of shape {tuple(qkv.shape)}, got None")
        n_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or n_k < 0:
            raise ValueError(
                f"qkv must have num_heads_q + 2 * num_heads_k heads, got {qkv.shape[2]} with {num_heads_q=}"
            )
        n_q, n_qk = num_heads_q, num_heads_q + n_k
    else:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, nheads, head_dim) or "
            f"(batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim), got {tuple(qkv.shape)}"
        )
    if cos_k is None and sin_k is None:
        parts = [(slice(n_qk), cos, sin)]
    else:
        parts = [
            (slice(n_q), cos, sin),
            (slice(n_q, n_qk), cos if cos_k is None else cos_k, sin if sin_k is None else sin_k),
        ]
    for part, part_cos, part_sin in parts:
        apply_rotary(
            qkv[:, :, part],
            part_cos,
            part_sin,
            seqlen_offsets=seqlen_offsets,
            interleaved=interleaved,
            inplace=True,
            conjugate=conjugate,
        )
    return qkv


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    """In-place rotation of q and k inside a packed qkv."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
    ) -> Tensor:
        _save(ctx, seqlen_offsets, cos, sin, cos_k, sin_k)
        ctx.interleaved = interleaved
        ctx.num_heads_q = num_heads_q
        return _apply_rotary_emb_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, seqlen_offsets=seqlen_offsets, num_heads_q=num_heads_q
        )

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> Any:
        seqlen_offsets, cos, sin, cos_k, sin_k = _saved(ctx)
        dqkv = _apply_rotary_emb_qkv(
            dqkv,
            cos,
            sin,
            cos_k,
            sin_k,
            ctx.interleaved,
            conjugate=True,
            seqlen_offsets=seqlen_offsets,
            num_heads_q=ctx.num_heads_q,
        )
        return dqkv, None, None, None, None, None, None, None


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k inside `qkv`, in place.

    Args:
        qkv: `(batch, seqlen, 3, nheads, head_dim)`, or `(batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim)`
            together with `num_heads_q`.
        cos, sin: `(seqlen_ro, rotary_dim / 2)`; also for k, unless `cos_k` and `sin_k` are given.
        seqlen_offsets: position of the first token, an int or `(batch,)`.
    """
    return ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)


class ApplyRotaryEmbKV_(torch.autograd.Function):
    """In-place rotation of k inside a packed kv."""

    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
    ) -> Tensor:
        _check_kv(kv)
        _save(ctx, seqlen_offsets, cos, sin)
        ctx.interleaved = interleaved
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> Any:
        seqlen_offsets, cos, sin = _saved(ctx)
        dkv = dkv.clone()
        apply_rotary(dkv[:, :, 0], cos, sin, seqlen_offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return dkv, None, None, None, None


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k inside `kv` `(batch, seqlen, 2, nheads, head_dim)`, in place; see `apply_rotary_emb_qkv_`."""
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(nn.Module):
    """Rotary embedding of a packed qkv, or of q and a packed kv, with tables that grow with the longest sequence seen.

    Args:
        dim: the rotary dimension, at most the head dim.
        base: the base of the geometric row of frequencies.
        interleaved: pairs of neighbours (GPT-J) instead of pairs of halves (GPT-NeoX).
        scale_base: if given, xPos (arXiv:2212.10554): q is scaled up and k down with the position, per frequency.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None
        self._cos_k_cached = None
        self._sin_k_cached = None

    def _compute_inv_freq(self, device=None):
        return self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _compute_scale(self, device=None):
        return (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim + 0.4) / 1.4

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        """Make the tables hold at least `seqlen` positions, on `device`, in `dtype`."""
        cached = self._cos_cached
        fits = cached is not None and cached.device == device and cached.dtype == dtype
        if fits and seqlen <= self._seq_len_cached:
            return
        if fits and self.scale is None:
            # Generation asks for one more position at every step.
            seqlen = max(seqlen, 2 * self._seq_len_cached)
        self._seq_len_cached = seqlen
        # Tables born under inference_mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            tables = self._compute_tables(seqlen, device)
            self._cos_cached, self._sin_cached = (table.to(dtype) for table in tables[:2])
            if self.scale is not None:
                self._cos_k_cached, self._sin_k_cached = (table.to(dtype) for table in tables[2:])

    def _compute_tables(self, seqlen, device):
        """`(cos, sin)`, with xPos `(cos, sin, cos_k, sin_k)`; fp32, each `(seqlen, dim / 2)`."""
        # Angles in fp32 even if the whole module was cast to fp16 or bf16, which round positions past 2048 or 256. The
        # buffers are computed again then: casting them back would not restore them.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq()
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            return cos, sin
        scale = self.scale if self.scale.dtype == torch.float32 else self._compute_scale()
        # Centred, so that the powers stay near one at both ends.
        power = (positions - seqlen // 2) / self.scale_base
        scale = scale.to(device) ** rearrange(power, "s -> s 1")
        return cos * scale, sin * scale, cos / scale, sin / scale

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place.

        Args:
            qkv: `(batch, seqlen, 3, nheads, head_dim)`, or `(batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim)`
                together with `num_heads_q`; if `kv` is given, only q: `(batch, seqlen, nheads, head_dim)`.
            kv: `(batch, seqlen, 2, nheads_k, head_dim)`.
            seqlen_offset: position of the first token, an int or `(batch,)`. With a tensor, `max_seqlen` sizes the
                tables.
            max_seqlen: positions the tables must hold.

        Returns:
            `qkv`, or `(q, kv)` if `kv` was given.
        """
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is None and self._cos_cached is None:
            raise ValueError("max_seqlen must be given with a tensor seqlen_offset, to size the tables; got None")
        cos_k: Any = None
        sin_k: Any = None
        if max_seqlen is not None and torch.compiler.is_compiling():
            # Part of the graph: one that took them from here would hold only until they grow.
            cos, sin, *scaled = (table.to(qkv.dtype) for table in self._compute_tables(max_seqlen, qkv.device))
            if scaled:
                cos_k, sin_k = scaled
        else:
            if max_seqlen is not None:
                self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
            cos, sin = self._cos_cached, self._sin_cached
            cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q=num_heads_q
            )
        if self.scale is None:
            cos_k, sin_k = cos, sin
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)


def _check_kv(kv: Tensor) -> None:
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seqlen, 2, nheads, head_dim), got {tuple(kv.shape)}")


def _save(ctx, seqlen_offsets: int | Tensor, *tensors: Tensor | None) -> None:
    is_tensor = isinstance(seqlen_offsets, Tensor)
    ctx.save_for_backward(*tensors, seqlen_offsets if is_tensor else None)
    ctx.seqlen_offsets = None if is_tensor else seqlen_offsets


def _saved(ctx) -> tuple:
    """`(seqlen_offsets, *tensors)` as they were given to `_save`."""
    *tensors, offsets = ctx.saved_tensors
    return offsets if ctx.seqlen_offsets is None else ctx.seqlen_offsets, *tensors
