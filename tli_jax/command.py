"""The frame that every command runs in: errors become one line and an exit code, signals unwind, progress is shown."""

import argparse
import contextlib
import contextvars
import errno
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, Protocol, TextIO

import rich.console
import rich.progress
import rich.text

from tli_jax.errors import MissingInputError, StorageError, TliError, UsageError

# Seconds between two plain lines of progress where there is no terminal.
_LINE_EVERY = 5.0
# What the system says of a path that leads nowhere; everything else it refuses is a matter of storage.
_BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# How Python and the dynamic linker word it when memory runs out.
_NO_MEMORY = re.compile("can't start new thread|cannot allocate memory|failed to map segment", re.I)


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that a wrong argument is shown like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _Stopped(BaseException):
    """SIGTERM or SIGINT: unwinds, so that what is half-written is removed."""


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; its exit code. One line on stderr says what is wrong, the traceback comes with ``--debug``."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # clearing up takes a moment, and is not to be stopped
        raise _Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without "→" must not end a growth
            stream.reconfigure(errors="backslashreplace")
    try:
        main(arguments)
        sys.stdout.flush()
    except _Stopped as stopped:
        return _say(f"stopped by {stopped}: run the same command again", 75)
    except BrokenPipeError:
        # Whoever read our output has left; what Python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TliError, OSError, MemoryError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, TliError):
            return _say(str(error), error.exit_code)
        if isinstance(error, OSError):
            kind = MissingInputError if error.errno in _BAD_PATH else StorageError
            return _say(f"{error.filename or 'the system'}: {error.strerror or error}", kind.exit_code)
        return _say("out of memory", StorageError.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if _NO_MEMORY.search(str(error)):
            return _say("out of memory", StorageError.exit_code)
        if isinstance(error, ValueError) and "embedded null" in str(error):
            return _say("a path holds a null byte: give another path", UsageError.exit_code)
        return _say(f"internal error, {type(error).__name__}: {error}; --debug shows where", TliError.exit_code)
    return 0


def _say(message: str, code: int) -> int:
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
    return code


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


class Advance(Protocol):
    """To be told of the amount of work done since the last call, from any thread, with a note to show beside it."""

    def __call__(self, amount: int, note: str = "", /) -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, unit: str = "bytes", done: int = 0) -> Iterator[Advance]:
    """Show how far work has come, on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        done: how much was done before.

    Yields:
        A function to be told of progress.
    """
    screen, title = console(is_stderr=True), printable(title)
    if not screen.is_terminal:
        yield from _lines(title, total, done, screen)
        return
    amount = rich.progress.DownloadColumn() if unit == "bytes" else rich.progress.MofNCompleteColumn()
    columns = (
        rich.progress.TextColumn("{task.description:<8}", markup=False),
        rich.progress.BarColumn(),
        amount,
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=screen) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda amount, note="", /: bar.update(task, advance=amount, note=printable(note))


def _lines(title: str, total: int, done: int, screen: rich.console.Console) -> Iterator[Advance]:
    shown = started = time.monotonic()

    def advance(amount: int, note: str = "", /) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown > _LINE_EVERY:
            shown = time.monotonic()
            screen.print(f"{title} {100 * done // max(total, 1)} % {printable(note)}".rstrip())

    yield advance
    screen.print(f"{title} done in {time.monotonic() - started:.1f} s")
