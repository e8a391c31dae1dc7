"""Results in the shape that the caller was written for, where its code shows which (`results.py`).

A function with two dialects looks at the call that it is asked by, once for each place: a program's file is parsed when
such a function is first called from it. Under torch.compile the place is the one that is being traced.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch

from flash_attn_shim.guests import journal, settings
from flash_attn_shim.guests.results import Result
from flash_attn_shim.guests.shapes import WITH_EARLY_RESULTS, early_result, four_values
from flash_attn_shim.guests.source import Position, position, read

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DEPTH = 12  # functions that hand a result on, one to the next


class Site(NamedTuple):
    """A call: where it stands, and what happens to its result (None: its source is not at hand)."""

    where: Position
    result: Result | None


_sites: dict[tuple[int, int], tuple[types.CodeType, Site]] = {}


def add_early_dialect(namespace: dict[str, Any]) -> None:
    """Make FlashAttention 3's functions return `(out, softmax_lse)` to programs written for its early builds."""
    for name in WITH_EARLY_RESULTS:
        namespace[name] = _early(namespace[name], "varlen" in name)


def _early(function, is_varlen):
    parameter = list(inspect.signature(function).parameters).index("return_attn_probs")

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) <= parameter and "return_attn_probs" not in kwargs:
            if torch.compiler.is_compiling():
                kwargs["return_attn_probs"] = _wants_while_traced(function.__name__, is_varlen)
            else:
                q = args[0] if args else kwargs.get("q", kwargs.get("qkv"))
                batch = None if q is None or is_varlen else len(q)
                decide = functools.partial(early_result, is_varlen, batch)
                kwargs["return_attn_probs"] = _wants(function.__name__, decide, _callers(), batch)
        return function(*args, **kwargs)

    return call


def of_four_values(function: _Function) -> _Function:
    """`unpad_input` without the fifth value for programs that unpack four."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        values = function(*args, **kwargs)
        if torch.compiler.is_compiling():
            wanted = _wants_while_traced(function.__name__, None)
        else:
            wanted = _wants(function.__name__, four_values, _callers())
        return values[:4] if wanted else values

    return cast(_Function, call)


def _wants_while_traced(name, is_varlen):
    from flash_attn_shim.guests import traced

    decide = four_values if is_varlen is None else functools.partial(early_result, is_varlen, None)
    sites = [_traced_site(where) for where in traced.positions()]
    return _wants(name, decide, sites or _callers(4))  # torch.export that is not strict runs the program itself


_wants_while_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # runs while torch.compile traces


def _wants(name, decide, sites, batch=None):
    """Does the caller expect the older result? `decide(result)` says why, "" for no, None for "my caller knows"."""
    if not settings.decides():
        return False
    sites = itertools.islice(sites, _DEPTH)
    for where, result in sites:
        answer = "" if result is None else decide(result)
        if answer is None:
            continue
        if batch == 1 and any(above.result and above.result.makes_batch_of_one for above in itertools.islice(sites, 3)):
            return False  # the caller's caller made it, for the result to lose it again
        if answer:
            journal.note_call(str(where), name, answer)
        return bool(answer)
    return False


def _callers(depth: int = 3) -> Iterator[Site]:
    """The call of the function with two dialects, the call of the function that made it, and so on.

    `depth`: of that call, above this generator, `_wants` and `call`.
    """
    frame, first = sys._getframe(depth), True
    while frame is not None:
        yield _site(frame, first)
        frame, first = frame.f_back, False  # type: ignore[assignment]


def _traced_site(where):
    source = read(where.file)
    return _read(where, source, source.call_at(where) if source else None)


def _site(frame, first):
    key = id(frame.f_code), frame.f_lasti
    known = _sites.get(key)
    if known is None:
        where = position(frame)
        source = read(where.file, frame.f_globals)
        call = source.call_at(where) if source else None
        if call is not None and first and _is_another(call, frame):
            call = None
        known = _sites[key] = frame.f_code, _read(where, source, call)
    return known[1]


def _read(where, source, call):
    try:
        return Site(where, None if call is None else Result(source, call))
    except Exception as error:  # a mistake in reading a program must not break it
        journal.failures[str(where)] = repr(error)
        return Site(where, None)


def _is_another(call, frame):
    """Is it a function of C that calls ours, such as `map`, and whose result is another one?"""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return False
    name, namespaces = call.func.id, (frame.f_locals, frame.f_globals, vars(builtins))
    value = next((namespace[name] for namespace in namespaces if name in namespace), None)
    return isinstance(value, type | types.BuiltinFunctionType)
