"""`flash_attn.ops.triton.cross_entropy`, without triton: cross entropy that keeps only the logits for its backward
pass.

torch's own `F.cross_entropy` keeps a log-softmax as large as the logits, in fp32 where the loss is to be fp32. Here
the forward pass keeps the log-sum-exp of each row, and both passes work on a bounded block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of fp32 working memory: 64 MiB.
_BLOCK_NUMEL = 2**24


class CrossEntropyLoss(torch.autograd.Function):
    """The function behind `cross_entropy_loss`. (The module of this name is in `flash_attn.losses.cross_entropy`.)"""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        _check(logits, labels, precomputed_lse, logit_scale)
        n_cols = logits.shape[1]
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        class_start = 0 if process_group is None else dist.get_rank(process_group) * n_cols
        total_classes = world_size * n_cols
        ignored = labels == ignore_index
        local = labels.long() - class_start
        here = (local >= 0) & (local < n_cols) & ~ignored
        local = local.clamp(0, n_cols - 1)

        if precomputed_lse is not None and logit_scale == 1.0 and smoothing == 0.0:
            lse = precomputed_lse
        else:
            lse = torch.cat([(_fp32(logits[rows]) * logit_scale).logsumexp(-1) for rows in _row_blocks(logits)])
        logit = _fp32(logits.gather(1, local[:, None])[:, 0]) * logit_scale
        # Of a row whose label is another process's, and of one whose label does not exist, only the smoothing counts.
        losses = torch.where(here, -(1.0 - smoothing) * logit, 0.0)
        weight_of_lse: Tensor | float = smoothing + (1.0 - smoothing) * here.to(lse.dtype)
        if smoothing > 0.0:
            sums = torch.cat([_fp32(logits[rows]).sum(-1) for rows in _row_blocks(logits)])
            losses = losses - sums * (logit_scale * smoothing / total_classes)
        if world_size > 1:
            lse_of_each = lse.new_empty(world_size * lse.shape[0])
            dist.all_gather_into_tensor(lse_of_each, lse.contiguous(), group=process_group)
            lse = lse_of_each.view(world_size, -1).logsumexp(0)
            dist.all_reduce(losses, group=process_group)
            weight_of_lse = 1.0
        z_losses = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
        losses = (losses + weight_of_lse * lse).masked_fill(ignored, 0.0) + z_losses

        ctx.save_for_backward(logits, lse, local, here, ignored)
        ctx.mark_non_differentiable(z_losses)
        ctx.smoothing = smoothing
        ctx.logit_scale = logit_scale
        ctx.lse_square_scale = lse_square_scale
        ctx.total_classes = total_classes
        ctx.inplace_backward = inplace_backward
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Any, grad_z_losses: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("cross_entropy_loss has no second derivative: create_graph must be False")
        logits, lse, local, here, ignored = ctx.saved_tensors
        logits = logits.detach()
        dlogits = logits if ctx.inplace_backward else torch.empty_like(logits)
        scale = grad_losses.masked_fill(ignored, 0.0) * ctx.logit_scale
        z_factor = 1.0 + 2.0 * ctx.lse_square_scale * lse
        label_term = (ctx.smoothing - 1.0) * here.to(lse.dtype)
        for rows in _row_blocks(logits):
            probs = (_fp32(logits[rows]) * ctx.logit_scale - lse[rows, None]).exp()
            probs = probs * z_factor[rows, None] - ctx.smoothing / ctx.total_classes
            probs.scatter_add_(1, local[rows, None], label_term[rows, None])
            dlogits[rows] = probs * scale[rows, None]
        return dlogits, None, None, None, None, None, None, None, None


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, computed in fp32.

    Args:
        logits: `(batch, vocab_size)`, any floating dtype. With a `process_group`, this process's part of the
            vocabulary.
        labels: `(batch,)`, integer, in the whole vocabulary. A label outside of it gets no loss but that of smoothing
            and `lse_square_scale`.
        precomputed_lse: `(batch,)`, log-sum-exp of the rows; used unless there is smoothing or a scale.
        logit_scale: factor of the logits, positive.
        lse_square_scale: adds `lse_square_scale * lse ** 2` ("z-loss").
        ignore_index: rows with this label have loss and gradient zero.
        inplace_backward: the backward pass overwrites `logits` with their gradient.
        process_group: the processes that hold the parts of the vocabulary, equally large, in the order of their ranks.

    Returns:
        tuple: losses, and the part of them that is z-loss (without gradient): `(batch,)`, fp32.
    """
    return CrossEntropyLoss.apply(
        logits,
        labels,
        precomputed_lse,
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        inplace_backward,
        process_group,
    )


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _row_blocks(logits: Tensor) -> list[slice]:
    # A compiler fuses the fp32 intermediates away, and must not see a loop whose length depends on a shape.
    if torch.compiler.is_compiling() or logits.numel() <= _BLOCK_NUMEL:
        return [slice(None)]
    step = max(1, _BLOCK_NUMEL // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _check(logits, labels, precomputed_lse, logit_scale) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, vocab_size), got shape {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({logits.shape[0]},), got {tuple(labels.shape)}, {labels.dtype}"
        )
    if precomputed_lse is not None and precomputed_lse.shape != labels.shape:
        raise ValueError(f"precomputed_lse must be ({logits.shape[0]},), got {tuple(precomputed_lse.shape)}")
    if logit_scale <= 0.0:
        raise ValueError(f"logit_scale must be positive, got {logit_scale}")
