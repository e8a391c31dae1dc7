"""The host side of the kernels has layers: no module imports another that imports it, inside a function or not."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from flash_attn_mps.tiers import metal

HERE = Path(metal.__file__).parent


def imported(file):
    """The modules of the package that `file` imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_no_module_is_its_own_foundation():
    graph = {file.stem: imported(file) for file in HERE.glob("*.py") if file.stem != "__init__"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(graph)
    assert order.index("kernel") < order.index("launch") < order.index("tune") < order.index("simdgroup")
