"""Tables of reports, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""The lines of a table with the column names ``head``; a ``|`` in a cell is escaped.

    >>> print(markdown_table(("solver", "NFE"), [("ddim", "5"), ("a | b", "8")]))
    | solver | NFE |
    |---|---|
    | ddim | 5 |
    | a \| b | 8 |
    """

    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])
