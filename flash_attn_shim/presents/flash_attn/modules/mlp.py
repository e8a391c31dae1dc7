"""`flash_attn.modules.mlp`: plain, gated and parallel MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
    "RowParallelLinear",
    "swiglu",
]


class Mlp(nn.Module):
    """`fc2(activation(fc1(x)))`; four times as many hidden features as input features by default."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden_features = in_features * 4 if hidden_features is None else hidden_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor | Any:
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """`Mlp` of which each rank holds a part of the hidden features."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        process_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        group = cast(dist.ProcessGroup, process_group)  # None is upstream's default, and no group
        out_features = in_features if out_features is None else out_features
        hidden_features = in_features * 4 if hidden_features is None else hidden_features
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, group, bias=bias1, **options)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, group, bias=bias2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    """`fc2(y * activation(gate))`, where `fc1(x)` holds `y` in its first half and `gate` in its second.

    By default 8/3 as many hidden features as input features; they are rounded up to a multiple of `multiple_of`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor | Any:
        y = self.fc2(_gate(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """`GatedMlp` of which each rank holds a part of the hidden features and of their gates."""

    def __init__(
        self,
        in_features: int,
        process_group: dist.ProcessGroup,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(in_features, 2 * hidden_features, process_group, bias=bias1, **options)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gate(self.fc1(x), self.activation))


def _gated_features(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    if hidden_features is None:
        hidden_features = int(8 * in_features / 3)
    return (hidden_features + multiple_of - 1) // multiple_of * multiple_of


def _gate(y, activation):
    if activation == F.sigmoid:
        return F.glu(y, dim=-1)
    y, gate = y.chunk(2, dim=-1)
    return swiglu(gate, y) if activation == F.silu else y * activation(gate)
