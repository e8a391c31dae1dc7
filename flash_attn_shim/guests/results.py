"""What a program does with the result of a call, read from its source.

Early builds of FlashAttention 3 returned `(out, softmax_lse)` where it now returns `out`, and `unpad_input` returned
four values before flash-attn 2.7, then five. Which of them a program was written for shows where it takes the result
apart: `f(...)[0]`, `out, lse = f(...)`. The result is followed through names, attributes of `self`, conditional
expressions, helpers of the same file, and through the functions that return it, up the stack.

Each use is one of: `("index", n)`, `("unpack", n)`, `("star", n)` with n names before the starred one, "returned",
"both" (the program asks what it got), "tensor" (what one does with a tensor, or what cannot be told), "nothing".
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Any

from flash_attn_shim.guests.source import Source, dotted

_PASS_ON = {"tuple", "list"}
_ASK = {"isinstance", "type", "len", "hasattr", "is_tensor"}
_SHOW = {"print", "repr", "str", "id", "debug", "info", "warning", "log"}

Use = Any


class Result:
    """The uses of one call's result in a source."""

    def __init__(self, source: Source, call: ast.expr) -> None:
        self.source = source
        self.call = call
        self._seen: set[tuple[ast.AST, str]] = set()
        #: The targets of each unpacking into two, and of each starred one.
        self.targets: list[list[ast.expr]] = []
        self.uses: list[Use] = list(self._of(call))

    @functools.cached_property
    def makes_batch_of_one(self) -> bool:
        """Does the program add the dimension of the arguments that `[0]` of the result removes again?"""
        call = self.call.value if isinstance(self.call, ast.Await) else self.call
        arguments = [*call.args, *(k.value for k in call.keywords)] if isinstance(call, ast.Call) else []
        names = {n.id for argument in arguments for n in ast.walk(argument) if isinstance(n, ast.Name)}
        for node in ast.walk(self.source.scope(call)):
            if isinstance(node, ast.Assign | ast.NamedExpr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(n, ast.Name) and n.id in names for target in targets for n in ast.walk(target)):
                    arguments.append(node.value)
        return any(_adds_dimension(n) for argument in arguments for n in ast.walk(argument))

    def _of(self, node: ast.AST) -> Iterator[Use]:
        """The uses of an expression's value."""
        up: Any = self.source.parent.get(node)
        if isinstance(up, ast.Expr):
            yield "nothing"
        elif isinstance(up, ast.Return | ast.Lambda):
            yield "returned"
        elif isinstance(up, ast.Await | ast.BoolOp) or (isinstance(up, ast.IfExp) and node is not up.test):
            yield from self._of(up)
        elif isinstance(up, ast.NamedExpr):
            yield from self._of(up)
            yield from self._named(up.target, up)
        elif isinstance(up, ast.Subscript) and node is up.value:
            yield self._subscript(up)
        elif isinstance(up, ast.Assign | ast.AnnAssign) and node is up.value:
            for target in up.targets if isinstance(up, ast.Assign) else [up.target]:
                yield from self._assigned(target, up)
        elif isinstance(up, ast.Starred):
            yield from self._starred(up)
        elif isinstance(up, ast.Call) and node is not up.func:
            yield from self._passed(up, node)
        elif isinstance(up, ast.keyword):
            yield from self._passed(self.source.parent[up], up)
        elif isinstance(up, ast.Tuple) and isinstance(self.source.parent[up], ast.Assign):
            yield from self._beside(up, node)
        elif isinstance(up, ast.Compare) and all(isinstance(x, ast.Constant) for x in up.comparators):
            yield "nothing"  # `out is None`
        else:
            yield "tensor"

    def _subscript(self, node):
        if isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
            return "index", node.slice.value
        return "tensor"

    def _assigned(self, target, statement):
        if isinstance(target, ast.Name):
            yield from self._named(target, statement)
        elif isinstance(target, ast.Tuple | ast.List):
            starred = [n for n, part in enumerate(target.elts) if isinstance(part, ast.Starred)]
            self.targets.append(target.elts)
            yield ("star", starred[0]) if starred else ("unpack", len(target.elts))
        elif isinstance(target, ast.Attribute):
            yield from self._stored(target)
        else:
            yield "tensor"

    def _stored(self, target):
        """`self.out = f(...)`: where the class, or else the function, reads it again."""
        home = next((up for up in self.source.above(target) if isinstance(up, ast.ClassDef)), self.source.scope(target))
        if (home, dotted(target)) in self._seen:
            return
        self._seen.add((home, dotted(target)))
        read = [n for n in ast.walk(home) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
        uses = [use for n in read if dotted(n) == dotted(target) for use in self._of(n)]
        yield from uses or ["tensor"]

    def _beside(self, values, node):
        """`out, other = f(...), g(...)`"""
        statement: Any = self.source.parent[values]
        for target in statement.targets:
            pairs = isinstance(target, ast.Tuple) and len(target.elts) == len(values.elts)
            if not pairs or _stars(target.elts) or _stars(values.elts):
                yield "tensor"
            else:
                yield from self._assigned(target.elts[values.elts.index(node)], statement)

    def _starred(self, node):
        """`g(*f(...))`, `[*f(...)]`, `a, b = *f(...),`"""
        up: Any = self.source.parent[node]
        above = self.source.parent.get(up)
        if isinstance(up, ast.Call):
            yield self._spread(up, node)
        elif isinstance(up, ast.Tuple | ast.List) and isinstance(above, ast.Assign) and len(above.targets) == 1:
            target: Any = above.targets[0]
            names = target.elts if isinstance(target, ast.Tuple | ast.List) else []
            if names and not _stars(names) and _stars(up.elts) == 1:
                yield "unpack", len(names) - len(up.elts) + 1
                return
            yield from self._of(up) if len(up.elts) == 1 else ["tensor"]
        elif isinstance(up, ast.Tuple | ast.List) and len(up.elts) == 1:
            yield from self._of(up)
        else:
            yield "tensor"

    def _spread(self, call, starred):
        """How many parameters of a function of this file are left for `*f(...)`."""
        function, first = self._callee(call)
        if function is None or function.args.vararg or _stars(call.args) > 1:
            return "tensor"
        parameters = [*function.args.posonlyargs, *function.args.args][first:]
        named = {keyword.arg for keyword in call.keywords}
        left = [p for p in parameters if p.arg not in named]
        optional = len(function.args.defaults) - sum(p.arg in named for p in parameters[-len(function.args.defaults) :])
        return "tensor" if function.args.defaults and optional else ("unpack", len(left) - len(call.args) + 1)

    def _passed(self, call, argument):
        """The result is an argument of another call."""
        name = dotted(call.func).rpartition(".")[2]
        if name in _ASK:
            yield "both" if name != "len" else "nothing"
        elif name in _SHOW:
            yield "nothing"
        elif name in _PASS_ON and len(call.args) == 1 and isinstance(call.func, ast.Name):
            yield from self._of(call)
        elif name == "iter" and isinstance(self.source.parent[call], ast.Call):
            up: Any = self.source.parent[call]
            yield ("index", 0) if dotted(up.func) == "next" else "tensor"
        elif isinstance(call.func, ast.Call) and dotted(call.func.func).endswith("itemgetter"):
            number = call.func.args[0] if len(call.func.args) == 1 else None
            yield ("index", number.value) if isinstance(number, ast.Constant) else "tensor"
        else:
            yield from self._received(call, argument)

    def _received(self, call, argument):
        """What a function of this file does with the parameter that gets the result."""
        function, first = self._callee(call)
        parameters = [] if function is None else [*function.args.posonlyargs, *function.args.args]
        if isinstance(argument, ast.keyword):
            found = [p.arg for p in parameters if p.arg == argument.arg]
        elif _stars(call.args):
            found = []
        else:
            found = [p.arg for p in parameters[first + call.args.index(argument) :][:1]]
        if not found:
            yield "tensor"
            return
        for use in self._reads(found[0], function, None):
            if use == "returned":  # a helper that hands it on
                yield from self._of(call)
            else:
                yield use

    def _callee(self, call):
        """The one function of this file with the called name, and how many parameters Python fills by itself."""
        name = dotted(call.func).rpartition(".")[2]
        found: list[Any] = list(self.source.functions(name))
        for node in self.source.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                found += [node.value for target in node.targets if dotted(target).rpartition(".")[2] == name]
        if len(found) != 1 or not name:
            return None, 0
        function = found[0]
        decorators = [dotted(x) for x in getattr(function, "decorator_list", [])]
        method = isinstance(self.source.parent.get(function), ast.ClassDef) and "staticmethod" not in decorators
        return function, int(method and isinstance(call.func, ast.Attribute))

    def _named(self, target, statement):
        """The uses of a name from a statement on."""
        yield from self._reads(target.id, self.source.scope(statement), statement)

    def _reads(self, name, scope, statement):
        """The uses of a name in a scope, as far as an assignment to it reaches (None: from the beginning)."""
        if (statement or scope, name) in self._seen:
            return
        self._seen.add((statement or scope, name))
        end = (0, 0) if statement is None else _end(statement)
        last, unreachable = self._reach(name, scope, statement)
        loops = [up for up in self.source.above(statement or scope) if isinstance(up, ast.For | ast.While)]
        uses: list[Use] = []
        for node in ast.walk(scope):
            if not isinstance(node, ast.Name) or node.id != name or not isinstance(node.ctx, ast.Load):
                continue
            inside = set(self.source.above(node))
            around = statement is not None and any(loop in inside for loop in loops)
            if statement in inside and not isinstance(statement, ast.NamedExpr):
                continue  # on the right of the assignment itself
            if (around or end <= _start(node) <= last) and not inside & unreachable:
                uses += self._of(node)
        yield from uses or ["tensor"]

    def _reach(self, name, scope, statement):
        """Where the name is certainly bound anew, and the branches that exclude the statement's own."""
        last = 1 << 60, 0
        unreachable: set[ast.AST] = set()
        if statement is None:
            body = scope.body if isinstance(scope.body, list) else []
            return min([last, *(_end(later) for later in body if _binds(later, name))]), unreachable
        inner = statement
        for up in self.source.above(statement):
            blocks = [value for _, value in ast.iter_fields(up) if isinstance(value, list) and inner in value]
            if blocks:
                rest = blocks[0][blocks[0].index(inner) + 1 :]
                last = min([last, *(_end(later) for later in rest if _binds(later, name))])
                unreachable |= _excluded(up, inner)
            if up is scope:
                break
            inner = up
        return last, unreachable


def _excluded(node, inner):
    """What does not run after `inner`, a part of `node`, because it is another branch."""
    if isinstance(node, ast.If):
        return set(node.orelse if inner in node.body else node.body)
    if isinstance(node, ast.Try):
        others = [] if inner in node.finalbody or inner in node.orelse else [x for x in node.handlers if x is not inner]
        return {*others, *(node.orelse if inner in node.handlers else ())}
    if isinstance(node, ast.Match):
        return {case for case in node.cases if case is not inner}
    return set()


def _stars(expressions):
    return sum(isinstance(x, ast.Starred) for x in expressions)


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


def _binds(statement, name):
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) and statement.value else targets
    return any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
        for target in targets
        for n in ast.walk(target)
    )


def _start(node):
    return node.lineno, node.col_offset


def _end(node):
    return node.end_lineno, node.end_col_offset
