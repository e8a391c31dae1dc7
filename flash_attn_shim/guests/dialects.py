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
from flash_attn_shim.guests.source import Position, Source, dotted, position, read

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DEPTH = 12  # functions that hand a result on, one to the next


class Site(NamedTuple):
    """A call: where it stands, and what happens to its result (None: its source is not at hand)."""

    where: Position
    source: Source | None
    result: Result | None


_sites: dict[tuple[int, int], tuple[types.CodeType, Site]] = {}


def add_early_dialect(namespace: dict[str, Any]) -> None:
    """Make FlashAttention 3's functions return `(out, softmax_lse)` to programs written for its early builds."""
    for name in ("flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func"):
        namespace[name] = _early(namespace[name], "varlen" in name)


def _early(function, is_varlen):
    parameter = list(inspect.signature(function).parameters).index("return_attn_probs")

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) <= parameter and "return_attn_probs" not in kwargs:
            if torch.compiler.is_compiling():
                kwargs["return_attn_probs"] = _wants_while_traced(function.__name__, is_varlen)
            elif _wants(function.__name__, functools.partial(_tuple_of, is_varlen, args), _callers()):
                kwargs["return_attn_probs"] = True
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
            wanted = _wants(function.__name__, _four, _callers())
        return values[:4] if wanted else values

    return cast(_Function, call)


def _wants_while_traced(name, is_varlen):
    from flash_attn_shim.guests import traced

    decide = _four if is_varlen is None else functools.partial(_tuple_of, is_varlen, ())
    return _wants(name, decide, map(_traced_site, traced.positions()))


_wants_while_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # runs while torch.compile traces


def _wants(name, decide, sites):
    """Does the caller expect the older result? `decide(site)` says why, "" for no, None for "my caller knows"."""
    if not settings.decides():
        return False
    for site in itertools.islice(sites, _DEPTH):
        answer = "" if site.result is None else decide(site)
        if answer is not None:
            if answer:
                journal.note_call(str(site.where), name, answer)
            return bool(answer)
    return False


def _four(site):
    uses = set(site.result.uses)
    if "returned" in uses:
        return None if uses <= {"returned", "nothing"} else ""
    unpacks = {count for kind, count in (use for use in uses if isinstance(use, tuple)) if kind == "unpack"}
    return "returns 4 values: the program unpacks four" if unpacks == {4} else ""


def _tuple_of(is_varlen, args, site):
    uses = set(site.result.uses) - {"nothing"}
    if uses == {"returned"}:
        return None
    kinds = {use[0] if isinstance(use, tuple) else use for use in uses}
    if not kinds or not kinds <= {"index", "unpack", "star"}:
        return ""
    indices = {use[1] for use in uses if use[0] == "index"}
    if indices and (0 not in indices or not indices <= {0, 1}):
        return ""
    if indices and not is_varlen and _has_batch_of_one(site):
        return ""
    for targets in site.result.targets:
        if not _is_early_unpacking(site, targets, is_varlen, args):
            return ""
    how = "indexes" if kinds == {"index"} else "unpacks"
    return f"returns (out, softmax_lse): the program {how} the result, as early builds had it"


def _is_early_unpacking(site, targets, is_varlen, args):
    """`out, lse = f(...)` or `out, *_ = f(...)`, and not the two entries of a batch of two."""
    starred = [n for n, target in enumerate(targets) if isinstance(target, ast.Starred)]
    if starred:
        return starred[0] <= 2 and _is_unused(site.source, targets[starred[0]].value)
    if len(targets) != 2:
        return False
    name = dotted(targets[1]).rpartition(".")[2].lower()
    if "lse" in name or "softmax" in name or _is_unused(site.source, targets[1]):
        return True
    return bool(args) and args[0].shape[0] != 2  # a tensor could not be unpacked into two


def _is_unused(source, target):
    if not isinstance(target, ast.Name):
        return False
    loads = (n for n in ast.walk(source.scope(target)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return target.id.startswith("_") or all(n.id != target.id for n in loads)


def _has_batch_of_one(site):
    """Does the program make the batch of one that `[0]` would remove again?"""
    call = site.result.call
    arguments = [*call.args, *(k.value for k in call.keywords)] if isinstance(call, ast.Call) else []
    scope = site.source.scope(call)
    names = {n.id for argument in arguments for n in ast.walk(argument) if isinstance(n, ast.Name)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(n, ast.Name) and n.id in names for target in targets for n in ast.walk(target)):
                arguments.append(node.value)
    return any(_adds_dimension(n) for argument in arguments for n in ast.walk(argument))


def _adds_dimension(node):
    if isinstance(node, ast.Subscript):  # q[None]
        first = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) and node.slice.elts else node.slice
        return isinstance(first, ast.Constant) and first.value is None
    if not isinstance(node, ast.Call):
        return False
    name = dotted(node.func).rpartition(".")[2]
    values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    if name in ("unsqueeze", "unsqueeze_", "expand_dims"):
        return 0 in values
    if name in ("view", "reshape", "expand"):
        return any(isinstance(n, ast.Constant) and n.value == 1 for n in node.args[:2])
    texts = [value for value in values if isinstance(value, str) and "->" in value]
    return any(text.partition("->")[2].strip().startswith(("1 ", "() ")) for text in texts)


def _callers() -> Iterator[Site]:
    """The call of the function with two dialects, the call of the function that made it, and so on."""
    frame, first = sys._getframe(3), True  # of this generator, `_wants` and `call`
    while frame is not None:
        yield _site(frame, first)
        frame, first = frame.f_back, False  # type: ignore[assignment]


def _traced_site(where):
    source = read(where.file)
    call = source.call_at(where) if source else None
    return Site(where, source, Result(source, call) if source and call else None)


def _site(frame, first):
    key = id(frame.f_code), frame.f_lasti
    known = _sites.get(key)
    if known is None:
        where = position(frame)
        source = read(where.file, frame.f_globals)
        call = source.call_at(where) if source else None
        if call is not None and first and _is_another(call, frame):
            call = None
        known = _sites[key] = frame.f_code, Site(where, source, Result(source, call) if call else None)
    return known[1]


def _is_another(call, frame):
    """Is it a function of C that calls ours, such as `map`, and whose result is another one?"""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return False
    name, namespaces = call.func.id, (frame.f_locals, frame.f_globals, vars(builtins))
    value = next((namespace[name] for namespace in namespaces if name in namespace), None)
    return isinstance(value, type | types.BuiltinFunctionType)
