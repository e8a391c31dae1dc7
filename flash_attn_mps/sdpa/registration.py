"""The place of torch's `scaled_dot_product_attention` in torch's dispatcher, for tensors on MPS.

A kernel that is registered for the keys of one device is found by every call on it, whoever makes it and by whatever
name: a name taken before, `nn.MultiheadAttention`, TorchScript, C++. Calls on other devices never come here.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import compiled, obstacles, serve
from .call import Arguments

_NAME = "aten::scaled_dot_product_attention"

_lock = threading.RLock()
_library: torch.library.Library | None = None  # holds the registration
_entries: list[str] = []  # of the dispatcher's table, as the registration made them
_serving = False  # False: a kernel that is still registered passes calls on
_permanent, _contexts = False, 0  # who wants it: install(), and how many installed()


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with torch's arguments, results and errors.

    Calls on MPS go to this package's attention where `explain` says so; all others are torch's own, untouched. Needs no
    `install()`.
    """
    out = None
    if torch.compiler.is_compiling():
        out = compiled.in_dynamo(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    elif not _serving:  # otherwise torch's function comes here
        out = serve.result(Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    if out is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return out


def _kernel(query, *args, **kwargs):
    """What torch's dispatcher calls, after autocast and torch.jit.trace and before autograd, without the arguments that
    have their defaults."""
    out = None
    if _serving and obstacles.is_served(query):
        arguments = Arguments(query, *args, **kwargs)
        if type(query) in obstacles.PLAIN or not torch._C._len_torch_dispatch_stack():
            out = serve.result(arguments)
        else:
            out = compiled.in_graph(arguments)
    return serve.torchs(query, *args, **kwargs) if out is None else out


def install() -> None:
    """Serve torch's attention on MPS from now on, reading the settings anew. Idempotent.

    A RuntimeWarning says so where this torch does not let it: then torch's attention stays as it is.
    """
    global _permanent
    with _lock:
        _permanent = True
        serve.reread()
        _put()


def uninstall() -> None:
    """Torch's attention is torch's own again. Harmless if nothing is installed.

    The dispatcher is as it was before, or, while other threads run, which could be about to enter the kernel, once
    `uninstall` is called without them: until then the kernel passes all calls on.
    """
    global _permanent
    with _lock:
        _permanent = False
        _restore()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Installed inside the `with` block, in all threads; afterwards as before."""
    global _contexts
    with _lock:
        _contexts += 1
        _put()
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            _restore()


def is_installed() -> bool:
    """Does torch's attention on MPS come here? False too where another library has registered a kernel since."""
    return _serving and _table() == _entries


def _put() -> None:
    global _serving
    if _serving:
        return
    serve.begin()
    _serving = _library is not None or _register()


def _restore() -> None:
    global _serving
    if _permanent or _contexts or _library is None:
        return
    _serving = False
    compiled.end()
    if _is_alone():
        _withdraw(_library)


def _register() -> bool:
    """Is the kernel in its place now?"""
    global _library, _entries
    library = torch.library.Library("aten", "IMPL")
    try:
        taken = [key for key in _keys() if torch._C._dispatch_has_kernel_for_dispatch_key(_NAME, key)]
        if taken:
            raise RuntimeError(f"there is a kernel for {', '.join(taken)} already, of another library or of torch")
        if serve.torchs is F.scaled_dot_product_attention:
            raise AttributeError("OpOverload has no _op_dk")
        compiled.check()
        for key in _keys():
            library.impl("scaled_dot_product_attention", _kernel, key)
        # In inference mode, compilers of older releases ask for the implementation of all devices instead.
        serve.operator.py_impl(serve.COMPOSITE)(_kernel)
    except (AttributeError, RuntimeError, TypeError) as error:
        library._destroy()
        warnings.warn(
            f"mtlflashattn: torch {torch.__version__} keeps its own scaled_dot_product_attention on MPS: {error}. "
            "sdpa.scaled_dot_product_attention is served nevertheless.",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    _library, _entries = library, _table()
    return True


def _is_alone() -> bool:
    """Is there no other thread? The dispatcher frees a kernel without asking who is about to call it."""
    return threading.active_count() == 1


def _withdraw(library: torch.library.Library) -> None:
    global _library
    library._destroy()
    _library = None
    del serve.operator.py_kernels[serve.COMPOSITE]
    serve.operator._dispatch_cache.clear()


def _keys() -> tuple[str, str]:
    """Where the dispatcher looks for a kernel: in inference mode, and otherwise."""
    backend = obstacles.DEVICE.upper()
    return backend, f"Autograd{backend}"


def _table() -> list[str]:
    """The kernels of these keys, in words."""
    heads = tuple(f"{key}:" for key in _keys())
    return [line for line in torch._C._dispatch_dump_table(_NAME).splitlines() if line.startswith(heads)]
