"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import rich.cells
import rich.console
import rich.progress
from rich.filesize import decimal

from tli_jax.cli.console import console, live_on, printable

LINE_EVERY = 10.0  # seconds between two lines of progress without a terminal


class Advance(Protocol):
    """Progress callback: the work done since the last call, and a note to show beside it. Thread-safe."""

    def __call__(self, amount: int, note: str = "", /) -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, unit: str = "bytes", done: int = 0) -> Iterator[Advance]:
    """Show progress on stderr.

    Args:
        total: amount of work, in ``unit``.
        done: amount that was done earlier, for example before a run was resumed.

    Yields:
        The progress callback.
    """
    screen, title = console(is_stderr=True), printable(title)
    if not screen.is_terminal:
        yield from _print_lines(title, total, unit, done, screen)
        return
    amount = rich.progress.DownloadColumn() if unit == "bytes" else rich.progress.MofNCompleteColumn()
    # Columns that do not fit are cut off, so the bar and then parts of the note make room.
    counts = "999.9/999.9 MB" if unit == "bytes" else f"{total}/{total}"
    fixed = max(8, rich.cells.cell_len(title)) + len(f" {counts} 0:00:00 ")
    width = max(4, min(20, (screen.width - fixed) // 3))
    columns = (
        rich.progress.TextColumn("{task.description:<8}", markup=False),
        rich.progress.BarColumn(width),
        amount,
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=screen) as bar, live_on(screen):
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda amount, note="", /: bar.update(
            task, advance=amount, note=shorten(printable(note), screen.width - fixed - width - 1)
        )


def shorten(note: str, width: int) -> str:
    """As many leading parts of a note, separated by " · ", as fit in a width."""
    parts = note.split(" · ")
    while parts and rich.cells.cell_len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)


def _print_lines(title: str, total: int, unit: str, done: int, screen: rich.console.Console) -> Iterator[Advance]:
    first, started = done, time.monotonic()
    shown = started
    show: Callable[[int], str] = decimal if unit == "bytes" else "{:,}".format

    def advance(amount: int, note: str = "", /) -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if now - shown < LINE_EVERY:
            return
        shown = now
        parts = [f"{title} {show(done)}/{show(total)}" + f" {unit}" * (unit != "bytes"), printable(note)]
        if done > first and done < total:
            parts.append(f"{_duration((now - started) / (done - first) * (total - done))} left")
        screen.print(" · ".join(filter(None, parts)), soft_wrap=True)

    yield advance
    screen.print(f"{title} done in {_duration(time.monotonic() - started)}", soft_wrap=True)


def _duration(seconds: float) -> str:
    """``2.5 s``, ``3 min 20 s`` or ``5 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
