"""One call: the decision about it, its result by this package, and torch's own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import dispatch
from ..project import please_report
from ..tiers import METAL
from . import attention, counters, obstacles, settings
from .call import Arguments, Call, call_of
from .counters import FELL, LEFT, TAKEN
from .decision import Decision, decide

# torch's implementation for every device, which a kernel registered for one of them does not hide. Without `_op_dk`
# nothing is registered, and the function is torch's.
operator = torch.ops.aten.scaled_dot_product_attention.default
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
torchs: Callable[..., torch.Tensor] = (
    functools.partial(operator._op_dk, COMPOSITE) if hasattr(operator, "_op_dk") else F.scaled_dot_product_attention
)

_given: settings.Settings | None = None
_usual_backends = obstacles.backends()
_warned: set[type] = set()


def result(arguments: Arguments) -> torch.Tensor | None:
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
    return _decided(call_of(arguments), given), arguments


@functools.lru_cache(maxsize=1024)
def _decided(call: Call, given: settings.Settings) -> Decision:
    obstacle = obstacles.of_shapes(call)
    return decide(call, given) if obstacle is None else Decision(False, (obstacle,))


def _taken(arguments: Arguments, decision: Decision) -> torch.Tensor | None:
    """This package's result, or None, after a warning, where it has none."""
    # For the speed of a forward pass the tier in plain PyTorch is no gain. Where torch is wrong or has no room it is,
    # and a backward pass was measured with it.
    worth_it = decision.needed or arguments.need_gradient
    failures: list[Exception] = []
    for without in (frozenset(), METAL) if worth_it else (frozenset({"torch"}),):
        try:
            out = dispatch.attention(attention.problem(arguments), without).out
        except Exception as error:
            if _is_out_of_memory(error):
                raise  # torch would need more, and may abort the process
            failures.append(error)
        else:
            counters.count(TAKEN, decision.reasons[0].key)
            return attention.as_called(out, arguments.query)
    counters.count(FELL, type(failures[0]).__name__)
    _warn_once(failures[0], decision)
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
        f"{type(error).__name__}: {error}. Further failures of this kind only show in "
        f"sdpa.stats(). {please_report('doctor')}",
        RuntimeWarning,
        stacklevel=5,
    )


def current() -> settings.Settings:
    """What holds now: read when it is first asked for."""
    global _given
    if _given is None:
        _given = settings.read()
    return _given


def usual_backends() -> bool:
    """Does nothing but torch's own choice, as it was at `begin`, say which backend torch's attention uses?"""
    return obstacles.backends() == _usual_backends


def reread() -> None:
    """Read the settings anew at the next call."""
    global _given
    _given = None


def begin() -> None:
    """The backends that torch's attention may use now are the usual ones; read the settings anew."""
    global _usual_backends
    _usual_backends = obstacles.backends()
    reread()


def reset() -> None:
    """Counters to zero, the environment read anew at the next call, and a failure warned about again."""
    counters.clear()
    _warned.clear()
    _decided.cache_clear()
    reread()
