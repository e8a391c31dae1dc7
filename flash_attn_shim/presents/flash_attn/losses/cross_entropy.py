"""`flash_attn.losses.cross_entropy`."""

from torch import nn

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross entropy as a module; the arguments are those of `flash_attn.ops.triton.cross_entropy.cross_entropy_loss`.

    Args:
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        return_z_loss: also return the part of the loss that `lse_square_scale` adds, reduced alike; it has no gradient.
    """

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        inplace_backward=False,
        process_group=None,
        return_z_loss=False,
    ):
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

    def forward(self, input, target, precomputed_lse=None):
        """Loss of `input` `(batch, vocab_size)` for `target` `(batch,)`: fp32, a scalar or `(batch,)`."""
        losses = cross_entropy_loss(
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
