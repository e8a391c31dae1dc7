"""The FlashAttention 2 functions, and the private ones that others build on: presented by mtlflashattn, served by
`flash_attn_mps.frontends.fa2` and `fa2_private`. `help(flash_attn_func)` has the semantics.
"""

from __future__ import annotations

import inspect

import flash_attn_shim.needs_torch  # noqa: F401  (first: it turns a broken torch into an ImportError)

# isort: split
import torch
from torch import Tensor

from flash_attn_mps.frontends.fa2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_mps.frontends.fa2_private import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from flash_attn_shim.guests import fa1 as _fa1
from flash_attn_shim.guests.presented import present as _present
from flash_attn_shim.rehome import rehome as _rehome

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_present(__name__)
_rehome(globals())

# diffusers calls these.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


USE_TRITON_ROCM = False  # upstream's switch for AMD GPUs


class flash_attn_gpu:
    """Upstream's compiled extension, which is not here: xformers looks for the name, and uses it on CUDA only."""


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied if its last dimension is not contiguous; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of `m` that is not below `x`."""
    return (x + m - 1) // m * m


def _get_block_size_n(device, head_dim, is_dropout, is_causal):
    """How many keys a kernel takes at once: upstream's tests, and who borrowed from them, walk through S_dmask by it.

    Here S_dmask has no tiles, and any number that is right for them is right.
    """
    return 128 if head_dim <= 64 and not is_dropout else 64


def _applied(name, function):
    """A class whose `apply` is what upstream's autograd function of that name is to a caller.

    `apply` takes the arguments of `function` in order; upstream's has one more, whether gradients are enabled.
    """
    count = len(inspect.signature(function).parameters)

    def apply(*arguments):
        enabled = torch.is_grad_enabled() and all(arguments[count:])
        with torch.set_grad_enabled(enabled):
            return function(*arguments[:count])

    return type(name, (), {"apply": staticmethod(apply), "__module__": __name__, "__doc__": function.__doc__})


FlashAttnFunc = _applied("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _applied("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _applied("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = _applied("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _applied("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = _applied("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)


def __getattr__(name):
    """FlashAttention 1's names, for programs that cannot do without them."""
    function = _fa1.function(name)
    if function is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return function
