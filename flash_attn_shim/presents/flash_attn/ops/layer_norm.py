"""`flash_attn.ops.layer_norm`: dropout, scale, add and layer norm in one call; `ops.rms_norm` builds on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.ops.triton.layer_norm import dropout, normalize, residual_dtype, upcast


class DropoutAddLayerNormFn:
    """The function behind `dropout_add_layer_norm` and `dropout_add_rms_norm`, under upstream's name."""

    @staticmethod
    def apply(
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        rowscale: Tensor | None,
        colscale: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Tensor | Any:
        """See `dropout_add_layer_norm`; `gamma` is the weight, `beta` the bias, `colscale` the layerscale."""
        branch, dmask = _branch(x0, rowscale, dropout_p, colscale)
        total = branch if residual is None else upcast(branch) + upcast(residual)
        outs = [normalize(total, gamma, beta, epsilon, is_rms_norm, x0.dtype)]
        if prenorm:
            outs.append(total.to(residual_dtype(x0, residual, residual_in_fp32)))
        if return_dmask:
            outs.append(dmask)
        return outs[0] if len(outs) == 1 else tuple(outs)


class DropoutAddLayerNormSubsetFn:
    """The function behind `dropout_add_layer_norm_subset` and `dropout_add_rms_norm_subset`, under upstream's name."""

    @staticmethod
    def apply(
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        colscale: Tensor | None,
        x0_subset: Tensor | None,
        out_subset: Tensor | None,
        dropout_p: float,
        epsilon: float,
        rowscale_const: float,
        out_numrows: int,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Tensor | Any:
        """See `dropout_add_layer_norm_subset`."""
        if (x0_subset is None) != (out_subset is None):
            raise ValueError("x0_subset and out_subset must be given together, got only one")
        subset = x0_subset is not None
        branch, dmask = _branch(x0, rowscale_const if subset else None, dropout_p, colscale)
        tail = x0.shape[1:]
        total = upcast(branch).flatten(0, -2)
        if x0_subset is not None and out_subset is not None:
            x0_subset, out_subset = x0_subset.flatten().long(), out_subset.flatten().long()
            picked = total.index_select(0, (x0_subset - 1).clamp(min=0))
            total = torch.where((x0_subset > 0)[:, None], picked, 0.0)
        if residual is not None:
            total = total + upcast(residual).reshape(total.shape)
        out = normalize(total, gamma, beta, epsilon, is_rms_norm, x0.dtype)
        if out_subset is not None:
            # Row 0 takes what nobody asked for.
            out = out.new_zeros(out_numrows + 1, out.shape[1]).index_copy(0, out_subset, out)[1:]
        outs = [out.reshape(-1, *tail)]
        if prenorm:
            outs.append(total.to(residual_dtype(x0, residual, residual_in_fp32)).reshape(-1, *tail))
        if return_dmask:
            outs.append(dmask)
        return outs[0] if len(outs) == 1 else tuple(outs)


class DropoutAddLayerNormParallelResidualFn:
    """The function behind the two `..._parallel_residual` functions, under upstream's name."""

    @staticmethod
    def apply(
        x0: Tensor,
        x1: Tensor | None,
        residual: Tensor | None,
        gamma0: Tensor,
        beta0: Tensor | None,
        gamma1: Tensor | None,
        beta1: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> tuple[Any, ...]:
        """See `dropout_add_layer_norm_parallel_residual`."""
        total, dmask0 = _branch(x0, None, dropout_p, None)
        dmask1 = torch.ones_like(dmask0)
        if x1 is not None:
            branch1, dmask1 = _branch(x1, None, dropout_p, None)
            total = upcast(total) + upcast(branch1)
        if residual is not None:
            total = upcast(total) + upcast(residual)
        outs = [normalize(total, gamma0, beta0, epsilon, is_rms_norm, x0.dtype), None]
        if gamma1 is not None:
            outs[1] = normalize(total, gamma1, beta1, epsilon, is_rms_norm, x0.dtype)
        if prenorm:
            outs.append(total.to(residual_dtype(x0, residual, residual_in_fp32)))
        if return_dmask:
            outs += [dmask0, dmask1]
        return tuple(outs)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm of `x` `(..., hidden)` with `weight` and `bias` `(hidden,)`, computed in fp32, in the dtype of `x`."""
    return DropoutAddLayerNormFn.apply(x, None, weight, bias, None, None, 0.0, epsilon, False)


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | Any:
    """Layer norm of `layerscale * dropout(rowscale * x0) + residual`, summed and normalised in fp32.

    Args:
        x0: `(..., hidden)`; the norm comes back in its dtype.
        residual: like `x0`, of any dtype, or None.
        weight, bias: `(hidden,)`; `bias` may be None.
        rowscale: `(...)`, one factor a row. layerscale: `(hidden,)`, one factor a column.
        prenorm: also return the sum, in the dtype of `residual`; without one, in fp32 if `residual_in_fp32`, else in
            that of `x0`.
        return_dropout_mask: also return the elements that were kept, uint8.

    Returns:
        The norm, or the tuple of those asked for of: norm, sum, mask.
    """
    return DropoutAddLayerNormFn.apply(
        x0,
        residual,
        weight,
        bias,
        rowscale,
        layerscale,
        dropout_p,
        epsilon,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | Any:
    """`dropout_add_layer_norm` where some rows have no `x0` and some norms are not wanted (stochastic depth).

    Args:
        x0: `(x0_rows, hidden)`, only the rows that exist. residual: `(rows, hidden)`.
        x0_subset: `(rows,)`, for each row of the sum the row of `x0`, counted from one; zero for none.
        out_subset: `(rows,)`, for each row of the sum the row of the result, counted from one; zero for none.
        rowscale_const: a factor for every row of `x0`.
        out_numrows: rows of the result; those that `out_subset` does not name are zero.

    Returns:
        As `dropout_add_layer_norm`: the norm `(out_numrows, hidden)`, the sum `(rows, hidden)`, the mask like `x0`.
    """
    return DropoutAddLayerNormSubsetFn.apply(
        x0,
        residual,
        weight,
        bias,
        layerscale,
        x0_subset,
        out_subset,
        dropout_p,
        epsilon,
        rowscale_const,
        out_numrows,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Any, ...]:
    """Two layer norms of `dropout(x0) + dropout(x1) + residual`.

    Returns:
        tuple: norm with `weight0` and `bias0`; norm with `weight1` and `bias1`, None without `weight1`; with
            `prenorm` the sum; with
        `return_dropout_mask` the masks of `x0` and `x1`.
    """
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0,
        x1,
        residual,
        weight0,
        bias0,
        weight1,
        bias1,
        dropout_p,
        epsilon,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with `weight` and `bias` `(hidden_size,)`; dropout only in training."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | Any:
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


def _branch(x0: Tensor, rowscale, dropout_p: float, colscale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(colscale * dropout(rowscale * x0), mask)`; `x0` itself where nothing is asked for."""
    x = x0
    if isinstance(rowscale, Tensor):
        rowscale = rowscale.reshape(x0.shape[:-1])[..., None]
    if rowscale is not None:
        x = upcast(x) * rowscale
    if dropout_p > 0.0:
        x, keep = dropout(x, dropout_p)
        dmask = keep.to(torch.uint8)
    else:
        dmask = torch.ones_like(x0, dtype=torch.uint8)
    if colscale is not None:
        x = upcast(x) * colscale
    return x, dmask
