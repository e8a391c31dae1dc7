"""Attention as operators of `torch.library`: what torch.compile and torch.export put into their graphs.

While a graph is captured, a call is described and checked as always, in Python that Dynamo traces; its shapes stay
symbolic. Then, instead of asking the tiers, `dispatch` emits one operator whose arguments are the fields of the
`AttentionProblem`. Its kernel builds the problem anew when the graph runs, reads the lengths that the host can read,
and asks the tiers: so a graph holds for all lengths, and what is decided per call (the tier, forced or not, what is
traced) is decided per run. Calls outside of a graph never come here: `torch.library` would cost more than the launch.

`flash_attn_forward` gives `(out, softmax_lse, probs)`, empty where they are not wanted. Its derivative is
`flash_attn_backward`, which has none. The names contain "flash_attn" because policies of selective activation
checkpointing look for that in an operator's name (trl, selective_activation_checkpointing.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch.library import custom_op

from .. import tiers
from ..describe import with_lengths
from ..problem import DIFFERENTIABLE, AttentionProblem, Result
from ..tiers import Gradients
from .schema import fields_of, flatten, schema_of, unflatten

NAMESPACE = "mtlflashattn"
# The lengths that the host knows are not part of a graph: they are read when it runs.
_FIELDS = fields_of(AttentionProblem, "lengths_q", "lengths_k", "_features")
_PROBLEM = schema_of(_FIELDS)
NAMES = [part.split()[1] for part in _PROBLEM.split(", ")]
_GRADIENTS = (
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, str needed, {_PROBLEM})"
    f" -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
)
# torch keeps compiled graphs on disk under what they call, not under what the derivatives of that call: an argument of
# the forward operator says which backward operator goes with it.
_DERIVATIVE = hashlib.sha256(_GRADIENTS.encode()).hexdigest()[:8]


def attention(p: AttentionProblem) -> Result:
    """`tiers.run(p)`, with its gradient, in the graph that is captured."""
    needs_grad = p.requires_grad
    differentiated = dataclasses.replace(p, needs_grad=needs_grad, want_lse=p.want_lse or needs_grad)
    out, lse, probs = _forward(*flat(differentiated), _DERIVATIVE)
    return Result(out, lse if p.want_lse else None, probs if p.want_probs else None)


def gradients(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients:
    """`tiers.gradients`, in the graph that is captured."""
    grads = _backward(dout, dlse, out, lse, " ".join(sorted(needed)), *flat(p))
    named = zip(DIFFERENTIABLE, grads, strict=True)
    return Gradients(*(grad if name in needed else None for name, grad in named))


def flat(p: AttentionProblem) -> list[Any]:
    """The arguments that describe `p`, in the order of the schema."""
    return flatten(_FIELDS, p)


def _problem(arguments: tuple[Any, ...]) -> AttentionProblem:
    return AttentionProblem(**unflatten(_FIELDS, iter(arguments)))


def _computed(arguments: tuple[Any, ...]) -> AttentionProblem:
    """The problem as an operator's kernel hands it to the tiers."""
    p = with_lengths(_problem(arguments))
    return dataclasses.replace(p, seed=int(p.seed)) if isinstance(p.seed, torch.Tensor) else p


