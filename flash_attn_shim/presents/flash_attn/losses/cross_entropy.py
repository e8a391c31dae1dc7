"""`flash_attn.losses.cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross entropy as a module; the arguments are those of `flash_attn.ops.triton.cross_entropy.cross_entropy_loss`.

    Args:
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        return_z_loss: also return the part of the loss that `lse_square_scale` adds, reduced alike; it has no gradient.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"reduction must be 'mean', 'none' or 'sum', got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of `input` `(batch, vocab_size)` for `target` `(batch,)`: fp32, a scalar or `(batch,)`."""
        losses: Sequence[Tensor] = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            losses = [part.sum() / count for part in losses]
        elif self.reduction == "sum":
            losses = [part.sum() for part in losses]
        loss, z_loss = losses
        return (loss, z_loss) if self.return_z_loss else loss
