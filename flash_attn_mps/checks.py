"""Argument checks. Every message names the argument, what came and what would be accepted.

`names` maps the canonical name of an argument to the one that the caller used (`q` is `qkv` in the packed functions).
It is read only when something is wrong.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
MAX_HEAD_DIM = 512
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
Names = Mapping[str, str]
NO_NAMES: Names = {}


def show(value: Any) -> str:
    """Describe a value briefly: a tensor by shape, dtype and device, anything else by type and repr."""
    if isinstance(value, torch.Tensor):
        if not _is_strided(value):  # some of these have no shape
            return f"a {'nested' if value.is_nested else value.layout} tensor, {value.dtype}, on {value.device}"
        return f"a tensor {tuple(value.shape)}, {value.dtype}, on {value.device}"
    try:
        text = repr(value)
    except Exception:  # an object's own affair; and Python refuses to print an integer of 4,301 digits
        text = object.__repr__(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def malformed(name: str, came: Any, accepted: str) -> ValueError:
    return ValueError(f"{name}: got {came if isinstance(came, str) else show(came)}; accepted: {accepted}")


def unsupported(name: str, came: Any, accepted: str) -> NotImplementedError:
    came = came if isinstance(came, str) else show(came)
    return NotImplementedError(f"{name}: got {came}, which is not supported; supported: {accepted}")


def readable(tensor: torch.Tensor) -> bool:
    """Can the values be read without waiting for a device, and without breaking a graph?"""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def tensor_of_rank(value: Any, name: str, ranks: tuple[int, ...], dims: str) -> torch.Tensor:
    """A strided tensor with one of the `ranks`."""
    if not isinstance(value, torch.Tensor):
        raise malformed(name, show(value), f"a tensor ({dims})")
    if not _is_strided(value):
        raise unsupported(name, value, f"a strided tensor ({dims})")
    if value.dim() not in ranks:
        raise malformed(name, value, f"a tensor ({dims})")
    return value


def tensor(value: Any, name: str, dims: str, like: torch.Tensor | None = None) -> torch.Tensor:
    """A strided tensor of as many dimensions as `dims` names, on the device of `like`."""
    rank = dims.count(", ") + 1
    strided = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested
    if not strided or value.dim() != rank:
        tensor_of_rank(value, name, (rank,), dims)  # which says what is wrong
    if like is not None and value.device != like.device:
        raise malformed(name, value, f"a tensor on {like.device}, where the queries are")
    return value


def int32(value: Any, name: str, dims: str, length: int | None, like: torch.Tensor) -> torch.Tensor:
    """An int32 tensor, of `length` along its first dimension where that is known."""
    tensor(value, name, dims, like)
    if value.dtype != torch.int32:
        raise malformed(name, value, f"dtype torch.int32 ({dims})")
    if length is not None and value.shape[0] != length:
        raise malformed(name, value, f"{length} along the first dimension ({dims})")
    return value


def qkv(q: Any, k: Any, v: Any, dims: tuple[str, str], names: Names, kv_dtype: torch.dtype | None = None) -> None:
    """q, k and v: rank, dtype (of k and v `kv_dtype`, or that of q), device, heads, head dims. `dims` names these."""
    q_name, k_name, v_name = names.get("q", "q"), names.get("k", "k"), names.get("v", "v")
    tensor(q, q_name, dims[0])
    tensor(k, k_name, dims[1], q)
    tensor(v, v_name, dims[1], q)
    dtype, of = (q.dtype, q_name) if kv_dtype is None else (kv_dtype, k_name)
    if q.dtype not in DTYPES:
        raise unsupported(q_name, f"dtype {q.dtype}", "torch.float16, torch.bfloat16, torch.float32")
    for name, x in (k_name, k), (v_name, v):
        if x.dtype != dtype:
            raise malformed(name, f"dtype {x.dtype}", f"{dtype}, the dtype of {of}")
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape  # read once: reading is what costs here
    heads, head_dim = q_shape[-2], q_shape[-1]
    heads_k, head_dim_v = v_shape[-2], v_shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise unsupported(q_name, f"head_dim {head_dim}", f"1 to {MAX_HEAD_DIM}")
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        raise unsupported(v_name, f"head_dim {head_dim_v}", f"1 to {MAX_HEAD_DIM}")
    if k_shape[-1] != head_dim:
        raise malformed(k_name, f"head_dim {k_shape[-1]}", f"{head_dim}, the head_dim of {q_name}")
    if v_shape[:-1] != k_shape[:-1]:
        raise malformed(v_name, v, f"the shape of {k_name}, {tuple(k_shape)}, up to head_dim")
    if heads == 0:
        raise malformed(q_name, "no heads", "at least one")
    if heads_k == 0 or heads % heads_k:
        raise malformed(k_name, f"{heads_k} heads", f"a number that divides the {heads} heads of {q_name}")


def of_shape(
    value: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, like: torch.Tensor, why: str
) -> torch.Tensor:
    """A strided tensor on the device of `like`, whose shape is that of others, as `why` says. dtype None: any float."""
    fits = isinstance(value, torch.Tensor) and _is_strided(value) and value.shape == shape
    if not fits or value.device != like.device or not (value.dtype == dtype if dtype else value.is_floating_point()):
        accepted = f"a tensor {tuple(shape)}, {why}, of {dtype or 'a floating dtype'}, on {like.device}"
        raise malformed(name, show(value), accepted)
    return value


def output(value: Any, name: str, shape: tuple[int, ...], like: torch.Tensor, why: str) -> torch.Tensor:
    """A tensor to write a result to, rounded to its dtype."""
    own_memory(of_shape(value, name, shape, None, like, why), name)
    return value


def own_memory(value: torch.Tensor, name: str) -> None:
    """Has every element of a tensor that is written to a place of its own?"""
    if 0 in value.stride() and any(n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True)):
        raise malformed(name, "an expanded tensor", "one with memory of its own for every element")


def flag(value: Any, name: str) -> bool:
    """True or False, or what says one of them: None, a number, a tensor of one element (a device is waited for).

    What has no truth value of its own, such as a string or a tuple, would be true whatever it says.
    """
    if value is True or value is False:
        return value
    if hasattr(type(value), "__bool__"):
        try:
            return bool(value)
        except (RuntimeError, TypeError, ValueError):  # of two elements, or of none, or of a tensor without values
            pass
    raise malformed(name, show(value), "True or False")


def number(value: Any, name: str, accepted: str) -> float:
    """A Python or NumPy number, or a 0-d tensor (one on a device is waited for), as a float."""
    if type(value) is float:
        return value
    try:
        plain = value.item() if hasattr(value, "item") and value.ndim == 0 else value
        if hasattr(plain, "__float__") and not isinstance(plain, bool) and not hasattr(plain, "ndim"):
            return float(plain)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        pass
    raise malformed(name, show(value), accepted)


def softmax_scale(value: Any, head_dim: int, like: torch.Tensor, names: Names = NO_NAMES) -> float | torch.Tensor:
    """None (1 / sqrt(head_dim)), a number, or a 0-d tensor; a tensor on another device than the CPU stays there."""
    if value is None:
        return head_dim**-0.5
    if type(value) is float and -_LARGEST <= value <= _LARGEST:  # as nearly always: the name is not needed
        return value
    accepted = f"None, a finite float32 number or a 0-d tensor on {like.device} or on the CPU"
    name = names.get("softmax_scale", "softmax_scale")
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        if value.requires_grad and torch.is_grad_enabled():
            raise unsupported(name, "a tensor that requires grad", "a detached tensor; or scale q yourself")
        plain = _is_strided(value) and not value.is_complex() and not value.is_quantized and value.dtype != torch.bool
        if not plain or (value.device.type != "cpu" and value.device != like.device):
            raise malformed(name, value, accepted)
        if not readable(value):
            return value
    scale = number(value, name, accepted)
    if not -_LARGEST <= scale <= _LARGEST:  # nor NaN
        raise malformed(name, show(value), accepted)
    return scale


def softcap(value: Any) -> float:
    accepted = "0 (off) or a number above 0, in the range of float32"
    if (cap := number(value, "softcap", accepted)) and not _SMALLEST <= cap <= _LARGEST:  # scores are divided by it
        raise malformed("softcap", show(value), accepted)
    return cap


def attention_chunk(value: Any) -> int:
    accepted = "0 (off) or the number of keys of a chunk"
    if (chunk := integer(value, "attention_chunk", accepted)) < 0:
        raise malformed("attention_chunk", show(value), accepted)
    return chunk


def dropout_p(value: Any, names: Names = NO_NAMES) -> float:
    accepted = "a probability in [0, 1)"
    p = value if type(value) is float else number(value, names.get("dropout_p", "dropout_p"), accepted)
    if not 0 <= p < 1:
        raise malformed(names.get("dropout_p", "dropout_p"), show(value), accepted)
    return p


def integer(value: Any, name: str, accepted: str) -> int:
    """A Python or NumPy integer of 64 bits, or a 0-d integer tensor (one on a device is waited for)."""
    if type(value) is not int:
        value = _integer(value, name, accepted)
    if not -(2**63) <= value < 2**63:
        raise malformed(name, show(value), f"{accepted}, of at most 64 bits")
    return value


def _integer(value: Any, name: str, accepted: str) -> int:
    if isinstance(value, torch.SymInt):
        return cast(int, value)  # stands for an int in a graph
    try:
        if isinstance(value, torch.Tensor):
            if _is_integer(value):
                return cast(int, value.item())
        elif not isinstance(value, bool):
            return operator.index(value)
    except (RuntimeError, TypeError):  # on meta, for one
        pass
    raise malformed(name, show(value), accepted)


def _is_integer(tensor: torch.Tensor) -> bool:
    """Is it one integer, as far as can be told without reading it?"""
    return tensor.dim() == 0 and _is_strided(tensor) and tensor.dtype in INTEGERS


def window(window_size: Any, causal: Any) -> tuple[int, int]:
    """(left, right) with -1 for an open side. Causal means right = 0, also when a larger right was asked for."""
    accepted = "two integers (left, right), -1 for an open side"
    try:
        sides = window_size.tolist() if isinstance(window_size, torch.Tensor) else window_size
    except RuntimeError:  # on meta, for one
        sides = None
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise malformed("window_size", show(window_size), accepted)
    left, right = integer(sides[0], "window_size", accepted), integer(sides[1], "window_size", accepted)
    return max(left, -1), 0 if flag(causal, "causal") else max(right, -1)


def alibi_slopes(value: Any, batch: int, heads: int, like: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    fits = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device == like.device
    if not fits or not _is_strided(value) or value.shape != ((heads,) if value.dim() == 1 else (batch, heads)):
        # Formatted only now: a graph in which a length is formatted is specialised to that length.
        accepted = f"a float32 tensor ({heads},) or ({batch}, {heads}) on {like.device}"
        raise malformed("alibi_slopes", show(value), accepted)
    if value.requires_grad and torch.is_grad_enabled():
        raise unsupported("alibi_slopes", "a tensor that requires grad", "slopes without gradient: pass .detach()")
    return value


def mask(value: Any, name: str, shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
    """A bool mask (False hides) or one that is added to the scores, in four dimensions that broadcast to `shape`."""
    tensor_of_rank(value, name, (0, 1, 2, 3, 4), "batch, heads, seqlen_q, seqlen_k; or the last of these")
    if (
        value.device != like.device
        or value.dtype not in (torch.bool, like.dtype, torch.float32)
        or any(n not in (1, whole) for n, whole in zip(value.shape[::-1], shape[::-1], strict=False))
    ):
        dtypes = " or ".join(map(str, dict.fromkeys((torch.bool, like.dtype, torch.float32))))
        accepted = f"a tensor of {dtypes} that broadcasts to {shape} (batch, heads, seqlen_q, seqlen_k) of the queries"
        raise malformed(name, value, f"{accepted}, on {like.device}")
    return value if value.dim() == 4 else value[(None,) * (4 - value.dim())]


def sinks(value: Any, name: str, heads: int, like: torch.Tensor) -> torch.Tensor:
    """A score for each query head, in float32."""
    tensor(value, name, "heads,", like)
    if value.shape != (heads,) or not value.is_floating_point():
        raise malformed(name, value, f"a tensor ({heads},) of a floating dtype, one score for each query head")
    return value.to(torch.float32)


def qv(value: Any, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A query for the values: of the shape of the output and the dtype of q."""
    return of_shape(value, "qv", shape, like.dtype, like, "as the output of q and v")


