"""Runs attention.metal, and says what it should give."""

import math
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("attention.metal").read_text()


def source(head_dim: int = 64, staged: bool = True, text: str = SOURCE) -> str:
    return f"#define HEAD_DIM {head_dim}\n#define STAGED {int(staged)}\n#line 1\n{text}"


def inputs(heads: int, seqlen: int, head_dim: int = 64, device: str = "cpu") -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seqlen)
    return [torch.randn(heads, seqlen, head_dim, generator=g).half().to(device) for _ in range(3)]


def run(library, q, k, v):
    """(out, lse) of the kernel; q, k, v: (H, L, D) half."""
    heads, seqlen, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    lse = torch.full((heads, seqlen), float("nan"), device=q.device)
    parameters = torch.tensor([seqlen, 0], dtype=torch.int32, device=q.device)
    parameters.view(torch.float32)[1] = math.log2(math.e) / math.sqrt(head_dim)
    blocks = -(-seqlen // 32)
    library.attention(q, k, v, out, lse, parameters, threads=(blocks * 128, heads, 1), group_size=(128, 1, 1))
    return out, lse


def reference(q, k, v):
    q, k, v = (x.double().cpu() for x in (q, k, v))
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def is_right(result, expected) -> bool:
    out, lse = result[0].double().cpu(), result[1].double().cpu()
    return bool((out - expected[0]).abs().max() < 2e-3 and (lse - expected[1]).abs().max() < 1e-4)
