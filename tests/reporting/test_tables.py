"""Tables at every width: a narrow terminal loses columns, never part of a cell."""

import io

import pytest

from tli_jax.cli.console import Console
from tli_jax.cli.tables import Column, Table

CELLS = ["tli:identity", "123,456,789", "2.4939 ± 0.0128 ≈", "[red]:smile:"]
COLUMNS = [
    Column("contender"),
    Column("parameters", "right", priority=2),
    Column("final loss", "right"),
    Column("a heading of several words", priority=1),
]
TABLE = Table(COLUMNS, [CELLS, ["dus", "1", "2", "3"]], title="a title")


def render(table: Table, width: int | None) -> str:
    """The text that a terminal of this width shows, or a file if there is none."""
    file = io.StringIO()
    table.render(Console(file=file, width=width or 10, force_terminal=width is not None, color_system=None))
    return file.getvalue()


@pytest.fixture(autouse=True)
def _no_columns_variable(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def test_files_get_every_column():
    text = render(TABLE, None)
    assert all(cell in text for cell in CELLS) and "a heading of several words" in text


def test_no_cell_is_truncated_at_any_width():
    for width in range(1, 100):
        text = render(TABLE, width)
        title, *lines, note = text.rstrip().splitlines()
        assert title == "a title" and "…" not in text
        assert "contender: dus" in lines or max(map(len, lines)) <= width
        for column, cell in zip(COLUMNS, CELLS, strict=True):
            assert cell in text or (column.heading in note and note.startswith("(no room for: "))


def test_columns_are_dropped_by_priority_then_rows_are_stacked():
    assert "no room" not in render(TABLE, 80)
    assert "(no room for: parameters)" in render(TABLE, 50)
    assert "(no room for: parameters, a heading of several words)" in render(TABLE, 33)
    stacked = render(TABLE, 30)
    assert "no room" not in stacked and "parameters: 123,456,789" in stacked


def test_headings_wrap_before_a_column_is_dropped():
    text = render(TABLE, 60)
    assert "123,456,789" in text and "a heading of several words" not in text and "no room" not in text


def test_columns_variable_overrides_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "33")
    assert "(no room for: " in render(TABLE, None) and "(no room for: " in render(TABLE, 200)


def test_cells_are_printed_as_they_are():
    table = Table([Column("name")], [["[red]:smile:\x1b\udcff"]])
    assert r"[red]:smile:\x1b\udcff" in render(table, 80)
