"""Which kernels of a folder of Metal sources compile here.

    python -m metal_host.survey MLX=path/to/mlx candle=path/to/candle

Fetches nothing. Of every kernel function the first and the last instance that the sources themselves make are compiled,
with function constants left without a value, to machine code; with --all the compiler's front end also checks every other
instance. A header is looked for beside the source, in every
folder above it and in a folder "include" of each.
"""

from __future__ import annotations

import argparse
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


def survey_file(path: Path, root: Path, version: str, every: bool = False) -> FileReport:
    """Compile the kernels of one file below `root`."""
    report = FileReport(str(path.relative_to(root)))
    folders = [p for p in path.parents if p == root or root in p.parents]
    include = [*folders, *(p / "include" for p in folders)]
    try:
        unit = library.front_end(path.read_text(encoding="utf-8"), {}, version, include)
    except (SyntaxError, RecursionError) as error:
        for name in _textual_kernels(path, include, version):
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


def _textual_kernels(path: Path, include: list[Path], version: str) -> list[str]:
    """The kernels of a source that the front end refuses, its own headers' too."""
    try:
        text = source.preprocess(source.expand(path.read_text(encoding="utf-8"), []), version, include)
    except SyntaxError:
        text = _with_headers(path, include, set())
    return list(dict.fromkeys(_KERNEL.findall(text)))


def _with_headers(path: Path, include: list[Path], seen: set[Path]) -> str:
    text = path.read_text(encoding="utf-8")
    for name in _INCLUDE.findall(text):
        found = next((d / name for d in [path.parent, *include] if (d / name).is_file()), None)
        if found and found.resolve() not in seen:
            seen.add(found.resolve())
            text += _with_headers(found, include, seen)
    return text


def _first_error(error: BaseException) -> str:
    match = _ERROR.search(str(error).split("Failed to create metal library, error:")[-1])
    return (match[1] if match else str(error).strip().split("\n")[-1])[:160] or type(error).__name__


def survey(root: Path, version: str, pattern: str, workers: int, every: bool) -> list[FileReport]:
    files = sorted(root.rglob(pattern))
    with ProcessPoolExecutor(workers) as pool:
        reports = pool.map(partial(survey_file, root=root, version=version, every=every), files)
        return [report for report in reports if report.functions]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metal_host.survey", description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--version", default="4.0", choices=versions.VERSIONS)
    parser.add_argument("--pattern", default="*.metal", help="which files are sources")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="check every instance")
    parser.add_argument("--files", action="store_true", help="a row for each file, and the errors")
    arguments = parser.parse_args()
    checked = " instances checked |" if arguments.all else ""
    print(f"| sources | files | instances |{checked} kernel functions | compile |")
    print(f"| --- | --- | --- |{' --- |' if checked else ''} --- | --- |")
    for item in arguments.sources:
        name, _, folder = item.partition("=")
        root = Path(folder or name).resolve()
        reports = survey(root, arguments.version, arguments.pattern, arguments.workers, arguments.all)
        total, good = sum(len(r.functions) for r in reports), sum(r.compiled for r in reports)
        share = f"{good} ({100 * good // total} %)" if total else "0"
        found = f" {sum(r.checked for r in reports)} |" if checked else ""
        print(
            f"| {name} | {len(reports)} | {sum(r.instances for r in reports)} |{found} {total} | {share} |", flush=True
        )
        if arguments.files:
            for r in reports:
                found = f" {r.checked} |" if checked else ""
                print(f"| {r.path} | | {r.instances} |{found} {len(r.functions)} | {r.compiled} |")
            reasons = Counter(e for r in reports for e in r.functions.values() if e)
            for reason, count in reasons.most_common():
                print(f"    {count:4} {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
