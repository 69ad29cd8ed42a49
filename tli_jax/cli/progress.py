"""Progress: a bar on a terminal, a line every few seconds elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import rich.console
import rich.progress

from tli_jax.cli.console import console, printable

# Seconds between two plain lines of progress where there is no terminal.
_LINE_EVERY = 5.0


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
