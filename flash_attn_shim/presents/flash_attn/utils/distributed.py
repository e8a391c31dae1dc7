"""`flash_attn.utils.distributed`: collectives that autograd sees through, and helpers for tensor parallelism.

Tensors are gathered and scattered along their first axis, in the order of the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_raw(
    input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """`(gathered, handle)`; without autograd. The handle is None unless `async_op`."""
    world_size = dist.get_world_size(process_group)
    output = input_.new_empty(world_size * input_.shape[0], *input_.shape[1:])
    handle = dist.all_gather_into_tensor(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(
    input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """`(this rank's part of the sum, handle)`; without autograd. The handle is None unless `async_op`."""
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size:
        raise ValueError(
            f"input_ must have a first axis divisible by the world size {world_size}, got {input_.shape[0]}"
        )
    output = input_.new_empty(input_.shape[0] // world_size, *input_.shape[1:])
    handle = dist.reduce_scatter_tensor(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(
    input_: Tensor, process_group: dist.ProcessGroup, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """`(sum, handle)`; without autograd. A contiguous `input_` is overwritten with the sum."""
    input_ = input_.contiguous()
    handle = dist.all_reduce(input_, group=process_group, async_op=async_op)
    return input_, handle


class AllGatherFunc(torch.autograd.Function):
    """Gather; the gradient is scattered back."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """Sum and scatter; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """Sum; the gradient, the same on every rank, passes through."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        # A copy: what made input_ may need it for its own gradient.
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def sync_shared_params(model: torch.nn.Module, process_group: dist.ProcessGroup) -> None:
    """Give every rank the first rank's values of the parameters marked `_shared_params`."""
    source = dist.get_global_rank(process_group, 0)
    for parameter in _marked(model, "_shared_params"):
        dist.broadcast(parameter.data, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: dist.ProcessGroup) -> None:
    """Sum over the ranks the gradients of the parameters marked `_sequence_parallel`, which each saw a part of."""
    grads = [parameter.grad for parameter in _marked(model, "_sequence_parallel")]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=process_group)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """The part of `dim` that a rank holds: multiples of `multiple_of`, the first ranks one more where it is uneven."""
    each, rest = divmod(dim // multiple_of, world_size)
    return (each + (local_rank < rest)) * multiple_of


def _marked(model, attribute):
    # By name: ranks may hold the same parameters in another order.
    parameters = sorted(model.named_parameters(), key=lambda named: named[0])
    return [parameter for _, parameter in parameters if getattr(parameter, attribute, False)]
