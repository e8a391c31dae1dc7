"""Is a graph being captured? Then a call becomes an operator of that graph, and nothing is computed."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

_KEYS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def capturing(q: torch.Tensor) -> bool:
    """By torch.compile or torch.export; by AOTAutograd or make_fx without them; or has `q` a shape and no values?

    Costs a third of a microsecond where it is not so.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) is not None for key in _KEYS):
        return True
    return type(q) is not torch.Tensor and isinstance(q, FakeTensor)
