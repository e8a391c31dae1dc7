"""Source lines of an instrumented kernel's calls into the runtime.

The runtime knows a place in the kernel by a return address. The table from addresses to lines is made in the assembly,
behind every such call, from the compiler's .loc directives: it needs no debugger and no reader of debug information.
"""

from __future__ import annotations

import ctypes
import re
from bisect import bisect_left, bisect_right
from functools import partial

_CALL = re.compile(r"\s+(?:callq|bl)\s+_?(?:__tsan_|__mh_|__ubsan_)\w+")
_LOC = re.compile(r"\s+\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\s+\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"')


def mark(assembly: str) -> tuple[str, dict]:
    """Label the return address of every call into the runtime and append the table; also its file names."""
    apple = "__DATA,mh_tg" in assembly or ".section\t__TEXT" in assembly
    local, symbol = ("L", "___mh_site_table") if apple else (".L", "__mh_site_table")
    files: dict[str, str] = {}
    entries: list[tuple[str, str]] = []
    location = ("0", "0")
    out = []
    lines: list[tuple[str, str]] = []  # where the code of a line begins
    for line in assembly.split("\n"):
        out.append(line)
        if match := _LOC.match(line):
            if (match[1], match[2]) != location:
                out.append(f"{local}mh_line_{len(lines)}:")
                lines.append((match[1], match[2]))
            location = (match[1], match[2])
        elif match := _FILE.match(line):
            files[match[1]] = f"{match[2]}/{match[3]}" if match[2] and not match[2].startswith("/") else match[3]
        elif _CALL.match(line):
            out.append(f"{local}mh_site_{len(entries)}:")
            entries.append(location)
    section = "__DATA,__const" if apple else 'mh_sites,"a",@progbits'
    out += [f"\t.section\t{section}", "\t.p2align\t2"]
    for table, kind, rows in ((symbol, "site", entries), (symbol.replace("site", "line"), "line", lines)):
        out += [f"\t.globl\t{table}", f"{table}:"]
        for number, (file, line) in enumerate(rows):
            row = f"{local}mh_{kind}_row_{number}"
            out += [f"{row}:", f"\t.long\t{local}mh_{kind}_{number}-{row}", f"\t.long\t{file}", f"\t.long\t{line}"]
    return "\n".join(out) + "\n", {"files": files, "count": len(entries), "lines": len(lines)}


class Sites:
    """Return address -> (file, line)."""

    def __init__(self, library: ctypes.CDLL, found: dict):
        self._files: dict[str, str] = found["files"]
        table = _rows(library, "__mh_site_table", found["count"])
        self._addresses = [row[0] for row in table]
        self._places = [(row[1], row[2]) for row in table]
        self.addresses = (ctypes.c_uint64 * len(table))(*self._addresses)
        self.lines = (ctypes.c_uint32 * len(table))(*(file << 24 | line for file, line in self._places))
        self._code = partial(_rows, library, "__mh_line_table", found["lines"])  # for a crash only

    def line(self, address: int) -> tuple[str, int]:
        """The place of any address in the code, not only of a call."""
        rows = self._code()
        at = bisect_right(rows, address, key=lambda row: row[0]) - 1
        return (self._files.get(str(rows[at][1]), "unknown file"), rows[at][2]) if at >= 0 else ("unknown place", 0)

    def place(self, address: int) -> tuple[str, int]:
        at = bisect_left(self._addresses, address)
        if at == len(self._addresses) or self._addresses[at] != address:
            return "unknown place", 0
        file, line = self._places[at]
        return self._files.get(str(file), "unknown file"), line


def _rows(library: ctypes.CDLL, table: str, count: int) -> list[tuple[int, int, int]]:
    """(address, file, line), by address."""
    rows = (ctypes.c_int32 * (3 * count)).in_dll(library, table)
    base = ctypes.addressof(rows)
    return sorted((base + 12 * i + rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]) for i in range(count))
