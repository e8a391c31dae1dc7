"""`flash_attn.utils.torch`: `custom_fwd` and `custom_bwd`, for autograd functions under autocast, without the device
to name.

The device is the accelerator that is there: CUDA, else MPS, else the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.amp import custom_bwd, custom_fwd


def custom_amp_decorator(dec: Callable, cuda_amp_deprecated: bool) -> Callable:
    """`dec` with `device_type` filled in, where it takes one (`cuda_amp_deprecated`)."""

    def decorator(*args, **kwargs):
        if cuda_amp_deprecated:
            kwargs["device_type"] = _device_type()
        return dec(*args, **kwargs)

    return decorator


def _device_type():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


deprecated = True
custom_fwd = custom_amp_decorator(custom_fwd, deprecated)
custom_bwd = custom_amp_decorator(custom_bwd, deprecated)
