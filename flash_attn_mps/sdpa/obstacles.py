"""What leaves a call to torch, whatever could be gained: another device, a transform, arguments that torch refuses."""

from __future__ import annotations

import numbers

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import checks
from .call import Arguments
from .counters import ELSEWHERE
from .decision import Reason

PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLAGS = tuple(
    getattr(torch._C, name)
    for name in (
        "_get_flash_sdp_enabled",
        "_get_mem_efficient_sdp_enabled",
        "_get_math_sdp_enabled",
        "_get_cudnn_sdp_enabled",
        "_get_overrideable_sdp_enabled",
        "_get_sdp_priority_order",
    )
    if hasattr(torch._C, name)
)


def is_served(tensor: torch.Tensor) -> bool:
    """Is it on a device whose calls may be taken? (The attribute is read much faster than the name of a device.)"""
    return tensor.is_mps


def backends() -> tuple:
    """Which backends torch's attention may use, as `torch.nn.attention.sdpa_kernel` sets it."""
    return tuple(str(flag()) for flag in _FLAGS)


def of_surroundings(arguments: Arguments, usual_backends: tuple, as_if: bool = False) -> Reason | None:
    """What stands in the way before dtypes and shapes are looked at. `as_if`: tensors on "meta" count as on MPS."""
    for tensor in arguments.tensors:
        if type(tensor) not in PLAIN:
            return Reason("type", f"an argument is a {type(tensor).__name__}, not a plain tensor")
    device = arguments.query.device
    if not is_served(arguments.query) and not (as_if and arguments.query.is_meta):
        return Reason(ELSEWHERE, f"the tensors are on {device}")
    for tensor in arguments.tensors:
        if tensor.device != device:
            return Reason("devices", "the tensors are on several devices")
        if tensor.is_nested or tensor.layout is not torch.strided:
            return Reason("nested", "a tensor is nested or sparse")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return Reason("functorch", "a functorch transform is active")
    if torch._C._get_tracing_state() is not None:
        return Reason("tracing", "torch.jit.trace records the call")
    if torch._C._len_torch_dispatch_stack():
        return Reason("mode", "a TorchDispatchMode is active")
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return Reason("mode", "a TorchFunctionMode is active")
    if torch.autograd.forward_ad._current_level >= 0:
        return Reason("forward AD", "forward-mode differentiation is active")
    if backends() != usual_backends:
        return Reason("sdpa_kernel", "torch.nn.attention.sdpa_kernel, or a setting like it, chooses the backend")
    return None


def under_autocast(arguments: Arguments) -> Arguments:
    """The arguments as torch's autocast would cast them: every floating tensor but a float64 one."""
    device = arguments.query.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return arguments
    dtype = torch.get_autocast_dtype(device)
    cast = (
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in arguments.tensors
    )
    return Arguments(*cast, *arguments[len(arguments.tensors) :])


def of_arguments(arguments: Arguments) -> Reason | None:
    """What only torch computes, or refuses, among dtypes, shapes and values."""
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = arguments
    if query.dtype not in checks.DTYPES or not query.dtype == key.dtype == value.dtype:
        return Reason("dtype", f"dtypes {query.dtype}, {key.dtype}, {value.dtype}")
    if not 3 <= query.dim() == key.dim() == value.dim():
        return Reason("shape", f"{query.dim()}, {key.dim()} and {value.dim()} dimensions")
    if not _shapes_fit(query, key, value, enable_gqa):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        return Reason("shape", f"shapes {shapes}, which torch broadcasts or refuses")
    if 0 in (*query.shape, *key.shape, *value.shape):
        return Reason("empty", "a tensor is empty")
    if max(query.shape[-1], value.shape[-1]) > checks.MAX_HEAD_DIM:
        return Reason("head_dim", f"a head_dim above {checks.MAX_HEAD_DIM}")
    if mask is not None and (words := _mask(arguments)):
        return Reason("mask", words)
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return Reason("type", "is_causal or enable_gqa is not a bool")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real) or not 0 <= dropout_p < 1:
        return Reason("dropout_p", f"dropout_p is {dropout_p!r}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        return Reason("scale", f"scale is {scale!r}")
    return None


def _shapes_fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: object) -> bool:
    """Are these one attention problem, without a dimension of query to be expanded?"""
    leading = query.shape[:-3]
    heads, heads_k = query.shape[-3], key.shape[-3]
    return (
        key.shape[-1] == query.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
        and all(n in (1, m) for n, m in zip(key.shape[:-3], leading, strict=True))
        and (heads_k in (1, heads) or (enable_gqa is True and heads_k > 0 and heads % heads_k == 0))
    )


def _mask(arguments: Arguments) -> str | None:
    """Why the mask is left to torch."""
    query, key, _, mask, _, is_causal, _, _ = arguments
    if is_causal:
        return "is_causal and attn_mask at once"
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"attn_mask has dtype {mask.dtype}"
    if mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    # Leading dimensions are joined into one, which a mask that differs along them could not follow without a copy.
    if not 2 <= mask.dim() <= min(4, query.dim()) or (query.dim() > 4 and mask.dim() > 3):
        return f"attn_mask has {mask.dim()} dimensions"
    full = (*query.shape[:-1], key.shape[-2])
    if any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)):
        return f"attn_mask {tuple(mask.shape)} does not broadcast to {full}"
    return None
