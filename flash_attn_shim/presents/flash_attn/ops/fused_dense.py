"""`flash_attn.ops.fused_dense`: linear layers and MLPs, alone and tensor-parallel over a process group.

With a process group and `sequence_parallel`, each rank holds a part of the tokens (the first axis): they are gathered
before the first matrix product, and summed and scattered after the last. Without `sequence_parallel` each rank holds
all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.utils.distributed import (
    all_gather,
    all_reduce,
    all_reduce_raw,
    get_dim_for_local_rank,
    reduce_scatter,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_approx": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
}


class _SumGradients(torch.autograd.Function):
    """The same tensor; its gradient, of which each rank has a term, is summed."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return all_reduce_raw(grad_output.clone(), ctx.process_group)[0], None


def _all_tokens(x: Tensor, process_group, sequence_parallel: bool) -> Tensor:
    if process_group is None:
        return x
    return all_gather(x, process_group) if sequence_parallel else _SumGradients.apply(x, process_group)


class FusedDenseFunc:
    """The function behind `fused_dense_func`, under upstream's name."""

    @staticmethod
    def apply(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        return_residual: bool = False,
        process_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = True,
    ) -> Tensor | Any:
        """See `fused_dense_func`."""
        out = F.linear(_all_tokens(x, process_group, sequence_parallel), weight, bias)
        return (out, x) if return_residual else out


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Tensor | Any:
    """`x @ weight.T + bias`, with `return_residual` also `x`.

    Args:
        x: `(..., in_features)`; this rank's tokens with a `process_group` and `sequence_parallel`.
        weight: `(out_features, in_features)`, this rank's rows with a `process_group`. bias: `(out_features,)`.
    """
    return FusedDenseFunc.apply(x, weight, bias, return_residual, process_group, sequence_parallel)


class FusedDense(nn.Linear):
    """`nn.Linear` that can return its input as well and gather it first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor | Any:
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


class ColumnParallelLinear(nn.Linear):
    """A linear layer of which each rank computes a part of the output features."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: dist.ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return fused_dense_func(
            x, self.weight, self.bias, process_group=self.process_group, sequence_parallel=self.sequence_parallel
        )


class RowParallelLinear(nn.Linear):
    """A linear layer of which each rank has a part of the input features; the results are summed.

    Rank 0 has the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: dist.ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("in_features", in_features, process_group, multiple_of)
        bias = bias and dist.get_rank(process_group) == 0
        super().__init__(local, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(fused_dense_func(x, self.weight, self.bias), self.process_group)


class FusedMLPFunc:
    """The function behind `fused_mlp_func`, under upstream's name and with upstream's other order of the biases."""

    @staticmethod
    def apply(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: str = "gelu_approx",
        save_pre_act: bool = True,
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = 0,
        process_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = True,
    ) -> Tensor | Any:
        """See `fused_mlp_func`."""
        _check_mlp(activation, checkpoint_lvl)
        act = _ACTIVATIONS[activation]

        def first(x):
            return F.linear(_all_tokens(x, process_group, sequence_parallel), weight1, bias1)

        def second(pre_act):
            return F.linear(act(pre_act), weight2, bias2)

        if not save_pre_act or checkpoint_lvl == 2:
            out = _recompute(lambda x: second(first(x)), x)
        elif checkpoint_lvl == 1:
            out = _recompute(second, first(x))
        else:
            out = second(first(x))
        return (out, x) if return_residual else out


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Tensor | Any:
    """`activation(x @ weight1.T + bias1) @ weight2.T + bias2`, with `return_residual` also `x`.

    Over a process group the result is this rank's term of the sum: the caller reduces it.

    Args:
        x: `(..., in_features)`; this rank's tokens with a `process_group` and `sequence_parallel`.
        weight1: `(hidden_features, in_features)`. weight2: `(out_features, hidden_features)`.
        activation: "gelu_approx", "relu" or "sqrelu".
        checkpoint_lvl: what the backward pass computes again to save memory: 0 nothing, 1 the activation, 2 the first
            layer too.
        save_pre_act: False means `checkpoint_lvl` 2.
        heuristic: upstream's choice of a cuBLAS algorithm; no effect.
    """
    return FusedMLPFunc.apply(
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        activation,
        save_pre_act,
        return_residual,
        checkpoint_lvl,
        heuristic,
        process_group,
        sequence_parallel,
    )


class FusedMLP(nn.Module):
    """Two linear layers, `fc1` and `fc2`, with an activation between; the arguments are those of `fused_mlp_func`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_mlp(activation, checkpoint_lvl)
        super().__init__()
        hidden_features = hidden_features or in_features * 4
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor | Any:
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            process_group=process_group,
        )
        if process_group is not None:
            out = reduce_scatter(out, process_group)
        return (out, x) if self.return_residual else out


class ParallelFusedMLP(nn.Module):
    """`FusedMLP` of which each rank holds a part of the hidden features."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: dist.ProcessGroup | None = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_mlp(activation, checkpoint_lvl)
        if process_group is None:
            raise ValueError("process_group must be given, got None")
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features * 4
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **factory)
        self.fc2 = RowParallelLinear(hidden_features, out_features or in_features, process_group, bias=bias2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(out, self.process_group)


def _local_features(name: str, features: int, process_group, multiple_of: int) -> int:
    if features % multiple_of:
        raise ValueError(f"{name} must be a multiple of {multiple_of}, got {features}")
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return get_dim_for_local_rank(features, world_size, rank, multiple_of)


def _recompute(function, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def _check_mlp(activation: str, checkpoint_lvl: int) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if checkpoint_lvl not in (0, 1, 2):
        raise ValueError(f"checkpoint_lvl must be 0, 1 or 2, got {checkpoint_lvl!r}")
