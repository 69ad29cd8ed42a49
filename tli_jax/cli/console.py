"""Text for people, on a terminal or in a log, and JSON for programs."""

import contextlib
import contextvars
import json
import math
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import rich.console
import rich.text


def printable(text: str) -> str:
    """One line of text, safe to show: whatever does not print, such as control characters, line breaks, bidirectional
    overrides and lone surrogates, is escaped as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_json(content: Any, indent: int = 2) -> str:
    """JSON for a file or a terminal. Non-ASCII stays as it is, but what does not print is escaped.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def finite(content: Any) -> Any:
    """The same, with null for each number that is NaN or infinite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_json(content: Any) -> None:
    """JSON on stdout, in ASCII where stdout cannot take anything else."""
    text = to_json(content)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2, allow_nan=False)
    print(text)


_log: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("log", default=None)


@contextlib.contextmanager
def logging_to(file: TextIO) -> Iterator[None]:
    """Whatever is printed within, progress too, goes to a file: of one piece of work of many."""
    token = _log.set(file)
    try:
        yield
    finally:
        _log.reset(token)


class Console(rich.console.Console):
    """Prints strings as they are, in tables too: no markup, no emoji codes, no highlighting, no escape sequences.

    What is to look special is made of ``rich.text.Text``, whose parts go through ``printable`` if they are not ours.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    def show(self, table: rich.console.RenderableType) -> None:
        """Print a table whole: where the terminal is narrower, it breaks the lines, and no number is cut."""
        wide = self.measure(table, options=self.options.update_width(10_000)).maximum
        width, self.width = self.width, max(wide, self.width)
        try:
            self.print(table, crop=False)
        finally:
            self.width = width


def console(is_stderr: bool = False) -> Console:
    """Where to print: as wide as the terminal, 120 characters elsewhere."""
    if (log := _log.get()) is not None:
        return Console(file=log, width=120)
    made = Console(stderr=is_stderr)
    return made if made.is_terminal else Console(stderr=is_stderr, width=120)


def say(line: str) -> None:
    """One line on stderr."""
    console(is_stderr=True).print(printable(" ".join(line.split())), soft_wrap=True)


def warn(message: str) -> None:
    """One line on stderr that says so."""
    say(f"warning: {message}")
