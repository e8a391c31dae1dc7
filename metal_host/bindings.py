"""A launch's arguments as memory, by torch's rules."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from . import abi
from .constants import Constants

MAX_INLINE_BYTES = 4 << 10
_CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_UNSUPPORTED_DTYPES = (torch.float64, torch.complex128)


class Bindings:
    """The memory behind a launch's arguments."""

    def __init__(self, parameters: list, constants: Constants):
        """parameters: the kernel's, as kernels.parse_arguments gives them."""
        buffers = [p for p in parameters if not isinstance(p, str)]
        self._parameters = {p.index: p for p in buffers if p.space != "threadgroup"}
        self._threadgroup = {p.index: p for p in buffers if p.space == "threadgroup"}
        self._constants = constants
        self.threadgroup_bytes: dict[int, int] = {}
        self.kept: list[Any] = []  # memory that must live as long as the launch
        self.tensors: dict[int, torch.Tensor] = {}
        self.inline: dict[int, ctypes.Array] = {}
        self.tensor_lists: dict[int, list[torch.Tensor]] = {}

    def bind(self, index: int, value: Any, casts: str | dict[int, str] | None) -> None:
        if index >= abi.MAX_BUFFERS:
            raise RuntimeError(f"argument {index}: a kernel has at most {abi.MAX_BUFFERS} buffers")
        if isinstance(value, torch.Tensor):
            if value.dtype in _UNSUPPORTED_DTYPES:
                raise TypeError(f"argument {index}: {value.dtype} is not supported on MPS")
            self.tensors[index] = value
        elif isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            self.tensor_lists[index] = list(value)
            self.inline[index] = (ctypes.c_uint64 * len(value))(*(t.data_ptr() for t in value))
        else:
            self.inline[index] = _inline_bytes(index, value, casts)
        if index in self.inline and ctypes.sizeof(self.inline[index]) > MAX_INLINE_BYTES:
            size = ctypes.sizeof(self.inline[index])
            raise RuntimeError(
                f"argument {index}: {size} inline bytes, Metal's setBytes takes at most {MAX_INLINE_BYTES}"
            )

    def optional(self, index: int) -> bool:
        return index not in self._parameters or bool(self._parameters[index].condition)

    def set_threadgroup_bytes(self, lengths: Mapping[int, int], static: int) -> None:
        """The lengths of the [[threadgroup(n)]] arguments; `static` is what the kernel's own variables take."""
        for index, size in lengths.items():
            if index not in self._threadgroup:
                raise ValueError(f"threadgroup_bytes: the kernel has no argument [[threadgroup({index})]]")
            if not isinstance(size, int) or size <= 0 or size % 16:
                raise ValueError(f"threadgroup_bytes: length {index} must be a positive multiple of 16, got {size!r}")
        if missing := [f"{p.name} [[threadgroup({i})]]" for i, p in self._threadgroup.items() if i not in lengths]:
            raise RuntimeError(f"no length for {', '.join(missing)}: pass threadgroup_bytes={{index: bytes}}")
        if (total := static + sum(lengths.values())) > abi.MAX_THREADGROUP_BYTES:
            raise RuntimeError(
                f"the launch takes {total} bytes of threadgroup memory, the maximum is {abi.MAX_THREADGROUP_BYTES}"
            )
        self.threadgroup_bytes = dict(lengths)

    def finish(self) -> None:
        """Every buffer of the kernel must be bound: Metal would read address 0. One whose function constant is false does
        not exist: what was bound to it is dropped."""
        missing = []
        for index, parameter in self._parameters.items():
            exists = self._constants.exists(parameter.condition) if parameter.condition else True
            if exists is False:
                self.tensors.pop(index, None)
                self.inline.pop(index, None)
                self.tensor_lists.pop(index, None)
            elif exists and index not in self.tensors and index not in self.inline:
                missing.append(f"{parameter.name} [[buffer({index})]]")
        if missing:
            raise RuntimeError(f"no argument for {', '.join(missing)}")

    @property
    def on_gpu(self) -> bool:
        return any(t.device.type == "cuda" for t in self.tensors.values())

    def name(self, index: int) -> str:
        return self._parameters[index].name if index in self._parameters else f"buffer({index})"

    def threadgroup_name(self, index: int) -> str:
        return self._threadgroup[index].name

    def space(self, index: int) -> str:
        return self._parameters[index].space if index in self._parameters else "device"

    def addresses(self) -> dict[int, int]:
        return {i: t.data_ptr() for i, t in self.tensors.items()} | {
            i: ctypes.addressof(b) for i, b in self.inline.items()
        }


def _inline_bytes(index: int, value: Any, casts: str | dict[int, str] | None) -> ctypes.Array:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if not values:
        raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
    if all(isinstance(v, int) for v in values):
        dtype = torch.int64
    elif isinstance(values[0], float) and all(isinstance(v, (int, float)) for v in values):
        dtype = torch.float32
    elif isinstance(value, (tuple, list)):
        raise RuntimeError(f"Unexpected argument types: argument {index} is a sequence of {type(values[0]).__name__}")
    else:
        raise RuntimeError(f"Unsupported argument type: argument {index} is {type(value).__name__}")
    cast = casts.get(index, "") if isinstance(casts, dict) else casts or ""
    if not isinstance(cast, str) or (casts is not None and not isinstance(casts, (str, dict))):
        raise RuntimeError(f"Unexpected caster arg type {type(casts).__name__}")
    if cast and cast not in _CASTS:
        raise RuntimeError(f"Unsupported cast instruction {cast}: one of {', '.join(_CASTS)}")
    tensor = torch.tensor(values, dtype=dtype).to(_CASTS[cast] if cast else dtype)
    size = tensor.numel() * tensor.element_size()
    # 16 bytes more, so that the copy can start where a vector argument may be read from.
    storage = (ctypes.c_char * (size + 16))()
    offset = -ctypes.addressof(storage) % 16
    aligned = (ctypes.c_char * size).from_buffer(storage, offset)
    ctypes.memmove(aligned, tensor.data_ptr(), size)
    return aligned