@custom_op(
    f"{NAMESPACE}::flash_attn_forward",
    mutates_args=(),
    schema=f"({_PROBLEM}, str derivative='') -> (Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> Any:
    with torch.no_grad():
        p = _computed(arguments)
        result = tiers.run(p)
        lse = p.q.new_empty(0, dtype=torch.float32) if result.lse is None or not p.want_lse else result.lse
        probs = p.q.new_empty(0) if result.probs is None or not p.want_probs else result.probs
        return contiguous(result.out), contiguous(lse), contiguous(probs)


@_forward.register_fake
def _(*arguments: Any):
    p = _problem(arguments)
    lse_shape = p.lse_shape if p.want_lse else (0,)
    probs = p.q.new_empty((p.batch, p.heads, *_longest(p)) if p.want_probs else (0,))
    return p.q.new_empty(p.out_shape), p.q.new_empty(lse_shape, dtype=torch.float32), probs


@custom_op(f"{NAMESPACE}::flash_attn_backward", mutates_args=(), schema=_GRADIENTS)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needed: str,
    *arguments: Any,
) -> Any:
    """`needed`: names of `DIFFERENTIABLE`, a space between them; the gradients of the others are empty."""
    with torch.no_grad():
        grads = tiers.gradients(_computed(arguments), out, lse, dout, dlse, frozenset(needed.split()))
        return tuple(lse.new_empty(0) if grad is None else contiguous(grad) for grad in grads)


@_backward.register_fake
def _(_dout, _dlse, _out, lse, needed, *arguments):
    p = _problem(arguments)
    tensors = (getattr(p, name) if name in needed.split() else None for name in DIFFERENTIABLE)
    return tuple(lse.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    out, lse, probs = output
    if not _problem(inputs).want_lse:
        raise ValueError("want_lse: got False; accepted: True where a gradient is needed")
    # Every tensor goes through save_for_backward, so that checkpointing and offloading hooks see it.
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.save_for_backward(out, lse, *(value for value in inputs if isinstance(value, torch.Tensor)))
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(probs)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _dprobs: Any):
    out, lse, *saved = ctx.saved_tensors
    tensors = iter(saved)
    pairs = zip(ctx.is_tensor, ctx.others, strict=True)
    arguments = [next(tensors) if is_tensor else other for is_tensor, other in pairs]
    if dout is None:
        dout = torch.zeros_like(out)
    *arguments, _ = arguments  # all but `derivative`
    wanted = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    needed = " ".join(name for name in DIFFERENTIABLE if wanted[name])
    grads = _backward(dout, dlse, out, lse, needed, *arguments)
    named = dict(zip(DIFFERENTIABLE, grads, strict=True))
    return *(named[name] if is_needed else None for name, is_needed in wanted.items()), None


def _differentiate_again(*_: Any):
    raise NotImplementedError("flash attention has no second derivative (double backward)")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_again)


@custom_op(f"{NAMESPACE}::no_gradient", mutates_args=(), schema="(Tensor dout, Tensor x, str reason) -> Tensor")
def no_gradient(_dout: torch.Tensor, _x: torch.Tensor, reason: str) -> torch.Tensor:
    """Raises NotImplementedError when it runs; in a graph it stands for the gradient of `x`.

    It takes `dout` so that it counts as part of the backward pass: without, it would run in the forward one.
    """
    raise NotImplementedError(reason)


@no_gradient.register_fake
def _(_dout: torch.Tensor, x: torch.Tensor, _reason: str) -> torch.Tensor:
    return torch.empty_like(x)


def _longest(p: AttentionProblem) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """`(max_seqlen_q, max_seqlen_k)` as the kernel will know them: sizes unknown where only a tensor has them."""
    if p.cu_seqlens_q is None:
        return p.max_seqlen_q, p.max_seqlen_k
    rows_k = p.k.shape[0] if p.block_table is None else p.block_table.shape[1] * p.k.shape[1]
    given = ((p.max_seqlen_q, p.q.shape[0], p.max_seqlen_q_tensor), (p.max_seqlen_k, rows_k, p.max_seqlen_k_tensor))
    longest_q, longest_k = (
        torch.sym_min(most, rows) if longest is None else torch.library.get_ctx().new_dynamic_size()
        for most, rows, longest in given
    )
    return longest_q, longest_k


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """`t`, contiguous, with the strides of a new tensor also along dimensions of size 1, as the fake one has them."""
    if not t.is_contiguous():
        return t.contiguous(memory_format=torch.contiguous_format)
    return t.view(-1).view(t.shape) if 1 in t.shape else t
