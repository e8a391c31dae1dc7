"""The imports of flash_attn_mps, deferred ones too: no cycle, and each arrow points down. Files stay readable."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flash_attn_mps"

# From the top down: a module imports from its own layer and from those below it. docs/architecture.md says so too.
LAYERS = [
    {"__init__", "tools", "integrations", "mha"},
    {"frontends.heads_first", "frontends.fa2", "frontends.fa3", "frontends"},
    {"sdpa"},
    {"frontends.kvcache"},
    {"graph.kvcache_op"},
    {
        "frontends.cache_plan",
        "frontends.cache_append",
        "frontends.cache_codes",
        "frontends.cache_repeat",
        "frontends.cache_call",
        "frontends.rotary",
    },
    {"dispatch"},
    {"graph"},
    {"tiers"},
    {"trace", "timing", "describe", "project"},
    {"problem", "lengths"},
    {"capture", "checks", "philox", "quantised", "text_table"},
]


def imports() -> dict[str, set[str]]:
    """module -> modules of the package that it imports, anywhere in its file; names relative to the package."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = name.split(".")[: len(name.split(".")) - node.level] + (
                node.module.split(".") if node.module else []
            )
            for alias in node.names:
                for candidate in ([*base, alias.name], [*base, alias.name, "__init__"], base, [*base, "__init__"]):
                    if (target := ".".join(candidate)) in names:
                        found.add(target)
                        break
        graph[name] = found - {name}
    return graph


def layer_of(module: str) -> int:
    """By its own name, or that of the longest package in it that has a layer."""
    parts = module.removesuffix(".__init__").split(".")
    for count in range(len(parts), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(parts[:count]) in layer:
                return number
    raise AssertionError(f"{module} is in no layer: give it one in {Path(__file__).name}")


def test_no_module_imports_itself_by_way_of_others():
    graph = imports()
    assert {"tiers.__init__", "graph.autograd", "problem"} <= graph["dispatch"]  # imports are read at all
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_each_import_points_down():
    wrong = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if layer_of(target) < layer_of(module)
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["flash_attn_mps", "flash_attn_shim"])
def test_no_file_is_long(package):
    """Presented modules have upstream's shape, and its length."""
    files = [path for path in (ROOT / package).rglob("*.py") if "presents" not in path.parts]
    files += (ROOT / package).rglob("*.metal")
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 350]
