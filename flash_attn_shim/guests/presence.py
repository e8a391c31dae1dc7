"""Programs that work on a Mac because flash_attn is missing, by what their code does with it.

Such a module does not see us: its import of flash_attn fails, as on a Mac without this project, and it takes its other
path. That can cost speed, never a number. The traits:

* Its flash path asks for CUDA before it calls flash attention: `assert q.is_cuda`, `if q.device.type != "cuda": raise`,
  `.cuda()` (Wan's attention and its copies).
* It asks for CUDA while it is imported (`is_sm80 = torch.cuda.get_device_capability("cuda") == (8, 0)`), or imports a
  module of its package that does so, once it has found flash_attn.
* It calls private functions of FlashAttention 3 by position, which differ from build to build.

A module that imports flash_attn at its top without a way to go on has no other path, and keeps what it asks for; except
where it asks for CUDA itself: then it cannot be imported anyway, and ImportError is what its importer expects.
"""

from __future__ import annotations

import ast
import os
import re

from flash_attn_shim.autoload import PRESENTED
from flash_attn_shim.guests import cuda
from flash_attn_shim.guests.source import Source, dotted, lines_of, read

FA2, FA3 = PRESENTED

#: FlashAttention 1's names (`fa1.py`).
OF_VERSION_1 = ("flash_attn_unpadded_func", "flash_attn_unpadded_kvpacked_func", "flash_attn_unpadded_qkvpacked_func")

# What the text of such a module contains; others are not parsed, since that takes a tenth of a second for a long one.
_FLASH = re.compile(
    r"\s*(?:(?:from|import)\s+flash_attn(?:_interface)?\b|(?:async\s+)?def\s+_?flash\w*\((?:self,\s*)?q)"
)
_DEMAND = re.compile(
    r"\b(?:assert|if|elif)\b.*cuda|\bis_cuda\b|\.cuda\(|\bcuda\.(?:current|get|mem|set|sync)\w+\("
    r"|\bdevice\s*=\s*.?cuda|\.to\(\s*.cuda|_flash_attn_\w*(?:forward|backward)\("
)
_BESIDE = re.compile(r"\s+(?:from|import)\s+([\w.]+)")
_PRIVATE = re.compile(r"_flash_attn_(?:varlen_)?(?:forward|backward)")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def reasons(name: str, file: str, namespace: dict[str, object]) -> dict[str, str]:
    """Presented name -> why the module does not see it; empty if it sees both.

    `name`, `file`, `namespace`: the module's `__name__`, the file of its code, and its globals.
    """
    lines = lines_of(file, namespace)
    is_flash = any(map(_FLASH.match, lines))
    demands = any(_DEMAND.search(line) for line in lines if is_flash or not line[0].isspace())
    asking_beside = _asking_beside(name, file, lines)
    source = read(file, namespace) if demands or asking_beside else None
    return {} if source is None else Module(source).reasons(asking_beside)


