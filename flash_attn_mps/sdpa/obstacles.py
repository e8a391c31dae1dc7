"""What leaves a call to torch, whatever could be gained: another device, a transform, arguments that torch refuses."""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import checks
from .call import Arguments, Call
from .counters import ELSEWHERE
from .decision import Reason

DEVICE = "mps"
PLAIN = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (float, int)
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
    """Is it on the device whose calls may be taken?"""
    return tensor.device.type == DEVICE


def backends() -> tuple:
    """Which backends torch's attention may use, as `torch.nn.attention.sdpa_kernel` sets it."""
    return tuple([flag() for flag in _FLAGS])


def of_surroundings(arguments: Arguments, usual_backends: tuple, as_if: bool = False) -> Reason | None:
    """What stands in the way before dtypes and shapes are looked at. `as_if`: tensors on "meta" count as on MPS."""
    for tensor in arguments.tensors:
        if type(tensor) not in PLAIN:
            return Reason("type", f"an argument is a {type(tensor).__name__}, not a plain tensor")
    device = arguments.query.device
    if device.type != DEVICE and not (as_if and arguments.query.is_meta):
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
    if not torch.is_autocast_enabled(DEVICE):
        return arguments
    dtype = torch.get_autocast_dtype(DEVICE)
    cast = (
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in arguments.tensors
    )
    return Arguments(*cast, *arguments[len(arguments.tensors) :])


def of_values(arguments: Arguments) -> Reason | None:
    """What torch refuses, or this package does not have, among the arguments that are no tensors."""
    _, _, _, _, dropout_p, is_causal, scale, enable_gqa = arguments
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return Reason("type", "is_causal or enable_gqa is not a bool")
    if type(dropout_p) not in _NUMBERS or not 0 <= dropout_p < 1:
        return Reason("dropout_p", f"dropout_p is {dropout_p!r}")
    if scale is not None and type(scale) not in _NUMBERS:
        return Reason("scale", f"scale is {scale!r}")
    return None


def of_shapes(given: Call) -> Reason | None:
    """What only torch computes, or refuses, among dtypes and shapes."""
    query, key, value = given.query, given.key, given.value
    if given.dtypes[0] not in checks.DTYPES or len(set(given.dtypes)) > 1:
        return Reason("dtype", f"dtypes {', '.join(map(str, given.dtypes))}")
    if not 3 <= len(query) == len(key) == len(value):
        return Reason("shape", f"{len(query)}, {len(key)} and {len(value)} dimensions")
    if not _is_one_problem(query, key, value, given.gqa):
        shapes = ", ".join(str(tuple(shape)) for shape in (query, key, value))
        return Reason("shape", f"shapes {shapes}, which torch broadcasts or refuses")
    if 0 in (*query, *key, *value):
        return Reason("empty", "a tensor is empty")
    if max(query[-1], value[-1]) > checks.MAX_HEAD_DIM:
        return Reason("head_dim", f"a head_dim above {checks.MAX_HEAD_DIM}")
    if given.attn_mask is not None and (words := _against_mask(given, *given.attn_mask[:2])):
        return Reason("mask", words)
    return None


def _is_one_problem(query: torch.Size, key: torch.Size, value: torch.Size, gqa: bool) -> bool:
    """Do the shapes fit, without a dimension of query to be expanded?"""
    heads, heads_k = query[-3], key[-3]
    return (
        key[-1] == query[-1]
        and key[:-1] == value[:-1]
        and all(n in (1, m) for n, m in zip(key[:-3], query[:-3], strict=True))
        and (heads_k in (1, heads) or (gqa and heads_k > 0 and heads % heads_k == 0))
    )


def _against_mask(given: Call, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Why the mask is left to torch."""
    if given.causal:
        return "is_causal and attn_mask at once"
    if dtype not in (torch.bool, given.dtypes[0], torch.float32):
        return f"attn_mask has dtype {dtype}"
    # Leading dimensions are joined into one, which a mask that differs along them could not follow without a copy.
    if not 2 <= len(shape) <= min(4, len(given.query)) or (len(given.query) > 4 and len(shape) > 3):
        return f"attn_mask has {len(shape)} dimensions"
    full = (*given.query[:-1], given.key[-2])
    if any(n not in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False)):
        return f"attn_mask {tuple(shape)} does not broadcast to {full}"
    return None
