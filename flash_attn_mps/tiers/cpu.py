"""The `cpu` tier: PyTorch's own flash attention for CPU tensors, where it computes exactly the same function.

Where it does not: it hides keys by adding -inf before it scales, so that a causal mask with a negative scale shows them
(NVIDIA/cudnn-frontend#804); what is hidden and not finite reaches the output (pytorch#101967); a NaN is lost where a
block has fewer than 16 keys (pytorch#141128); and its backward pass sums over the query heads of a key in half
precision. Not used on MPS: stock attention there has been wrong in many releases (pytorch#195910, pytorch#174861,
pytorch#176767).
"""

from __future__ import annotations

import math

import torch
from torch.nn.attention import SDPBackend

from ..problem import AttentionProblem, Result
from .tier import Gradients, Tier

_SERVES = frozenset({"causal", "gradients"})
_LARGEST_SCORE = 1e38  # float32 ends at 3.4e38
# The backward pass takes exp(score - log-sum-exp), which whoever gave the latter may have rounded otherwise: half an
# ulp of this is 5e-4.
_LARGEST_TO_SUBTRACT_FROM = 1e4


def _limits(p: AttentionProblem) -> list[str]:
    return _reasons(p, _LARGEST_SCORE)


def _backward_limits(p: AttentionProblem) -> list[str]:
    if p.heads != p.heads_k and p.q.dtype != torch.float32:
        return ["heads share keys in half precision, in which PyTorch would sum their gradients"]
    return _reasons(p, _LARGEST_TO_SUBTRACT_FROM)


def _reasons(p: AttentionProblem, largest: float) -> list[str]:
    """Why this tier does not serve `p` although it serves its features, in words; empty if it does.

    `largest`: what no score may reach.
    """
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
    if not p.features <= _SERVES:
        return []  # it is out already
    if causal and not _scale(p) > 0:
        return ["causal with a softmax_scale that is not above 0"]
    if not _is_flash(p, causal):
        return ["PyTorch would not use its flash attention for these head dims, strides or settings"]
    # More than any score can be, scaled or not; NaN if a value is.
    bound = _largest(q) * _largest(k) * q.shape[-1] * max(1.0, abs(_scale(p)))
    if not bound < largest or not _largest(p.v) < math.inf:
        return [f"values are not finite, or scores may reach {largest:g}"]
    return []


def _scale(p: AttentionProblem) -> float:
    assert isinstance(p.softmax_scale, (float, int))  # a tensor is a feature that this tier does not serve
    return p.softmax_scale


def _largest(t: torch.Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    least, most = torch.aminmax(t)
    return torch.maximum(-least, most).item()


def _is_flash(p: AttentionProblem, causal: bool) -> bool:
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=_scale(p), enable_gqa=p.heads != p.heads_k)
    return choice == SDPBackend.FLASH_ATTENTION.value


def _run(p: AttentionProblem) -> Result:
    """What `F.scaled_dot_product_attention` calls too, which keeps the log-sum-exp to itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(p.q, p.k, p.v), **_options(p))
    return Result(out.transpose(1, 2).contiguous(), lse.contiguous())


def _backward(
    p: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    _dlse: torch.Tensor | None,
    needed: frozenset[str],
) -> Gradients:
    """PyTorch's operator computes all three, whichever are needed."""
    tensors = _heads_first(dout.contiguous(), p.q, p.k, p.v, out.contiguous())
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, **_options(p))
    named = zip(("q", "k", "v"), grads, strict=True)
    return Gradients(*(grad.transpose(1, 2) if name in needed else None for name, grad in named))


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _options(p: AttentionProblem) -> dict[str, object]:
    return {"dropout_p": 0.0, "is_causal": "causal" in p.features, "scale": p.softmax_scale}


TIER = Tier("cpu", _SERVES, _limits, _run, _SERVES, _backward, _backward_limits)
