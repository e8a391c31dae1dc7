"""Forward and backward as plain functions without autograd: what ring and other distributed attention is built on.

Names, parameters, order and defaults are those of the private functions of FlashAttention 2.8, and `num_splits`, which
upstream has since put behind them. Arguments and shapes are those of
`flash_attn_mps.frontends.fa2`; `window_size_left` and `window_size_right` are the two sides of `window_size`.

The forward functions return `(out, softmax_lse, S_dmask, rng_state)`: `rng_state`, int64 `(2,)` on the CPU, makes
backward drop what forward dropped. The backward functions write the gradients into `dq`, `dk` and `dv`, and return
`rowsum(dout * out)`, float32 in the layout of `softmax_lse`. `out` and `softmax_lse` may come from attention over more
keys than `k` holds; the gradients are then those of that attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from ..capture import capturing
from ..describe import CallOptions, dense, varlen
from ..problem import AttentionProblem
from .shared import window_of


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window_size = window_of(window_size_left, window_size_right)
    probs = checks.flag(return_softmax, "return_softmax")
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, want_lse=True, want_probs=probs
    )
    return _forward(dense, (q, k, v), {}, options)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.flag(zero_tensors, "zero_tensors")
    if leftpad_k is not None:
        raise checks.unsupported(
            "leftpad_k", checks.show(leftpad_k), "None; flash_attn_with_kvcache takes cache_leftpad"
        )
    window_size = window_of(window_size_left, window_size_right)
    probs = checks.flag(return_softmax, "return_softmax")
    options = CallOptions(
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        dropout_p,
        want_lse=True,
        want_probs=probs,
        num_splits=num_splits,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout = {"seqused_k": seqused_k, "block_table": block_table}
    return _forward(varlen, (q, k, v, *lengths), layout, options)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    window_size = window_of(window_size_left, window_size_right)
    checks.flag(deterministic, "deterministic")
    seed = _seed(q, dropout_p, rng_state)
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, seed=seed)
    return backward(dense, (q, k, v), options, dout, out, softmax_lse, (dq, dk, dv))


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    window_size = window_of(window_size_left, window_size_right)
    checks.flag(deterministic, "deterministic")
    checks.flag(zero_tensors, "zero_tensors")
    seed = _seed(q, dropout_p, rng_state)
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, seed=seed)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return backward(varlen, (q, k, v, *lengths), options, dout, out, softmax_lse, (dq, dk, dv))


@torch.no_grad()
def _forward(
    describe: Callable[..., AttentionProblem], tensors: tuple[Any, ...], layout: dict[str, Any], options: CallOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = describe(*tensors, options, **layout)
    result = dispatch.attention(p)
    assert result.lse is not None
    probs = p.q.new_empty(0) if result.probs is None else result.probs
    seed = torch.as_tensor(p.seed, dtype=torch.int64, device="cpu")
    return result.out, result.lse, probs, torch.stack((seed, torch.zeros_like(seed)))


@torch.no_grad()
def backward(
    describe: Callable[..., AttentionProblem],
    tensors: tuple[Any, ...],
    options: CallOptions,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor | None, ...],
) -> Tensor:
    """Gradients of the problem that `describe(*tensors, options)` gives, into `grads` where they are buffers."""
    p: AttentionProblem = describe(*tensors, options)
    checks.of_shape(dout, "dout", p.out_shape, p.q.dtype, p.q, "as the output of q and v")
    checks.of_shape(out, "out", p.out_shape, p.q.dtype, p.q, "as the output of q and v")
    checks.of_shape(lse, "softmax_lse", p.lse_shape, torch.float32, p.q, "as the rows of q")
    buffers = {name: buffer for name, buffer in zip("qkv", grads, strict=True) if buffer is not None}
    for name, buffer in buffers.items():
        like = getattr(p, name)
        checks.output(buffer, f"d{name}", like.shape, like, f"as {name}")
    computed = dispatch.gradients(p, out, lse, dout, None, frozenset(buffers))
    for name, buffer in buffers.items():
        buffer.copy_(getattr(computed, f"d{name}"))
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def _seed(q: Any, dropout_p: Any, rng_state: Any) -> int | Tensor | None:
    if not checks.dropout_p(dropout_p):
        return None
    checks.tensor(rng_state, "rng_state", "2,")
    if rng_state.shape != (2,) or rng_state.dtype != torch.int64 or rng_state.is_meta:
        raise checks.malformed("rng_state", rng_state, "the int64 tensor (2,) that the forward function returned")
    return rng_state[0] if capturing(q) else int(rng_state[0])
