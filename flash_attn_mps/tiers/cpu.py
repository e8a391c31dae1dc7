"""The `cpu` tier: PyTorch's own flash attention for CPU tensors, where it computes exactly the same function.

Where it does not: it hides keys by adding -inf before it scales, so that a causal mask with a negative scale shows them
(NVIDIA/cudnn-frontend#804); what is hidden and not finite reaches the output (pytorch#101967); a NaN is lost where a
block has fewer than 16 keys (pytorch#141128); and its backward pass sums over the query heads of a key in half
precision. Not used on MPS: stock attention there has been wrong in many releases (pytorch#195910, pytorch#174861,
pytorch#176767).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.nn.attention import SDPBackend

from ..problem import AttentionProblem, Result
from .tier import Gradients, Tier

_FEATURES = frozenset({"causal", "gradients"})
_LARGEST_SCORE = 1e38  # float32 ends at 3.4e38


def _limits(p: AttentionProblem) -> list[str]:
    """Why this tier does not serve `p` although it serves its features, in words; empty if it does."""
    q, k = p.q, p.k
    if q.device.type != "cpu":
        return [f"tensors are on {q.device}, not on the CPU"]
    if p.empty:
        return ["there are no scores"]
    if q.dim() != 4:
        return []  # packed, which is a feature that this tier does not serve
    causal = "causal" in p.features
    if causal and q.shape[1] != k.shape[1]:
        return ["causal with seqlen_q != seqlen_k (PyTorch aligns it to the top left)"]
    if not p.features <= _FEATURES:
        return []  # it is out already
    if causal and not p.softmax_scale > 0:
        return ["causal with a softmax_scale that is not above 0"]
    if not _is_flash(p, causal):
        return ["PyTorch would not use its flash attention for these head dims, strides or settings"]
    if not _scores_are_finite(p):
        return ["values or scores are not finite"]
    return []


def _backward_limits(p: AttentionProblem) -> list[str]:
    if p.heads != p.heads_k and p.q.dtype != torch.float32:
        return ["heads share keys in half precision, in which PyTorch would sum their gradients"]
    return _limits(p)


def _scores_are_finite(p: AttentionProblem) -> bool:
    """Are q, k, v and, whatever they are, the scores?"""
    largest_q, largest_k, largest_v = (_largest(t) for t in (p.q, p.k, p.v))
    scale = cast(float, p.softmax_scale)  # a tensor is a feature that this tier does not serve
    score = largest_q * largest_k * p.q.shape[-1] * max(1.0, abs(scale))
    return score < _LARGEST_SCORE and largest_v < math.inf


def _largest(t: torch.Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    least, most = torch.aminmax(t)
    return torch.maximum(-least, most).item()


def _is_flash(p: AttentionProblem, causal: bool) -> bool:
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    assert isinstance(p.softmax_scale, float)  # a tensor is a feature that this tier does not serve
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=p.softmax_scale, enable_gqa=p.heads != p.heads_k)
    return choice == SDPBackend.FLASH_ATTENTION.value


def _run(p: AttentionProblem) -> Result:
    """What `F.scaled_dot_product_attention` calls too, which keeps the log-sum-exp to itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(p.q, p.k, p.v), **_options(p))
    return Result(out.transpose(1, 2).contiguous(), lse.contiguous())


def _backward(
    p: AttentionProblem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, _dlse: torch.Tensor | None
) -> Gradients:
    tensors = _heads_first(dout.contiguous(), p.q, p.k, p.v, out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, **_options(p))
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv, None


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _options(p: AttentionProblem) -> dict[str, object]:
    return {"dropout_p": 0.0, "is_causal": "causal" in p.features, "scale": p.softmax_scale}


TIER = Tier("cpu", _FEATURES, _limits, _run, _FEATURES, _backward, _backward_limits)
