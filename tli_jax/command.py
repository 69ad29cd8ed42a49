"""The frame that every command runs in: errors become one line and an exit code, signals unwind, progress is shown."""

import contextlib
import contextvars
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol, TextIO

import rich.console
import rich.progress

from tli_jax.errors import StorageError, TliError

# Seconds between two plain lines of progress where there is no terminal.
_LINE_EVERY = 5.0


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
            return _say(f"{error.filename or 'the system'}: {error.strerror or error}", StorageError.exit_code)
        return _say("out of memory", StorageError.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _say(f"internal error, {type(error).__name__}: {error}; --debug shows where", TliError.exit_code)
    return 0


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    print("error:", "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return code


_log: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("log", default=None)


@contextlib.contextmanager
def logging_to(file: TextIO) -> Iterator[None]:
    """Whatever is printed within, progress too, goes to a file: of one piece of work of many."""
    token = _log.set(file)
    try:
        yield
    finally:
        _log.reset(token)


def console(is_stderr: bool = False) -> rich.console.Console:
    """Where to print: as wide as the terminal, 120 characters elsewhere."""
    if (log := _log.get()) is not None:
        return rich.console.Console(file=log, highlight=False, width=120)
    made = rich.console.Console(stderr=is_stderr, highlight=False)
    return made if made.is_terminal else rich.console.Console(stderr=is_stderr, highlight=False, width=120)


def warn(message: str) -> None:
    """One line on stderr."""
    console(is_stderr=True).print(f"warning: {message}", soft_wrap=True, markup=False)


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
    screen = console(is_stderr=True)
    if not screen.is_terminal:
        yield from _lines(title, total, done, screen)
        return
    amount = rich.progress.DownloadColumn() if unit == "bytes" else rich.progress.MofNCompleteColumn()
    columns = (
        rich.progress.TextColumn("{task.description:<8}"),
        rich.progress.BarColumn(),
        amount,
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=screen) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda amount, note="", /: bar.update(task, advance=amount, note=note)


def _lines(title: str, total: int, done: int, screen: rich.console.Console) -> Iterator[Advance]:
    shown = started = time.monotonic()

    def advance(amount: int, note: str = "", /) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown > _LINE_EVERY:
            shown = time.monotonic()
            screen.print(f"{title} {100 * done // max(total, 1)} % {note}".rstrip(), markup=False)

    yield advance
    screen.print(f"{title} done in {time.monotonic() - started:.1f} s")
