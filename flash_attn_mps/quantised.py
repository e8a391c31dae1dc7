"""Quantised keys and values: the formats, which are numbers in 8 bits times a descale, read and written.

The descale is that of the sequence and head. float8_e4m3fn and float8_e5m2 are those of the OCP 8-bit Floating Point
Specification, revision 1.0; int8 is two's complement. A uint8 tensor holds bytes of float8_e4m3fn, as vLLM's caches do:
it is what a torch has that has no float8 on MPS.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Format(NamedTuple):
    """How 8 bits stand for a number."""

    name: str  # also Metal's, after KV_IS_, in capitals
    dtype: torch.dtype
    mantissa: int = 0  # bits; for a float, the others but the sign are its exponent
    bias: int = 0  # of the exponent
    largest: float = 127.0  # finite


E4M3 = Format("e4m3", torch.float8_e4m3fn, mantissa=3, bias=7, largest=448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, mantissa=2, bias=15, largest=57344.0)
INT8 = Format("int8", torch.int8)
FORMATS = {torch.float8_e4m3fn: E4M3, torch.uint8: E4M3, torch.float8_e5m2: E5M2, torch.int8: INT8}


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """The values of codes of a dtype of `FORMATS`, exactly, in float32."""
    form = FORMATS[codes.dtype]
    if form is INT8:
        return codes.to(torch.float32)
    return _values(form, codes.device)[codes.view(torch.uint8).int()]


def encoded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The codes, as uint8, nearest to float32 values: ties to even, and the largest finite value beyond it.

    NaN stays NaN; int8, which has none, gets 0.
    """
    form = FORMATS[dtype]
    if form is INT8:
        return values.round().nan_to_num(0.0).clamp_(-128, 127).to(torch.int8).view(torch.uint8)
    drop = 23 - form.mantissa  # bits of a float32's mantissa
    least_normal = 2.0 ** (1 - form.bias)
    magnitude = values.abs().clamp_(max=form.largest)
    bits = magnitude.view(torch.int32)
    normal = ((bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)) >> drop) - ((127 - form.bias) << form.mantissa)
    subnormal = (magnitude * (2.0**form.mantissa / least_normal)).round().nan_to_num(0.0).int()
    code = torch.where(magnitude < least_normal, subnormal, normal).masked_fill_(values.isnan(), 127)
    return (code | ((values.view(torch.int32) >> 24) & 128)).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _values(form: Format, device: torch.device) -> torch.Tensor:
    """The values of all codes, by torch on the CPU, where every release has the dtypes."""
    codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    return codes.view(form.dtype).to(torch.float32).to(device)
