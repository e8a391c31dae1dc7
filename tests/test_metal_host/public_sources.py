"""What the tests of other projects' kernels share: their sources, C structures, inputs, and float64."""

import ctypes
import math
import os
from pathlib import Path

import pytest
import torch

from metal_host import compile_shader

SOURCES = Path(os.environ.get("METAL_HOST_SOURCES", "/nonexistent"))
MARKS = [
    pytest.mark.metal_full,
    pytest.mark.skipif(not SOURCES.is_dir(), reason="METAL_HOST_SOURCES is not a folder"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def library(path: str, root: str, constants: dict, kernels: list[str] | None = None):
    file = SOURCES / path
    if not file.is_file():
        pytest.skip(f"{path} is not there")
    include = [SOURCES / root, file.parent, file.parent / "include", *file.parents[:4]]
    source = file.read_text(encoding="utf-8")
    return compile_shader(source, constants=constants, version="4.0", include=include, kernels=kernels)


def structure(fields: dict) -> torch.Tensor:
    """A C structure: int is int32, [int] an array of int64, float is float; ("u8", n) an int64."""

    class Layout(ctypes.Structure):
        _fields_ = [
            (
                n,
                ctypes.c_float
                if isinstance(v, float)
                else ctypes.c_int64 * len(v)
                if isinstance(v, list)
                else ctypes.c_int64
                if isinstance(v, tuple)
                else ctypes.c_int32,
            )
            for n, v in fields.items()
        ]

    values = Layout()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(values, name)[:] = value
        else:
            setattr(values, name, value[1] if isinstance(value, tuple) else value)
    return torch.frombuffer(bytearray(bytes(values)), dtype=torch.uint8).clone()


def inputs(dtype, heads, heads_k, queries, keys, d, dv=None):
    g = torch.Generator().manual_seed(queries * keys + d)
    q = torch.randn(1, heads, queries, d, generator=g).to(dtype)
    k = torch.randn(1, heads_k, keys, d, generator=g).to(dtype)
    return q, k, torch.randn(1, heads_k, keys, dv or d, generator=g).to(dtype)


def reference(q, k, v, causal=False, mask=None, sinks=None, softcap=0.0, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        s = softcap * (s / softcap).tanh()
    if causal:
        rows = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        s = s.masked_fill(torch.arange(k.shape[2]) > rows, -math.inf)
    if mask is not None:
        s = s + mask.double() if mask.dtype != torch.bool else s.masked_fill(~mask, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = s.softmax(-1)
    return (p[..., : v.shape[2]]) @ v


def check(got, expected, dtype):
    error = (got.double() - expected).abs().max().item()
    assert error < TOLERANCE[dtype] * max(1.0, expected.abs().max().item()), error
