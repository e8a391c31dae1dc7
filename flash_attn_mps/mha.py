"""`torch.nn.MultiheadAttention` on MPS with one batch entry: strides that `F.linear` is fast with (pytorch#181725).

With `batch_first=True`, the module transposes `(1, seqlen, embed_dim)` to `(seqlen, 1, embed_dim)` and hands `F.linear`
that view. It is contiguous, but the stride of its dimension of size 1 is not the one that a fresh tensor would have,
which alone sends `F.linear` on MPS down a path that is 7 to 11 times slower. A view with the usual strides avoids it.

    from flash_attn_mps import mha

    mha.install()

The change is made where every such module comes by, `F.multi_head_attention_forward`, so that modules which exist
already, subclasses and modules from a pickle have it too. Numbers, gradients and memory stay the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

_lock = threading.Lock()
_torchs: Callable | None = None  # what was replaced; None: nothing is
_function: Callable | None = None


def install(devices: Collection[str] | None = None) -> None:
    """Normalize the strides of query, key and value on `devices`, like `["mps"]`; None: on any, which alters no number.

    Idempotent; a second call may change `devices`.
    """
    global _torchs, _function
    with _lock:
        _remove()
        _torchs = F.multi_head_attention_forward
        _function = F.multi_head_attention_forward = _normalizing(_torchs, devices)


def uninstall() -> None:
    """Put back the function that was there: the very same object. Harmless if nothing is installed."""
    with _lock:
        _remove()


def is_installed() -> bool:
    return _function is not None and F.multi_head_attention_forward is _function


def with_usual_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous `(seqlen, batch, embed_dim)` as a view with the strides of a fresh tensor; others unchanged."""
    if tensor.dim() != 3 or not tensor.is_contiguous():
        return tensor
    seqlen, batch, embed_dim = tensor.shape
    if tensor.stride() == (batch * embed_dim, embed_dim, 1) or not tensor.numel():
        return tensor
    return tensor.flatten().view(seqlen, batch, embed_dim)  # by way of one dimension, all strides are computed anew


def _remove() -> None:
    global _torchs, _function
    if _torchs is not None and is_installed():
        F.multi_head_attention_forward = _torchs
    _torchs = _function = None


def _normalizing(torchs: Callable, devices: Collection[str] | None) -> Callable:
    @functools.wraps(torchs)
    def multi_head_attention_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        # Compilers choose layouts themselves, and tensors of other types may not be what they seem.
        wanted = type(query) is torch.Tensor and (devices is None or query.device.type in devices)
        if wanted and not torch.compiler.is_compiling():
            # Which of them are one object decides how the projections are made.
            normal = {id(tensor): tensor for tensor in (query, key, value)}
            normal = {key: with_usual_strides(tensor) for key, tensor in normal.items()}
            query, key, value = (normal[id(tensor)] for tensor in (query, key, value))
        return torchs(query, key, value, *args, **kwargs)

    vars(multi_head_attention_forward)["__prepare_scriptable__"] = lambda: torchs  # torch.jit.script takes torch's
    return multi_head_attention_forward
