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
from flash_attn_shim.guests.source import Position, dotted, position, read

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Functions of `flash_attn_interface` that returned `(out, softmax_lse)` in early builds.
WITH_EARLY_RESULTS = ("flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func")

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
    return _wants(name, decide, map(_traced_site, traced.positions()))


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


def four_values(result: Result) -> str | None:
    """Why `unpad_input` returns four values there; "" if it returns five, None if the caller's caller must be asked."""
    uses = set(result.uses)
    if "returned" in uses:
        return None if uses <= {"returned", "nothing"} else ""
    unpacks = {use[1] for use in uses if use[0] == "unpack"}
    return "returns 4 values: the program unpacks four" if unpacks == {4} else ""


def early_result(is_varlen: bool, batch: int | None, result: Result) -> str | None:
    """Why a function of FlashAttention 3 gives `(out, softmax_lse)` there; "" if it does not, None as above.

    A tensor of (batch, ...) can be indexed and unpacked too. `[0]` of one would throw away what was computed for all but
    one entry: it is meant where the program has made that batch of one itself. Two entries of a batch of two are told
    from (out, softmax_lse) by the second name, and by whether it is used.
    """
    uses = set(result.uses) - {"nothing"}
    if uses == {"returned"}:
        return None
    kinds = {use[0] if isinstance(use, tuple) else use for use in uses}
    indices = {use[1] for use in uses if use[0] == "index"}
    if not kinds or not kinds <= {"index", "unpack", "star"} or not indices <= {0, 1} or indices == {1}:
        return ""
    if indices and not is_varlen and result.makes_batch_of_one:
        return ""
    if not all(_is_early_unpacking(result.source, targets, is_varlen, batch) for targets in result.targets):
        return ""
    how = "indexes" if kinds == {"index"} else "unpacks"
    return f"returns (out, softmax_lse): the program {how} the result, as early builds had it"


def _is_early_unpacking(source, targets, is_varlen, batch):
    """`out, lse = f(...)` or `out, *_ = f(...)`"""
    starred = [n for n, target in enumerate(targets) if isinstance(target, ast.Starred)]
    if starred:
        return starred[0] <= 2 and _is_unused(source, targets[starred[0]].value)
    if len(targets) != 2:
        return False
    name = dotted(targets[1]).rpartition(".")[2].lower()
    if is_varlen or "lse" in name or "softmax" in name or _is_unused(source, targets[1]):
        return True
    return batch is not None and batch != 2  # a tensor could not be unpacked into two


def _is_unused(source, target):
    if not isinstance(target, ast.Name):
        return False
    loads = (n for n in ast.walk(source.scope(target)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return target.id.startswith("_") or all(n.id != target.id for n in loads)


def _callers() -> Iterator[Site]:
    """The call of the function with two dialects, the call of the function that made it, and so on."""
    frame, first = sys._getframe(3), True  # of this generator, `_wants` and `call`
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