class Module:
    """A module that asks for flash_attn."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.imports = [node for node in source.nodes if _is_ours(node)]
        self.taken = self._taken()
        self.functions = [node for node in source.nodes if isinstance(node, _FUNCTIONS)]
        self.probes: set[str] = set()
        self.probes = {f.name for f in self.functions if any(map(self._asks, ast.walk(f)))}
        self.flags = {name for statement in self.asking_statements() for name in bound(statement)}

    def reasons(self, asking_beside: dict[str, str]) -> dict[str, str]:
        """`asking_beside`: modules of its own package, as it imports them, that ask for CUDA -> their files."""
        if line := cuda.asked_at_import(self.source):
            return dict.fromkeys(PRESENTED, f"line {line} asks for CUDA while the module is imported")
        if any(self._is_at_top(node) and not self._is_optional(node) for node in self.imports):
            return {}
        if line := self._flash_path_asks():
            return dict.fromkeys(PRESENTED, f"line {line} asks for CUDA before it calls flash attention")
        if asking := self._imports_what_asks(asking_beside):
            return dict.fromkeys(PRESENTED, f"once it has found flash_attn it imports {asking}, which asks for CUDA")
        line = self._calls_private_by_position()
        return {FA3: f"line {line} calls a private function of an early build by position"} if line else {}

    def _taken(self):
        """The names under which it has our modules and functions, `self.attend = flash_attn_func` too."""
        taken = {(a.asname or a.name).partition(".")[0] for n in self.imports for a in n.names}  # type: ignore[attr-defined]
        for node in self.source.nodes:
            if isinstance(node, ast.Assign):
                value = node.value.args[0] if isinstance(node.value, ast.Call) and node.value.args else node.value
                if dotted(value).partition(".")[0] in taken and (value is node.value or "partial" in ast.dump(node)):
                    taken |= {dotted(target) for target in node.targets} - {""}
        return taken

    # --- does it have another way? -----------------------------------------------------------------------------------

    def _is_at_top(self, node):
        return self.source.scope(node) is self.source.tree

    def _is_optional(self, node):
        """Is the import inside `try`, or behind a question of the module whether flash_attn is there?"""
        return self.source.is_guarded(node) or self._is_behind_probe(node)

    def _is_behind_probe(self, node):
        tests = [up.test for up in self.source.above(node) if isinstance(up, ast.If)]
        inside = [n for test in tests for n in ast.walk(test)]
        return any(self._asks(n) or (isinstance(n, ast.Name) and n.id in self.flags) for n in inside)

    def _asks(self, node):
        """An import in `try`, `find_spec("flash_attn")`, or a function of the module that does either."""
        if _is_ours(node):
            return self.source.is_guarded(node)
        if not isinstance(node, ast.Call):
            return False
        texts = [str(x.value).replace("-", "_") for x in node.args if isinstance(x, ast.Constant)]
        return dotted(node.func) in self.probes or any(text.partition(".")[0] in PRESENTED for text in texts)

    def asking_statements(self) -> list[ast.stmt]:
        """The statements at the module's top that ask whether flash_attn is there, and those that go by the answer."""
        found, names = [], set[str]()
        for statement in self.source.tree.body:
            if not isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
                nodes = list(ast.walk(statement))
                goes_by = isinstance(statement, ast.If | ast.Assign | ast.AnnAssign) and any(
                    isinstance(n, ast.Name) and n.id in names for n in nodes
                )
                if goes_by or any(map(self._asks, nodes)):
                    found.append(statement)
                    names |= bound(statement)
        return found

    # --- does its flash path ask for CUDA? ---------------------------------------------------------------------------

    def _flash_path_asks(self):
        """The line that asks for CUDA on the way to a call of flash attention; None if none does."""
        asking = {f.name: line for f in self.functions if (line := cuda.demanded_first(self.source, f.body))}
        for node in self.source.nodes:
            if isinstance(node, ast.Call) and self._is_flash(node) and (line := self._demand_before(node, asking)):
                return line
        return next((asking[f.name] for f in self.functions if "flash" in f.name and f.name in asking), None)

    def _is_flash(self, call):
        name = dotted(call.func)
        return name in self.taken or name.partition(".")[0] in self.taken or "flash_att" in name

    def _demand_before(self, call, asking):
        """The line of a demand that certainly comes before a call: in a block around it, a helper, or a decorator."""
        if any(map(cuda.needs_device, call.args)):
            return call.lineno
        inside = call
        for up in self.source.above(call):
            for _, block in ast.iter_fields(up):
                if isinstance(block, list) and inside in block:
                    before = block[: block.index(inside)]
                    if line := cuda.demanded_first(self.source, before) or _helper_demands(before, asking):
                        return line
            if isinstance(up, _FUNCTIONS) and (line := self._decorator_demands(up)):
                return line
            inside = up
        return None

    def _decorator_demands(self, function):
        for decorator in function.decorator_list:
            made_by = decorator.func if isinstance(decorator, ast.Call) else decorator
            for maker in self.source.functions(dotted(made_by).rpartition(".")[2]):
                for inner in ast.walk(maker):
                    line = isinstance(inner, _FUNCTIONS) and cuda.demanded_first(self.source, inner.body)
                    if line:
                        return line
        return None

    # --- what it imports, what it calls ------------------------------------------------------------------------------

    def _imports_what_asks(self, asking_beside):
        """The file of its package that it imports once flash_attn is found, and that asks for CUDA."""
        for node in (n for n in self.source.nodes if isinstance(n, ast.ImportFrom)):
            file = asking_beside.get("." * node.level + (node.module or ""))
            if file is not None and self._follows_ours(node):
                return file
        return None

    def _follows_ours(self, node):
        """Does it run only if flash_attn was found?"""
        tries = [up for up in self.source.above(node) if isinstance(up, ast.Try)]
        return self._is_behind_probe(node) or any(
            _is_ours(n) and n.lineno < node.lineno  # type: ignore[attr-defined]
            for up in tries
            for s in up.body
            for n in ast.walk(s)
        )

    def _calls_private_by_position(self):
        of_three = [n for n in self.imports if isinstance(n, ast.ImportFrom) and n.module == FA3]
        names = {a.asname or a.name for n in of_three for a in n.names if _PRIVATE.fullmatch(a.name)}
        calls = (n for n in self.source.nodes if isinstance(n, ast.Call))
        return next((n.lineno for n in calls if dotted(n.func) in names and len(n.args) > 3), None)


def bound(statement: ast.AST) -> set[str]:
    """The names that a statement binds in its own scope."""
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Name):
        return {statement.id} if isinstance(statement.ctx, ast.Store) else set()
    return {name for part in ast.iter_child_nodes(statement) for name in bound(part)}


def _is_ours(node):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module or ""]
    return any(name.partition(".")[0] in PRESENTED for name in names)


def _helper_demands(statements, asking):
    """`_check_cuda(q)`: a function of the module that demands CUDA is called."""
    for statement in statements:
        if isinstance(statement, ast.Expr | ast.Assign) and isinstance(statement.value, ast.Call):
            line = asking.get(dotted(statement.value.func).rpartition(".")[2])
            if line:
                return line
    return None


def _asking_beside(name, file, lines):
    """The modules of its own package that a module imports inside a statement, and that ask for CUDA -> their files."""
    directory = os.path.dirname(os.path.abspath(file))
    top = directory
    for _ in range(name.count(".") - (not os.path.basename(file).startswith("__init__."))):
        top = os.path.dirname(top)
    found = {}
    for module in {match[1] for match in map(_BESIDE.match, lines) if match}:
        level = len(module) - len(module.lstrip("."))
        parts = module.lstrip(".").split(".")
        if level:
            path = os.path.join(directory, *[os.pardir] * (level - 1), *parts) + ".py"
        elif parts[0] == name.partition(".")[0] != name:
            path = os.path.join(top, *parts[1:]) + ".py"
        else:
            continue
        text = lines_of(path) if os.path.isfile(path) else []
        source = read(path) if any(_DEMAND.search(line) for line in text if not line[0].isspace()) else None
        if source is not None and cuda.asked_at_import(source):
            found[module] = os.path.basename(path)
    return found
