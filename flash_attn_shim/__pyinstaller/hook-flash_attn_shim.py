"""The presented modules, which are found by their path, and what they and the shim import only when it is needed."""

import ast

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

datas = collect_data_files("flash_attn_shim", include_py_files=True, subdir="presents")


def _is_run(name):
    return not name.startswith(("flash_attn_shim.presents", "flash_attn_shim.__pyinstaller"))


def _imports(path):
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


_imported = {name for path, _ in datas if path.endswith(".py") for name in _imports(path)}
hiddenimports = [
    *collect_submodules("flash_attn_shim", filter=_is_run),
    *collect_submodules("flash_attn_mps"),
    *sorted(name for name in _imported if name.partition(".")[0] not in ("flash_attn", "flash_attn_interface")),
]
