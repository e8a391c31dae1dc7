"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[object]], right: bool = False) -> str:
    """Columns two spaces apart, all to the left, or with `right` all but the first to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    def pad(cell: str, column: int) -> str:
        return cell.rjust(widths[column]) if right and column else cell.ljust(widths[column])

    return "\n".join("  ".join(pad(cell, column) for column, cell in enumerate(row)).rstrip() for row in cells)
