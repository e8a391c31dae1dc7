"""`scaled_dot_product_attention` with torch's signature, and its place in `torch.nn.functional`."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.jit import _builtins

from .. import dispatch
from ..tiers import METAL
from . import attention, compiled, counters, obstacles, settings
from .call import Arguments, Signature, bind, describe, signature
from .counters import FELL, LEFT, TAKEN
from .decision import Decision, decide

_lock = threading.RLock()
_usual_backends = obstacles.backends()
_given: settings.Settings | None = None
_warned: set[type] = set()


class _Serving:
    """A function in the place of `torchs`, torch's or whatever was there instead."""

    def __init__(self, torchs: Callable[..., torch.Tensor]) -> None:
        self.torchs = torchs
        self.active = True  # False: whoever still holds the function gets `torchs`
        self.function = self._function()

    def _function(self) -> Callable[..., torch.Tensor]:
        # In the closure, since what is looked up there costs least: most calls of most programs only pass by.
        torchs, on_mps = self.torchs, self._on_mps
        is_compiling, plain = torch.compiler.is_compiling, obstacles.PLAIN
        count_elsewhere = counters.count_elsewhere

        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            if is_compiling():
                return compiled.attention(torchs, args, kwargs)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None and type(mask) not in plain and obstacles.is_causal_bias(mask):
                return obstacles.with_causal_bias(mask, args, kwargs)
            query = args[0] if args else kwargs.get("query")
            if type(query) not in plain:
                counters.count(LEFT, "type")
            elif obstacles.is_served(query):
                return on_mps(args, kwargs)
            else:
                count_elsewhere()
            return torchs(*args, **kwargs)

        return scaled_dot_product_attention

    def retire(self) -> None:
        """Stop serving. Whoever still holds the function may call it still."""
        self.active = False
        _builtins._get_builtin_table().pop(id(self.function), None)  # the next object with this id is another one

    def _on_mps(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        out = None
        if self.active:
            try:
                arguments = bind(*args, **kwargs)
            except TypeError:
                pass  # torch says what is wrong, in its words
            else:
                out = _attention(arguments)
        return self.torchs(*args, **kwargs) if out is None else out


def _attention(arguments: Arguments) -> torch.Tensor | None:
    """This package's result; None where the call is torch's."""
    decision, arguments = examine(arguments, current())
    if decision.take:
        return _taken(arguments, decision)
    counters.count(LEFT, decision.reasons[0].key)
    return None


def examine(arguments: Arguments, given: settings.Settings, as_if: bool = False) -> tuple[Decision, Arguments]:
    """The decision about a call, and its arguments as autocast would have them."""
    obstacle = obstacles.of_surroundings(arguments, _usual_backends, as_if) or obstacles.of_values(arguments)
    if obstacle is not None:
        return Decision(False, (obstacle,)), arguments
    arguments = obstacles.under_autocast(arguments)
    return _decided(signature(arguments), given), arguments


@functools.lru_cache(maxsize=1024)
def _decided(of: Signature, given: settings.Settings) -> Decision:
    obstacle = obstacles.of_shapes(of)
    return decide(describe(of), given) if obstacle is None else Decision(False, (obstacle,))


def _taken(arguments: Arguments, decision: Decision) -> torch.Tensor | None:
    """This package's result, or None, after a warning, where it has none."""
    # For the speed of a forward pass the tier in plain PyTorch is no gain. Where torch is wrong or has no room it is,
    # and a backward pass was measured with it.
    worth_it = decision.needed or attention.needs_gradient(arguments)
    failure: Exception | None = None
    for without in (frozenset(), METAL) if worth_it else (frozenset({"torch"}),):
        try:
            out = dispatch.attention(attention.problem(arguments), without).out
        except Exception as error:
            if _is_out_of_memory(error):
                raise  # torch would need more, and may abort the process
            failure = failure or error
        else:
            counters.count(TAKEN, decision.reasons[0].key)
            return attention.as_called(out, arguments.query)
    counters.count(FELL, type(failure).__name__)
    _warn_once(failure, decision)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()  # on MPS it is a plain RuntimeError
    return "out of memory" in text or "invalid buffer size" in text


def _warn_once(error: Exception, decision: Decision) -> None:
    if type(error) in _warned:
        return
    _warned.add(type(error))
    but = f", although {decision.reasons[0].words}" if decision.needed else ""
    warnings.warn(
        f"mtlflashattn: torch's scaled_dot_product_attention serves a call{but}, because this package's failed: "
        f"{type(error).__name__}: {error}. Further failures of this kind are counted in sdpa.stats() alone. "
        "Please report it with the output of `mtlflashattn doctor`.",
        RuntimeWarning,
        stacklevel=6,
    )


def current() -> settings.Settings:
    """What holds now: read when the patch is installed, or at the first call."""
    global _given
    if _given is None:
        _given = settings.read()
    return _given


def reset() -> None:
    """Counters to zero, the environment read anew at the next call, and a failure warned about again."""
    global _given
    counters.clear()
    _warned.clear()
    _decided.cache_clear()
    _given = None


scaled_dot_product_attention = _Serving(F.scaled_dot_product_attention).function
scaled_dot_product_attention.__module__ = "flash_attn_mps.sdpa"
scaled_dot_product_attention.__qualname__ = "scaled_dot_product_attention"
scaled_dot_product_attention.__doc__ = """`scaled_dot_product_attention` with torch's arguments, results and errors.

Calls on MPS go to this package's attention where `explain` says so; all others are torch's own, untouched. Needs no
`install()`.
"""

_patch: _Serving | None = None
_permanent, _contexts = False, 0  # who wants it: install(), and how many installed()


def install() -> None:
    """Replace `torch.nn.functional.scaled_dot_product_attention`, reading the settings anew. Again is harmless."""
    global _permanent, _given
    with _lock:
        _given = None
        _permanent = True
        _put()


def uninstall() -> None:
    """Put the function that was there back: the very same object. Harmless if nothing is installed."""
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
    """Does `torch.nn.functional.scaled_dot_product_attention` come here?"""
    return _patch is not None and F.scaled_dot_product_attention is _patch.function


def torchs() -> Callable[..., torch.Tensor]:
    """The function that `install` replaces or has replaced."""
    return F.scaled_dot_product_attention if _patch is None else _patch.torchs


def _put() -> None:
    global _patch, _usual_backends, _given
    if is_installed():
        return
    _given = None
    if _patch is not None:
        _patch.retire()  # somebody has replaced it since
    _usual_backends = obstacles.backends()
    _patch = _Serving(F.scaled_dot_product_attention)
    function = _patch.function
    # Pickled, and printed, as the function of torch that it stands for.
    function.__module__, function.__qualname__ = "torch.nn.functional", "scaled_dot_product_attention"
    function.__doc__ = _patch.torchs.__doc__
    if (operator := _builtins._find_builtin(_patch.torchs)) is not None:  # torch.jit.script finds it by its id
        _builtins._register_builtin(function, operator)
    F.scaled_dot_product_attention = function


def _restore() -> None:
    global _patch
    if _patch is None or _permanent or _contexts:
        return
    if is_installed():
        F.scaled_dot_product_attention = _patch.torchs
    _patch.retire()
    _patch = None
