"""`flash_attn.ops.triton.mlp`, without triton: an MLP with squared ReLU (Primer, arXiv:2109.08668)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn.ops.fused_dense import FusedMLPFunc


class FusedDenseSqreluDenseFunc:
    """The function behind `fused_dense_sqrelu_dense_function`, under upstream's name."""

    @staticmethod
    def apply(
        x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, checkpoint_lvl: int = 0
    ) -> Tensor:
        """`relu(x @ weight1.T + bias1) ** 2 @ weight2.T + bias2`; see `fused_mlp_func` for `checkpoint_lvl`."""
        return FusedMLPFunc.apply(x, weight1, bias1, weight2, bias2, "sqrelu", checkpoint_lvl=checkpoint_lvl)


fused_dense_sqrelu_dense_function = FusedDenseSqreluDenseFunc.apply


class FusedDenseSqreluDense(nn.Module):
    """Two linear layers, `fc1` and `fc2`, with a squared ReLU between."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        checkpoint_lvl: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if checkpoint_lvl not in (0, 1, 2):
            raise ValueError(f"checkpoint_lvl must be 0, 1 or 2, got {checkpoint_lvl!r}")
        hidden_features = hidden_features or in_features * 4
        self.checkpoint_lvl = checkpoint_lvl
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return fused_dense_sqrelu_dense_function(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.checkpoint_lvl
        )
