"""Write stubs/: what type checkers read for `flash_attn` and `flash_attn_interface`, which they cannot find otherwise.

    python stubs/make.py

An import hook means nothing to a type checker. The wheel therefore puts two stub-only packages (PEP 561) at the root of
site-packages; Python itself never imports a folder of such a name. Each stub only imports the names of one presented
module from where they are defined, so that it stays true when a function changes, and has to be written anew only when
a name or a module comes or goes. tests/shim/test_types.py compares.
"""

import ast
from pathlib import Path

STUBS = Path(__file__).resolve().parent
PRESENTS = STUBS.parent / "flash_attn_shim" / "presents"

#: A module that hands out names by `__getattr__` -> the module that it takes them from.
LAZY = {"flash_attn": "flash_attn.flash_attn_interface"}


def files() -> dict[str, str]:
    """`{path below stubs/: content}`."""
    found = {}
    for source in sorted(PRESENTS.rglob("*.py")):
        inside = source.relative_to(PRESENTS)
        package = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        below = inside.relative_to(package) if len(inside.parts) > 1 else Path("__init__.py")
        found[(Path(f"{package}-stubs") / below).with_suffix(".pyi").as_posix()] = stub(inside, source.read_text())
        # "partial": what is not here is looked for in a real installation.
        found[f"{package}-stubs/py.typed"] = "partial\n"
    return found


def stub(inside: Path, source: str) -> str:
    """The stub of the module at `inside` below presents/."""
    parts = inside.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    here, imports, exported = [], [], []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            here.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            if names == ["__all__"]:
                exported = ast.literal_eval(node.value)
            here += [n for n in names if n != "__all__"]
        elif isinstance(node, ast.ImportFrom):
            imports += [(node.module, alias.name, alias.asname or alias.name) for alias in node.names]
    here = [n for n in here if n == "__version__" or not n.startswith("__")]
    bound = {*here, *(asname for *_, asname in imports)}
    ours = ("flash_attn", "flash_attn_mps")
    imports = [one for one in imports if one[0].partition(".")[0] in ours or one[2] in exported]
    imports += [(LAZY[name], n, n) for n in exported if n not in bound]
    imports += [(f"flash_attn_shim.presents.{name}", n, n) for n in here]
    lines = [f"from {module} import {n} as {asname}\n" for module, n, asname in sorted({*imports})]
    if name in LAZY:
        lines.insert(0, f"from {name} import {LAZY[name].rpartition('.')[2]} as {LAZY[name].rpartition('.')[2]}\n")
    return "".join(["# Written by stubs/make.py.\n", *lines])


if __name__ == "__main__":
    written = files()
    for old in STUBS.rglob("*.pyi"):
        old.unlink()
    for path, content in written.items():
        (STUBS / path).parent.mkdir(parents=True, exist_ok=True)
        (STUBS / path).write_text(content)
