"""`flash_attn.ops.triton.layer_norm`, without triton: layer norm and RMS norm of a sum, on torch's fused norms.

The sum `rowscale * x`, dropped out, `+ x1`, dropped out, `+ residual` is made and normalised in fp32, whatever the
dtypes of its terms; it is rounded only where it is returned. Autograd derives the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | Any:
    """What `layer_norm_fn` computes, step by step in the dtype of `x` (fp32 if `upcast`), with given dropout masks."""
    return _norm_ref(
        lambda x, weight, bias: F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps),
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        prenorm,
        zero_centered_weight,
        dropout_mask,
        dropout_mask1,
        upcast,
    )


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | Any:
    """What `rms_norm_fn` computes, step by step; see `layer_norm_ref`."""

    def norm(x, weight, bias):
        out = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
        return out if bias is None else out + bias

    return _norm_ref(
        norm,
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        prenorm,
        zero_centered_weight,
        dropout_mask,
        dropout_mask1,
        upcast,
    )


def _norm_ref(
    norm,
    x,
    weight,
    bias,
    residual,
    x1,
    weight1,
    bias1,
    dropout_p,
    rowscale,
    prenorm,
    zero_centered_weight,
    dropout_mask,
    dropout_mask1,
    upcast,
):
    _check_rowscale(rowscale, x1)
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1 = (
            None if t is None else t.float() for t in (x, weight, bias, residual, x1, weight1, bias1)
        )
    if zero_centered_weight:
        weight, weight1 = (None if w is None else w + 1.0 for w in (weight, weight1))
    if rowscale is not None:
        x = x * rowscale[..., None]

    def drop(x, mask):
        return F.dropout(x, dropout_p) if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    if dropout_p > 0.0:
        x = drop(x, dropout_mask)
        x1 = None if x1 is None else drop(x1, dropout_mask1)
    for term in (x1, residual):
        if term is not None:
            x = (x + term).to(x.dtype)
    outs = [norm(x, weight, bias).to(dtype)]
    if weight1 is not None:
        outs.append(norm(x, weight1, bias1).to(dtype))
    return _one_or_tuple(*outs, *([x] if prenorm else []))


class LayerNormFn:
    """The function behind `layer_norm_fn` and `rms_norm_fn`, under upstream's name."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        x1: Tensor | None = None,
        weight1: Tensor | None = None,
        bias1: Tensor | None = None,
        eps: float = 1e-6,
        dropout_p: float = 0.0,
        rowscale: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        zero_centered_weight: bool = False,
        is_rms_norm: bool = False,
        return_dropout_mask: bool = False,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> Tensor | Any:
        """See `layer_norm_fn`."""
        _check_rowscale(rowscale, x1)
        for name, term in (("residual", residual), ("x1", x1)):
            if term is not None and term.shape != x.shape:
                raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(term.shape)}")

        total, mask, mask1 = x, None, None
        if rowscale is not None:
            total = upcast(total) * rowscale.reshape(x.shape[:-1])[..., None]
        if dropout_p > 0.0:
            total, mask = dropout(total, dropout_p)
            if x1 is not None:
                x1, mask1 = dropout(x1, dropout_p)
        for term in (x1, residual):
            if term is not None:
                total = upcast(total) + upcast(term)

        dtype = x.dtype if out_dtype is None else out_dtype
        outs: list[Any] = [normalize(total, weight, bias, eps, is_rms_norm, dtype, zero_centered_weight)]
        if weight1 is not None:
            outs.append(normalize(total, weight1, bias1, eps, is_rms_norm, dtype, zero_centered_weight))
        if out is not None:
            outs[0] = out.copy_(outs[0])
        if prenorm:
            total = total.to(residual_dtype(x, residual, residual_in_fp32))
            outs.append(total if residual_out is None else residual_out.copy_(total))
        if return_dropout_mask:
            outs += [mask, mask1]
        return _one_or_tuple(*outs)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | Any:
    """Layer norm of `dropout(rowscale * x) + dropout(x1) + residual`.

    Args:
        x, residual, x1: `(..., hidden)`.
        weight, bias: `(hidden,)`, `bias` may be None. `weight1`, `bias1`: a second norm of the same sum.
        rowscale: `(...)`, one factor a row; not together with `x1`.
        prenorm: also return the sum, in the dtype of `residual`, or without one in fp32 if `residual_in_fp32`, else
            in that of `x`.
        zero_centered_weight: the weights are stored less one.
        is_rms_norm: RMS norm instead of layer norm.
        return_dropout_mask: also return which elements of `x` and of `x1` were kept: bool, None without dropout.
        out_dtype: dtype of the norms, by default that of `x`.
        out, residual_out: buffers to write the first norm and the sum to.

    Returns:
        The norm, or the tuple of those that apply of: norm, second norm, sum, mask, mask of `x1`.
    """
    return LayerNormFn.apply(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        is_rms_norm,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | Any:
    """RMS norm of `dropout(rowscale * x) + dropout(x1) + residual`; arguments and results as for `layer_norm_fn`."""
    return LayerNormFn.apply(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(nn.Module):
    """RMS norm of `dropout(x) + residual`, with `weight` `(hidden_size,)` and no bias."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | Any:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


class LayerNormLinearFn:
    """The function behind `layer_norm_linear_fn`, under upstream's name."""

    @staticmethod
    def apply(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        residual: Tensor | None = None,
        eps: float = 1e-6,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        is_rms_norm: bool = False,
    ) -> Tensor | Any:
        """See `layer_norm_linear_fn`."""
        y = LayerNormFn.apply(
            x,
            norm_weight,
            norm_bias,
            residual,
            eps=eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=is_rms_norm,
        )
        y, *total = y if prenorm else (y,)
        linear_bias = None if linear_bias is None else linear_bias.to(y.dtype)
        return _one_or_tuple(F.linear(y, linear_weight.to(y.dtype), linear_bias), *total)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | Any:
    """A linear layer on the norm of `x + residual`; with `prenorm` also the sum. Under autocast, in its dtype."""
    return LayerNormLinearFn.apply(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        prenorm,
        residual_in_fp32,
        is_rms_norm,
    )


def upcast(x: Tensor) -> Tensor:
    """fp32, or more where `x` has more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dropout(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """`(x with elements dropped and the others scaled, mask of those kept)`."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    keep = torch.rand(x.shape, device=x.device) >= dropout_p
    return torch.where(keep, upcast(x) / (1.0 - dropout_p), 0.0), keep


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    dtype: torch.dtype,
    zero_centered_weight: bool = False,
) -> Tensor:
    """Layer norm or RMS norm over the last axis of `x`, rounded to `dtype` at the end."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({x.shape[-1]},), the last axis of x, got {tuple(weight.shape)}")
    # torch's norms compute in fp32 inside, but want one dtype for all, and must not round before a bias or a cast.
    if zero_centered_weight:
        weight = upcast(weight) + 1.0
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None} | {dtype}
    if len(dtypes) > 1 or (is_rms_norm and bias is not None):
        x, weight, bias = upcast(x), upcast(weight), None if bias is None else upcast(bias)
    if not is_rms_norm:
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
    y = F.rms_norm(x, weight.shape, weight, eps)
    return (y if bias is None else y + bias).to(dtype)


def residual_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """The dtype in which a sum is returned."""
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 else x.dtype


def _check_rowscale(rowscale, x1) -> None:
    if rowscale is not None and x1 is not None:
        raise NotImplementedError("rowscale together with x1 is not supported, upstream neither")


def _one_or_tuple(*outs):
    return outs[0] if len(outs) == 1 else outs
