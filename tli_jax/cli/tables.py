"""Tables that fit the terminal without truncating a cell."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import rich.box
import rich.cells
import rich.console
import rich.table
import rich.text

from tli_jax.cli.console import printable


def show_number(value: float | None, spec: str = ".4f") -> str:
    """Format a number. None (not measured, or not finite) becomes a dash."""
    return "–" if value is None else format(value, spec)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a ``Table``.

    Args:
        priority: 0 keeps the column on any terminal. A narrow terminal drops the highest priorities first.
    """

    heading: str
    justify: Literal["left", "right"] = "left"
    priority: int = 0


def make_columns(text: Mapping[str, int], numbers: Mapping[str, int]) -> list[Column]:
    """Columns from their headings and priorities: text to the left, then numbers to the right."""
    left = [Column(heading, "left", priority) for heading, priority in text.items()]
    return left + [Column(heading, "right", priority) for heading, priority in numbers.items()]


@dataclasses.dataclass
class Table:
    """Columns and rows of text.

    ``render`` prints the complete table if it fits, or if the output is not a terminal. On a narrower terminal it wraps
    headings, then drops columns by priority and names them below the table, and finally stacks each row as a list of
    ``heading: value`` lines. The environment variable ``COLUMNS`` overrides the width of the terminal.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def render(self, console: rich.console.Console) -> None:
        if self.title:
            console.print(rich.text.Text(printable(self.title), "bold"), soft_wrap=True)
        limit = _width_limit(console)
        shown = list(range(len(self.columns)))
        if limit is None or self._width(shown, wrap_headings=False) <= limit:
            self._print(console, shown, wrap_headings=False)
            return
        while self._width(shown, wrap_headings=True) > limit:
            last = max(reversed(shown), key=lambda i: self.columns[i].priority)
            if self.columns[last].priority == 0:
                self._print_stacked(console)
                return
            shown.remove(last)
        self._print(console, shown, wrap_headings=True)
        if dropped := [column.heading for i, column in enumerate(self.columns) if i not in shown]:
            console.print(f"(no room for: {', '.join(dropped)})\n", soft_wrap=True)

    def _cell_width(self, i: int, wrap_headings: bool) -> int:
        heading = self.columns[i].heading
        parts = heading.split() if wrap_headings else [heading]
        return max(rich.cells.cell_len(printable(text)) for text in ("", *parts, *(row[i] for row in self.rows)))

    def _width(self, shown: Sequence[int], wrap_headings: bool) -> int:
        return sum(self._cell_width(i, wrap_headings) for i in shown) + 2 * (len(shown) - 1)

    def _print(self, console: rich.console.Console, shown: Sequence[int], wrap_headings: bool) -> None:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for i in shown:
            width = self._cell_width(i, wrap_headings)
            table.add_column(self.columns[i].heading, justify=self.columns[i].justify, width=width)
        for row in self.rows:
            table.add_row(*(row[i] for i in shown))
        terminal, console.width = console.width, max(console.width, self._width(shown, wrap_headings))
        try:
            console.print(table, "", crop=False)
        finally:
            console.width = terminal

    def _print_stacked(self, console: rich.console.Console) -> None:
        for row in self.rows:
            for column, cell in zip(self.columns, row, strict=True):
                console.print(f"{printable(column.heading)}: {printable(cell)}", soft_wrap=True)
            console.print()


def _width_limit(console: rich.console.Console) -> int | None:
    """Columns of the terminal. None if the output is not a terminal, where nothing has to fit."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    return console.width if console.is_terminal else None
