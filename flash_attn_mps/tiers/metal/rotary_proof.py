"""The small step on which the kernel of `rotary.py` proves itself, made from what it is compiled for (see `prove.py`).

Written out in float64: rotations by position, one beyond the tables; rows behind those of three sequences, one of them
without a place; numbers beyond what a quantised cache can hold; packed rows that no sequence has; and NaN in all memory
that nobody may write, or that nobody writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import quantised
from . import compiler, movement, prove, refusals
from .movement import Movement, NewKeys, Queries, Rotary
from .refusals import Refusal
from .trial import Expected

_DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}
_CODES = {"e4m3": torch.uint8, "e5m2": torch.float8_e5m2, "int8": torch.int8}  # uint8: MPS may have no float8_e4m3fn
_INDICES = {"int": torch.int32, "long": torch.int64}
_BATCH, _HEADS, _HEADS_K = 3, 2, 1
_PAGE, _ROOM, _POSITIONS = 4, 8, 8
_LARGE = 1000.0
_CPU = torch.device("cpu")


def proof(specialization: Movement, compiled: Any) -> Refusal | None:
    """Why the kernel, compiled so, is not to be used; None if it is. Waits for the device."""
    return prove.apart(lambda: _refusal(specialization, compiled))


def _refusal(m: Movement, compiled: Any) -> Refusal | None:
    try:
        device = torch.device(next(iter(compiler.device_types)))
        step = _Step(m)
        tensors = {name: prove.moved(t, device) for name, t in step.tensors.items()}
        asked, values, threads, group_size = movement.arguments(m.kernel, *step.arguments(tensors))
        if asked != m:
            raise AssertionError(f"its trial is for {asked}")
        compiled(*values, threads=threads, group_size=group_size)
        return prove.found_wrong(tensors, step.expected())
    except Exception as error:  # whatever happens here would happen in the caller's program
        return refusals.broke(error)


class _Step:
    """A step of generation, as `NewKeys` and so on name its tensors; the numbers are the same for all."""

    def __init__(self, m: Movement) -> None:
        self.m, self.generator = m, torch.Generator(_CPU).manual_seed(0)
        self.dtype, given = _DTYPES[m.dtype], frozenset(m.buffers)
        self.lengths_q = [3, 0, 2] if "cu_seqlens_q" in given else [2] * _BATCH
        self.lengths_new = [2, 0, 3] if "cu_seqlens_k_new" in given else [2] * _BATCH
        self.cached = [0, 3, _ROOM - 1] if "cached" in given else [_ROOM - 1] * _BATCH
        self.starts = [1, _POSITIONS - 1, 4] if "start" in given else [_POSITIONS - 1] * _BATCH
        self.tensors: dict[str, torch.Tensor] = {}
        if "q" in given:
            self.tensors["q"] = self._rows(
                self._leading(self.lengths_q, "cu_seqlens_q", m.cu_seqlens), _HEADS, m.head_dim
            )
            self.tensors["rotated_q"] = self._unwritten(self.tensors["q"].shape, self.dtype)
        if "k" in given:
            self._add_new_keys(given)
        if "cosines" in given:
            for name in ("cosines", "sines"):
                table = torch.randn(_POSITIONS, m.rotary_dim // 2, generator=self.generator, dtype=torch.float32)
                self.tensors[name] = table.to(_DTYPES[m.table])
        if "start" in given:
            self.tensors["start"] = torch.tensor(self.starts, dtype=_INDICES[m.start], device=_CPU)

    def _add_new_keys(self, given: frozenset[str]) -> None:
        m, tensors = self.m, self.tensors
        leading = self._leading(self.lengths_new, "cu_seqlens_k_new", "int")
        cache_dtype = _CODES[m.kv_format] if m.kv_format else self.dtype
        shape = (2 * _BATCH + 1, _PAGE) if "block_table" in given else (_BATCH, _ROOM)
        for name, dim in (("k", m.head_dim), ("v", m.head_dim_v)):
            tensors[name] = self._rows(leading, _HEADS_K, dim)
            tensors[f"{name}_cache"] = self._unwritten((*shape, _HEADS_K, dim), cache_dtype)
            if f"{name}_descale" in given:
                tensors[f"{name}_descale"] = 2.0 ** torch.arange(-2.0, _BATCH - 2.0, device=_CPU)[:, None]
        indices = {
            "cached": self.cached,
            "kv_batch_idx": [2, 0, 1],
            "block_table": [[6, 1], [0, 4], [3, 2]],
            "leftpad_k": [0, 1, 2],
            "seqused_k": [-1] * _BATCH,
        }
        tensors |= {
            name: torch.tensor(values, dtype=torch.int32, device=_CPU)
            for name, values in indices.items()
            if name in given
        }

    def arguments(self, tensors: dict[str, torch.Tensor]) -> tuple[Rotary | None, Queries | None, NewKeys | None]:
        get = tensors.get
        rotary = queries = new = None
        if "cosines" in tensors:
            start = get("start", self.starts[0])
            rotary = Rotary(tensors["cosines"], tensors["sines"], self.m.interleaved, start)
        if "q" in tensors:
            queries = Queries(tensors["q"], tensors["rotated_q"], get("cu_seqlens_q"))
        if "k" in tensors:
            fields: dict[str, Any] = {name: get(name) for name in NewKeys._fields}
            fields |= {"cu_seqlens": get("cu_seqlens_k_new"), "cached": get("cached", self.cached[0])}
            new = NewKeys(**fields)
        return rotary, queries, new

    def expected(self) -> dict[str, Expected]:
        tensors, eps = self.tensors, torch.finfo(self.dtype).eps
        found = {}
        if "q" in tensors:
            exact = tensors["q"].double()
            for b, rows in enumerate(self._of_sequences(self.lengths_q, "cu_seqlens_q")):
                exact[rows] = self._rotated(exact[rows], self.starts[b])
            found["rotated_q"] = Expected(exact, eps * exact.abs() + 1e-5)
        for name in ("k", "v"):
            if name in tensors:
                found[f"{name}_cache"] = self._expected_cache(name, eps)
        if "seqused_k" in tensors:
            pads = tensors["leftpad_k"].tolist() if "leftpad_k" in tensors else [0] * _BATCH
            numbers = [sum(n) for n in zip(self.cached, self.lengths_new, (-n for n in pads), strict=True)]
            found["seqused_k"] = Expected(torch.tensor(numbers, device=_CPU), 0.5)
        return found

    def _expected_cache(self, name: str, eps: float) -> Expected:
        """In numbers of the cache, of which the nearest is to be stored."""
        m, tensors = self.m, self.tensors
        cache, descale = tensors[f"{name}_cache"], tensors.get(f"{name}_descale")
        exact = quantised.decoded(cache).double() if m.kv_format else cache.double()
        for b, rows in enumerate(self._of_sequences(self.lengths_new, "cu_seqlens_k_new")):
            new = tensors[name][rows].double()
            new = self._rotated(new, self.starts[b]) if name == "k" else new
            new = new if descale is None else new / descale[b].item()
            for t in range(len(new)):
                position = self.cached[b] + t
                if position < _ROOM:
                    exact[self._place(b, position)] = new[t]
        allowed = eps * exact.nan_to_num(0.0).abs() + 1e-5
        if not m.kv_format:
            return Expected(exact, allowed)
        form = quantised.FORMATS[cache.dtype]
        exact.clamp_(-128.0 if form is quantised.INT8 else -form.largest, form.largest)
        if form is quantised.INT8:  # and half a step
            allowed += 0.5
        else:
            allowed += exact.nan_to_num(0.0).abs().clamp_(min=2.0 ** (1 - form.bias)) * 2.0 ** -(form.mantissa + 1)
        return Expected(exact, allowed, lambda written: quantised.decoded(written[f"{name}_cache"]))

    def _place(self, sequence: int, position: int) -> tuple[int, int]:
        tensors = self.tensors
        entry = int(tensors["kv_batch_idx"][sequence]) if "kv_batch_idx" in tensors else sequence
        if "block_table" not in tensors:
            return entry, position
        return int(tensors["block_table"][entry, position // _PAGE]), position % _PAGE

    def _rotated(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """`x` (rows, heads, dim) in float64, from position `start` on."""
        if "cosines" not in self.tensors:
            return x
        half, out = self.m.rotary_dim // 2, x.clone()
        there = max(0, min(len(x), _POSITIONS - start))  # rows that have a position in the tables
        cos, sin = (self.tensors[name].double()[start : start + there, None] for name in ("cosines", "sines"))
        first, second = slice(0, half), slice(half, 2 * half)
        if self.m.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        x0, x1 = x[:there, :, first], x[:there, :, second]
        out[:there, :, first], out[:there, :, second] = x0 * cos - x1 * sin, x0 * sin + x1 * cos
        return out

    def _of_sequences(self, lengths: list[int], cu_seqlens: str) -> list[Any]:
        if cu_seqlens not in self.tensors:
            return list(range(_BATCH))
        ends = self.tensors[cu_seqlens].tolist()
        return [slice(a, a + n) for a, n in zip(ends, lengths, strict=False)]

    def _leading(self, lengths: list[int], cu_seqlens: str, kind: str) -> tuple[int, ...]:
        """The first dimensions of rows of these lengths; packed ones have a row of nobody at their end."""
        if cu_seqlens not in self.m.buffers:
            return _BATCH, lengths[0]
        ends = torch.tensor([0, *lengths], device=_CPU).cumsum(0)
        self.tensors[cu_seqlens] = ends.to(_INDICES[kind])
        return (sum(lengths) + 1,)

    def _rows(self, leading: tuple[int, ...], heads: int, dim: int) -> torch.Tensor:
        x = self._unwritten((*leading, heads, dim), self.dtype)
        x.copy_(torch.randn(x.shape, generator=self.generator, dtype=torch.float32))
        x[..., -1] = _LARGE
        return x

    def _unwritten(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """NaN, in the middle of memory of it, and aligned as the kernel's rows are."""
        count, pairs = math.prod(shape), self.m.pairs
        if dtype in quantised.FORMATS:
            memory = torch.full((count + 2 * pairs,), 127, dtype=torch.uint8, device=_CPU).view(dtype)
        else:
            memory = torch.full((count + 2 * pairs,), math.nan, dtype=dtype, device=_CPU)
        return memory[pairs : pairs + count].view(shape)
