"""Which of the calls that PyTorch is known to get wrong on MPS it gets wrong here, and what this package gives.

One call for each row of `sdpa/hazards.py` but that of 2^31 scores, which takes minutes and much memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ... import dispatch
from ...sdpa import attention, hazards, torch_paths
from ...sdpa.call import Arguments, call_of


class Row(NamedTuple):
    """One call. Errors are the largest against float64; inf for a wrong shape, NaN, or an exception."""

    issue: str
    what: str  # goes wrong
    holds: bool  # in this release of torch, by what `sdpa/hazards.py` says
    torch: float
    ours: float
    allowed: float  # twice the error of rounding alone, plus 1e-3

    @property
    def surprising(self) -> bool:
        """Ours is wrong, or torch is though the row does not hold here."""
        return self.ours > self.allowed or (self.torch > self.allowed and not self.holds)


# issue -> shapes of q, k, v; dtype; size of the numbers; shape of a mask, whose second row shows nothing; is_causal
_CALLS: dict[str, dict[str, Any]] = {
    "pytorch#195910": {"q": (1, 4, 64, 64), "is_causal": True},
    "pytorch#176767": {"q": (1, 2, 40, 32), "v": (1, 2, 40, 16), "dtype": torch.float32},
    "pytorch#190791": {"q": (1, 1, 16, 40), "k": (1, 1, 14000, 40)},
    "pytorch#160841": {"q": (1, 1, 40, 64), "size": 40.0},
    "pytorch#156707": {"q": (1, 1, 40, 64), "dtype": torch.float32, "mask": (40, 40), "blind": True},
    "pytorch#174861": {"q": (1, 8, 1, 128), "k": (1, 8, 1500, 128)},
    "pytorch#169222": {"q": (1, 8, 1, 64), "k": (1, 8, 39, 64), "dtype": torch.float32},
    "pytorch#181133": {"q": (84, 3, 3, 64), "dtype": torch.float32, "heads_last": True},
    "pytorch#182285": {"q": (1, 1, 8, 64), "k": (1, 1, 512, 64), "dtype": torch.float32, "mask": (8, 512)},
    "pytorch#184180": {"q": (2, 4, 8, 64), "dtype": torch.float32, "mask": (2, 1, 8, 8)},
}
ISSUES = tuple(_CALLS)


def run(device: torch.device | str) -> Iterator[Row]:
    """The rows in turn, computed on `device`."""
    known = {hazard.issue: hazard for hazard in hazards.TABLE}
    release = torch_paths.version(torch.__version__)
    for issue, how in _CALLS.items():
        tensors, mask, causal = _drawn(**how)
        with torch.no_grad():
            exact = _plain(torch.float64, tensors, mask, causal)
            rounded = _plain(torch.float32, tensors, mask, causal).to(tensors[0].dtype)
            q, k, v = (tensor.to(device) for tensor in tensors)
            arguments = Arguments(q, k, v, None if mask is None else mask.to(device), is_causal=causal)
            yield Row(
                issue,
                known[issue].what,
                known[issue] in hazards.hazards(call_of(arguments), release),
                _error(_torchs, arguments, exact),
                _error(_ours, arguments, exact),
                2 * (rounded.double() - exact).abs().max().item() + 1e-3,
            )


def _drawn(
    q: tuple[int, ...],
    k: tuple[int, ...] = (),
    v: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float16,
    size: float = 1.0,
    mask: tuple[int, ...] = (),
    blind: bool = False,
    heads_last: bool = False,
    is_causal: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor | None, bool]:
    generator = torch.Generator().manual_seed(0)
    shapes = [q, k or q, v or k or q]
    tensors = [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    if heads_last:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    shown = torch.rand(mask, generator=generator) > 0.4 if mask else None
    if shown is not None and blind:
        shown[1] = False
    return tensors, shown, is_causal


def _plain(dtype: torch.dtype, tensors: list[torch.Tensor], mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    q, k, v = (tensor.to(dtype) for tensor in tensors)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril() if causal else mask
    if seen is None:
        return torch.softmax(s, -1) @ v
    p = torch.softmax(s.masked_fill(~seen, -math.inf), -1)
    return p.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v


def _torchs(arguments: Arguments) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        arguments.query, arguments.key, arguments.value, arguments.attn_mask, is_causal=arguments.is_causal
    )


def _ours(arguments: Arguments) -> torch.Tensor:
    return attention.as_called(dispatch.attention(attention.problem(arguments)).out, arguments.query)


def _error(attend: Any, arguments: Arguments, exact: torch.Tensor) -> float:
    try:
        out = attend(arguments).cpu().double()
    except RuntimeError:
        return math.inf
    return (out - exact).abs().max().item() if out.shape == exact.shape and out.isfinite().all() else math.inf
