"""The `cpu` tier: PyTorch's own flash attention for CPU tensors, where it computes exactly the same thing.

Not used on MPS: stock attention there has been wrong in many releases (pytorch#195910, pytorch#174861, pytorch#176767).
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from ..graph.autograd import differentiable
from ..problem import AttentionProblem, Result
from . import reference

name = "cpu"


def unsupported_reasons(p: AttentionProblem) -> list[str]:
    """Why this tier does not serve `p`, in words; empty if it does."""
    q, k = p.q, p.k
    if q.device.type != "cpu":
        return [f"tensors are on {q.device}, not on the CPU"]
    window = p.window
    causal = window == (-1, 0)
    limits = {
        "sequences are ragged or paged": p.ragged_q or p.ragged_k or p.kv_batch_idx is not None,
        "there are no scores": p.empty,
        "window_size": window != (-1, -1) and not causal,
        "causal with seqlen_q != seqlen_k (PyTorch aligns it to the top left)": causal and q.shape[1] != k.shape[1],
        "attention_chunk": p.attention_chunk > 0,
        "softcap": p.softcap > 0,
        "alibi_slopes": p.alibi_slopes is not None,
        "dropout_p": p.dropout_p > 0,
        "mask": p.mask is not None,
        "sinks": p.sinks is not None,
        "softmax_scale is a tensor": isinstance(p.softmax_scale, torch.Tensor),
    }
    reasons = [reason for reason, applies in limits.items() if applies]
    if not reasons and not _is_flash(p, causal):
        reasons = ["PyTorch would not use its flash attention for these head dims, strides or settings"]
    return reasons


def _is_flash(p: AttentionProblem, causal: bool) -> bool:
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=p.softmax_scale, enable_gqa=p.heads != p.heads_k)
    return choice == SDPBackend.FLASH_ATTENTION.value


def run(p: AttentionProblem) -> Result:
    return differentiable(p, forward, backward)


def forward(p: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Output and log-sum-exp. What `F.scaled_dot_product_attention` calls too, which keeps the latter to itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(p.q, p.k, p.v), **_options(p))
    return out.transpose(1, 2).contiguous(), lse.contiguous(), None


def backward(
    p: AttentionProblem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, and none of sinks."""
    if dlse is not None:  # PyTorch's function does not take it
        return reference.backward(p, out, lse, dout, dlse)
    tensors = _heads_first(dout.contiguous(), p.q, p.k, p.v, out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, **_options(p))
    return *(grad.transpose(1, 2) for grad in grads), None


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _options(p: AttentionProblem) -> dict[str, object]:
    return {"dropout_p": 0.0, "is_causal": p.window[1] == 0, "scale": p.softmax_scale}