def cu_seqlens(value: Any, name: str, total: int | None, total_of: str, like: torch.Tensor) -> list[int] | None:
    """Cumulative lengths (batch + 1,), from 0 to at most `total`: rows behind the last sequence belong to none.

    Returns the lengths where the values can be read for free.
    """
    int32(value, name, "batch + 1,", None, like)
    if value.shape[0] < 1:
        raise malformed(name, value, "batch + 1 cumulative lengths, from 0 on")
    if not readable(value):
        return None
    ends = value.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or any(n < 0 for n in lengths):
        raise malformed(name, f"{show(ends)}", "values that start at 0 and never decrease")
    if total is not None and ends[-1] > total:
        raise malformed(name, f"a last value of {ends[-1]}", f"at most {total}, the number of rows of {total_of}")
    return lengths


def lengths(value: Any, name: str, batch: int, most: int | list[int], like: torch.Tensor, of: str) -> list[int] | None:
    """Lengths (batch,) up to `most`, the room in `of`, of all or of each. Returned where they can be read for free."""
    int32(value, name, "batch,", batch, like)
    if not readable(value):
        return None
    values = value.tolist()
    limits = most if isinstance(most, list) else [most] * batch
    if any(not 0 <= n <= limit for n, limit in zip(values, limits, strict=True)):
        raise malformed(name, show(values), f"lengths between 0 and {most}, the room of {of}")
    return values


