"""A training run, or some side by side: the figures, and the curves of loss against tokens."""

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tli_jax.cli.tables import show_number
from tli_jax.errors import DataError, OutputError, UsageError
from tli_jax.training.metrics import losses, read_metrics, validation
from tli_jax.training.run_directory import RunDirectory

Lines = list[dict[str, Any]]


def read_run(folder: Path | str) -> Lines:
    """The metrics of a run, a dict a step.

    Raises:
        DataError: it has done no step yet.
    """
    lines = read_metrics(RunDirectory(folder))
    if not lines:
        raise DataError(f"{folder}: has no metrics yet")
    return lines


def tabulate(runs: Mapping[str, Lines]) -> rich.table.Table:
    """One row per run."""
    table = rich.table.Table(box=rich.box.SIMPLE, title="runs", title_justify="left")
    headings = ("run", "steps", "tokens", "loss", "validation before", "after", "best", "tokens/s", "MFU", "skipped")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for name, lines in runs.items():
        found = losses(lines)
        best = min((value for _, value in validation(lines) if value is not None), default=None)
        mfu = [line["mfu"] for line in lines if line["mfu"] is not None]
        table.add_row(
            name,
            f"{lines[-1]['step']:,}",
            f"{lines[-1]['tokens']:,}",
            *map(show_number, (found["training"], found["validation_before"], found["validation_after"], best)),
            f"{statistics.median(line['tokens_per_second'] for line in lines):,.0f}",
            f"{statistics.median(mfu):.1%}" if mfu else "–",
            str(sum(line["skipped"] > 0 for line in lines)),
        )
    return table


def draw_curves(runs: Mapping[str, Lines], file: Path) -> None:
    """Loss of every step, thin, and validation loss, thick with dots, against tokens; one colour a run.

    Raises:
        UsageError: matplotlib is not installed, or it does not know the kind of file.
        OutputError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves need pip install 'tli_jax[plot]'") from None
    from tli_jax.reporting.plots import add_legend

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = itertools.cycle(matplotlib.color_sequences["tab10"])
    handles = {}
    for (name, lines), colour in zip(runs.items(), colours, strict=False):
        steps = [line for line in lines if line["loss"] is not None]
        axes.plot([s["tokens"] for s in steps], [s["loss"] for s in steps], color=colour, lw=0.7, alpha=0.35)
        points = [(x, y) for x, y in validation(lines) if y is not None]
        points = list(zip(*points, strict=True)) or [(), ()]
        (handles[name],) = axes.plot(*points, color=colour, lw=2, marker="o", ms=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_title("training (thin) and what was kept out (thick)", fontsize="medium")
    axes.grid(alpha=0.25)
    add_legend(axes, handles)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())[:160]}") from None
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}): choose another") from None
