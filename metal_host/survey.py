"""Which kernels of a folder of Metal sources compile here.

    python -m metal_host.survey MLX=path/to/mlx candle=path/to/candle

Fetches nothing. Of every kernel function the first and the last instance that the sources themselves make are compiled,
with function constants left without a value, to machine code; with --all the compiler's front end also checks every other
instance. A header is looked for beside the source, in every folder above it and in a folder "include" of each. Sources are
files "*.metal" and strings of Python files that hold a kernel, which is how torch.mps.compile_shader is used. With --into the
table replaces what a Markdown page has between <!-- survey --> and <!-- end -->.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import cpu, library, source, toolchain, versions
from .frontend import Unit

_KERNEL = re.compile(r"(?:\bkernel\b|\[\[\s*kernel\b[^\]]*\]\])(?:\s*\[\[[^\]]*\]\])?\s*\bvoid\s+(\w+)\s*\(")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_ERROR = re.compile(r"error: (.*)")


@dataclass
class FileReport:
    """What became of one source. functions: name -> the error, or "" if it compiles."""

    path: str
    instances: int = 0
    checked: int = 0  # of them; with --all
    functions: dict[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> int:
        return sum(not error for error in self.functions.values())


def sources(root: Path) -> list[tuple[Path, int, str]]:
    """File, line and text of every source below `root`."""
    found = [(path, 0, path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.metal"))]
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "metal_stdlib" in text and _KERNEL.search(text):
            found += [(path, line, source) for line, source in _strings(text)]
    return found


def _strings(text: str) -> list[tuple[int, str]]:
    """Line and value of the strings of a Python file that are whole Metal sources."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []
    strings = [(n.lineno, n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [(line, value) for line, value in strings if "#include" in value and _KERNEL.search(value)]


def survey_source(item: tuple[Path, int, str], root: Path, version: str, every: bool = False) -> FileReport:
    """Compile the kernels of one source below `root`."""
    path, line, text = item
    report = FileReport(str(path.relative_to(root)) + (f":{line}" if line else ""))
    folders = [p for p in path.parents if p == root or root in p.parents]
    include = [*folders, *(p / "include" for p in folders)]
    try:
        unit = library.front_end(text, {}, version, include)
    except (SyntaxError, RecursionError) as error:
        for name in _textual_kernels(path, text, include, version):
            report.functions[name] = _first_error(error)
        return report
    report.instances = len(unit.kernels.instances)
    by_function: dict[str, list[str]] = {}
    for host_name, instance in unit.kernels.instances.items():
        by_function.setdefault(instance.kernel.name, []).append(host_name)
    picks = {name: list(dict.fromkeys((names[0], names[-1]))) for name, names in by_function.items()}
    for name, error in _compile(unit, picks):
        report.functions[name] = error
    if every:
        report.checked = _check(unit, list(unit.kernels.instances))
    return report


def _check(unit: Unit, names: list[str]) -> int:
    """How many instances the compiler's front end takes."""
    flags = [*toolchain.LANGUAGE, *versions.flags(unit.version), *toolchain.target(), "-fsyntax-only"]
    try:
        unit.compile(flags, unit.render({name: f"__mh_entry_{i}" for i, name in enumerate(names)}))
        return len(names)
    except (SyntaxError, RuntimeError):
        half = len(names) // 2
        return _check(unit, names[:half]) + _check(unit, names[half:]) if half else 0


def _compile(unit: Unit, picks: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """All at once; where that fails in halves, so that each failure is found."""
    try:
        cpu.compile_unit(unit, [host_name for names in picks.values() for host_name in names], instrumented=False)
        yield from ((name, "") for name in picks)
    except (SyntaxError, RuntimeError, OSError) as error:
        if len(picks) == 1:
            yield next(iter(picks)), _first_error(error)
            return
        items = list(picks.items())
        half = len(items) // 2
        yield from _compile(unit, dict(items[:half]))
        yield from _compile(unit, dict(items[half:]))


def _textual_kernels(path: Path, text: str, include: list[Path], version: str) -> list[str]:
    """The kernels of a source that the front end refuses, its own headers' too."""
    try:
        text = source.preprocess(source.expand(text, []), version, include)
    except SyntaxError:
        text = _with_headers(path, text, include, set())
    return list(dict.fromkeys(_KERNEL.findall(text)))


def _with_headers(path: Path, text: str, include: list[Path], seen: set[Path]) -> str:
    for name in _INCLUDE.findall(text):
        found = next((d / name for d in [path.parent, *include] if (d / name).is_file()), None)
        if found and found.resolve() not in seen:
            seen.add(found.resolve())
            text += _with_headers(found, found.read_text(encoding="utf-8"), include, seen)
    return text


def _first_error(error: BaseException) -> str:
    match = _ERROR.search(str(error).split("Failed to create metal library, error:")[-1])
    return (match[1] if match else str(error).strip().split("\n")[-1])[:160] or type(error).__name__


def survey(root: Path, version: str, workers: int, every: bool) -> list[FileReport]:
    with ProcessPoolExecutor(workers) as pool:
        reports = pool.map(partial(survey_source, root=root, version=version, every=every), sources(root))
        return [report for report in reports if report.functions]


def rows(name: str, reports: list[FileReport], every: bool, files: bool) -> Iterator[str]:
    """Of the table: one for the whole, and one a source."""
    functions = [f for r in reports for f in r.functions.items()]
    good = sum(r.compiled for r in reports)
    reasons = Counter(f"`{f'{error[:70]}...' if len(error) > 70 else error}`" for _, error in functions if error)
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    share = f"{good} ({100 * good // len(functions)} %)" if functions else "0"
    checked = [f"{sum(r.checked for r in reports)}"] if every else []
    instances = str(sum(r.instances for r in reports))
    yield _row(name, str(len(reports)), instances, *checked, str(len(functions)), share, why)
    for r in reports if files else []:
        yield _row(
            r.path, "", str(r.instances), *checked and [str(r.checked)], str(len(r.functions)), str(r.compiled), ""
        )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metal_host.survey", description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--version", default="4.0", choices=versions.VERSIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="check every instance")
    parser.add_argument("--files", action="store_true", help="a row for each source")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the table into a Markdown page")
    arguments = parser.parse_args()
    titles = ["sources", "files", "instances", *(["checked"] if arguments.all else [])]
    titles += ["kernel functions", "compile", "what does not, first errors"]
    table = [_row(*titles), _row(*("---" for _ in titles))]
    print("\n".join(table))
    for item in arguments.sources:
        name, _, folder = item.partition("=")
        reports = survey(Path(folder or name).resolve(), arguments.version, arguments.workers, arguments.all)
        new = list(rows(name, reports, arguments.all, arguments.files))
        print("\n".join(new), flush=True)
        table += new
    if arguments.into:
        replace(arguments.into, "survey", table)


def replace(page: Path, name: str, lines: list[str]) -> None:
    """Put `lines` between <!-- name --> and <!-- end --> of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{page} has no <!-- {name} --> ... <!-- end -->")
    page.write_text(pattern.sub(lambda m: m[1] + "\n".join(["", *lines, "", ""]) + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
