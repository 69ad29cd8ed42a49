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
    """Text that is safe to print: characters that do not print (control characters, line breaks, bidirectional
    overrides, lone surrogates) are escaped as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_json(content: Any, indent: int = 2) -> str:
    """JSON for a file or a terminal. Non-ASCII text is kept; characters that do not print are escaped.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def finite(content: Any) -> Any:
    """A copy with null in place of every NaN and infinity."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_json(content: Any) -> None:
    """Print JSON to stdout, in ASCII if the encoding of stdout requires it."""
    text = to_json(content)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2, allow_nan=False)
    print(text)


_log: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("log", default=None)
# The console of a progress bar: other lines must go through it, or they would break the bar.
_live: contextvars.ContextVar["Console | None"] = contextvars.ContextVar("live", default=None)


@contextlib.contextmanager
def logging_to(file: TextIO) -> Iterator[None]:
    """Send everything printed inside, progress included, to a file."""
    token = _log.set(file)
    try:
        yield
    finally:
        _log.reset(token)


@contextlib.contextmanager
def live_on(screen: "Console") -> Iterator[None]:
    """Route lines for stderr through the console of a progress bar while it is shown."""
    token = _live.set(screen)
    try:
        yield
    finally:
        _live.reset(token)


class Console(rich.console.Console):
    """Prints strings as they are, also in tables: no markup, emoji codes, highlighting or escape sequences.

    Use ``rich.text.Text`` for styled text, and pass text from outside through ``printable`` first.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def console(is_stderr: bool = False) -> Console:
    """The console to print to: as wide as the terminal or ``COLUMNS``, otherwise 120 characters."""
    if (log := _log.get()) is not None:
        return Console(file=log, width=120)
    if is_stderr and (live := _live.get()) is not None:
        return live
    terminal = Console(stderr=is_stderr)
    return terminal if terminal.is_terminal else Console(stderr=is_stderr, width=120)


def say(line: str) -> None:
    """Print one line to stderr."""
    console(is_stderr=True).print(printable(" ".join(line.split())), soft_wrap=True)


def warn(message: str) -> None:
    """Print one line to stderr that starts with "warning:"."""
    say(f"warning: {message}")