def max_seqlen(value: Any, name: str, known: list[int] | None, total: int) -> tuple[int, torch.Tensor | None]:
    """The longest sequence: at least as long as every length known.

    A 0-d tensor on a device is not waited for: `total` bounds it, and it is returned for tiers that need it. While a
    graph is captured nothing is known; the number is checked when the graph runs.
    """
    accepted = "an integer or a 0-d integer tensor, not negative"
    if isinstance(value, torch.Tensor) and not readable(value):
        if not _is_integer(value):
            raise malformed(name, value, accepted)
        return total, None if value.is_meta else value
    if torch.compiler.is_compiling() and type(value) is int:
        return value, None  # bert_padding's number is known only when the graph runs
    longest = integer(value, name, accepted)
    if longest < 0 or (known and longest < max(known)):
        raise malformed(name, value, f"at least {max(known or [0])}, the length of the longest sequence")
    return min(longest, total), None


def indices(value: torch.Tensor, name: str, limit: int, what: str, used: torch.Tensor | None = None) -> None:
    """Index values in [0, limit), where they can be read for free; `used` masks the entries that count."""
    if not readable(value) or value.numel() == 0:
        return
    checked = value if used is None else value[used]
    if checked.numel() and not 0 <= int(checked.min()) <= int(checked.max()) < limit:
        raise malformed(name, f"values from {int(checked.min())} to {int(checked.max())}", f"0 to {limit - 1}, {what}")
