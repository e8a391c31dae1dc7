"""Forward and backward as plain functions without autograd: what ring and other distributed attention is built on.

Names, parameters, order and defaults are those of the private functions of FlashAttention 2.8. Arguments and shapes are
those of `flash_attn_mps.frontends.fa2`; `window_size_left` and `window_size_right` are the two sides of `window_size`.

The forward functions return `(out, softmax_lse, S_dmask, rng_state)`: `rng_state`, int64 `(2,)` on the CPU, makes
backward drop what forward dropped. The backward functions write the gradients into `dq`, `dk` and `dv`, and return
`rowsum(dout * out)`, float32 in the layout of `softmax_lse`. `out` and `softmax_lse` may come from attention over more
keys than `k` holds; the gradients are then those of that attention.
"""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..problem import AttentionProblem, CallOptions, dense, varlen


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    window_size = (window_size_left, window_size_right)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, want_lse=True, want_probs=return_softmax
    )
    return _forward(dense, (q, k, v), {}, options)


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    if leftpad_k is not None:
        raise checks.unsupported("leftpad_k", leftpad_k, "None; flash_attn_with_kvcache takes cache_leftpad")
    window_size = (window_size_left, window_size_right)
    options = CallOptions(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, want_lse=True, want_probs=return_softmax
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    layout = {"seqused_k": seqused_k, "block_table": block_table}
    return _forward(varlen, (q, k, v, *lengths), layout, options)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    window_size = (window_size_left, window_size_right)
    seed = _seed(dropout_p, rng_state)
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, seed=seed)
    return backward(dense, (q, k, v), options, dout, out, softmax_lse, (dq, dk, dv))


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    window_size = (window_size_left, window_size_right)
    seed = _seed(dropout_p, rng_state)
    options = CallOptions(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, seed=seed)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return backward(varlen, (q, k, v, *lengths), options, dout, out, softmax_lse, (dq, dk, dv))


@torch.no_grad()
def _forward(describe, tensors, layout, options: CallOptions):
    p = describe(*tensors, options, **layout)
    result = dispatch.attention(p)
    probs = p.q.new_empty(0) if result.probs is None else result.probs
    seed = torch.as_tensor(p.seed, dtype=torch.int64, device="cpu")
    return result.out, result.lse, probs, torch.stack((seed, torch.zeros_like(seed)))


@torch.no_grad()
def backward(describe, tensors, options: CallOptions, dout, out, lse, grads):
    """Gradients of the problem that `describe(*tensors, options)` gives, into `grads` where they are buffers."""
    p: AttentionProblem = describe(*tensors, options)
    for name, value, shape in (
        ("dout", dout, p.out_shape),
        ("out", out, p.out_shape),
        ("softmax_lse", lse, p.lse_shape),
    ):
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            raise checks.malformed(name, value, f"a tensor {shape}")
    for name, value, like in zip(("dq", "dk", "dv"), grads, (p.q, p.k, p.v), strict=True):
        if value is not None and (not isinstance(value, torch.Tensor) or value.shape != like.shape):
            raise checks.malformed(name, value, f"None or a tensor {tuple(like.shape)}")
    for buffer, grad in zip(grads, dispatch.gradients(p, out, lse, dout), strict=False):
        if buffer is not None:
            buffer.copy_(grad)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def _seed(dropout_p, rng_state) -> int | None:
    if not dropout_p:
        return None
    if not isinstance(rng_state, torch.Tensor) or rng_state.shape != (2,) or rng_state.dtype != torch.int64:
        raise checks.malformed("rng_state", rng_state, "the int64 tensor (2,) that the forward function returned")
    return rng_state[0] if torch.compiler.is_compiling() else int(rng_state[0])
