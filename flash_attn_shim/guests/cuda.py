"""Where a program asks for CUDA: tests of tensors, and calls that fail in a torch without it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from flash_attn_shim.guests.source import Source, caught, dotted

_QUERIES = {
    "current_device", "current_stream", "get_device_capability", "get_device_name", "get_device_properties",
    "mem_get_info", "set_device", "synchronize",
}  # fmt: skip
_OTHERS = {"mps", "cpu", "xpu", "npu", "hip"}
_SURVIVES = {"Exception", "BaseException", "AssertionError", "RuntimeError"}


def asked_at_import(source: Source) -> int | None:
    """The line of the first call at a module's top that fails where there is no CUDA; None if there is none."""
    calls = (n for n in source.nodes if isinstance(n, ast.Call) and source.scope(n) is source.tree)
    lines = [n.lineno for n in calls if needs_device(n) and not _is_optional(source, n)]
    return min(lines, default=None)


def demanded_first(source: Source, statements: list[ast.stmt]) -> int | None:
    """The line of the first of these statements that certainly runs and raises without CUDA; None if there is none."""
    return next((s.lineno for s in _always_run(statements) if _demands(source, s)), None)


def needs_device(expression: ast.AST) -> bool:
    """Does an expression fail where there is no CUDA?"""
    return any(isinstance(node, ast.Call) and _fails(node) for node in ast.walk(expression))


def _fails(call):
    module, _, name = dotted(call.func).rpartition(".")
    if (module.endswith("cuda") and name in _QUERIES) or (isinstance(call.func, ast.Attribute) and name == "cuda"):
        return True
    moved = call.args if isinstance(call.func, ast.Attribute) and name == "to" else []
    devices = [*moved, *(keyword.value for keyword in call.keywords if keyword.arg == "device")]
    return any(isinstance(d, ast.Constant) and _kind(d.value) == "cuda" for d in devices)


def _is_optional(source, node):
    """Is it evaluated only where CUDA is available or in a script, or may it fail?"""
    inside = node
    for up in source.above(node):
        if isinstance(up, ast.If | ast.IfExp | ast.BoolOp | ast.While):
            text = ast.dump(up if isinstance(up, ast.BoolOp) else up.test)
            if "is_available" in text or "__main__" in text or "device_count" in text:
                return True
        if isinstance(up, ast.Try) and inside in up.body and any(caught(h) & _SURVIVES for h in up.handlers):
            return True
        inside = up
    return False


def _always_run(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        yield statement
        if isinstance(statement, ast.With):
            yield from _always_run(statement.body)


def _demands(source, statement):
    """Does it raise for tensors that are not on CUDA?"""
    if isinstance(statement, ast.Assert):
        return _says_cuda(statement.test) is True
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise) and _says_cuda(statement.test) is False
    if isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign | ast.Return) and statement.value is not None:
        calls = (n for n in ast.walk(statement.value) if isinstance(n, ast.Call) and _fails(n))
        return any(not _is_optional(source, n) for n in calls)
    return False


def _says_cuda(test):
    """True: it holds only on CUDA. False: it holds wherever there is no CUDA. None: neither can be told."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _says_cuda(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [_says_cuda(value) for value in test.values]
        some, all_ = (True, False) if isinstance(test.op, ast.And) else (False, True)
        if some in parts:
            return some
        return all_ if all(part is all_ for part in parts) else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _compared(test)
    if isinstance(test, ast.Call):
        name = dotted(test.func).rpartition(".")[2]
        if name in ("all", "any") and test.args and isinstance(test.args[0], ast.GeneratorExp | ast.ListComp):
            return _says_cuda(test.args[0].elt)
        if name == "startswith" and test.args and isinstance(test.args[0], ast.Constant):
            return True if _kind(test.args[0].value) == "cuda" else None
        return True if dotted(test.func).endswith("cuda.is_available") else None
    return True if isinstance(test, ast.Attribute) and test.attr == "is_cuda" else None


def _compared(test):
    kinds = {_kind(n.value) for n in ast.walk(test) if isinstance(n, ast.Constant)}
    if "cuda" not in kinds or kinds & _OTHERS:
        return None
    return isinstance(test.ops[0], ast.Eq | ast.In | ast.Is)


def _kind(value):
    """The device's kind in "cuda" and "cuda:0"."""
    return value.partition(":")[0] if isinstance(value, str) else None
