"""Training runs: their numbers side by side, and their losses against tokens."""

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tli_jax.cli.tables import Table, make_columns, show_number
from tli_jax.errors import DataError, OutputError, UsageError
from tli_jax.training.metrics import losses, read_metrics, validation
from tli_jax.training.run_directory import RunDirectory

Lines = list[dict[str, Any]]


def read_run(folder: Path | str) -> Lines:
    """The metrics of a run, one dict per step.

    Raises:
        DataError: the run has not finished a step yet.
    """
    lines = read_metrics(RunDirectory(folder))
    if not lines:
        raise DataError(f"{folder}: has no metrics yet")
    return lines


def summarise(lines: Lines) -> dict[str, Any]:
    """The numbers of a run. Losses are in nats per token; a number that was not measured is None."""
    loss = losses(lines)
    mfu = [line["mfu"] for line in lines if line["mfu"] is not None]
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "loss": loss["training"],
        "validation_before": loss["validation_before"],
        "validation_after": loss["validation_after"],
        "validation_best": min((value for _, value in validation(lines) if value is not None), default=None),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "mfu": statistics.median(mfu) if mfu else None,
        "skipped_steps": sum(line["skipped"] > 0 for line in lines),
    }


def make_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per run."""
    numbers = {"steps": 0, "tokens": 1, "loss": 0, "validation before": 1, "validation after": 0, "best validation": 2}
    columns = make_columns({"run": 0}, numbers | {"tokens/s": 3, "MFU": 4, "skipped": 2})
    rows = [
        [
            name,
            f"{run['steps']:,}",
            f"{run['tokens']:,}",
            *(show_number(run[key]) for key in ("loss", "validation_before", "validation_after", "validation_best")),
            f"{run['tokens_per_second']:,.0f}",
            show_number(run["mfu"], ".1%"),
            str(run["skipped_steps"]),
        ]
        for name, run in runs.items()
    ]
    return Table(columns, rows, "training runs")


def draw_curves(runs: Mapping[str, Lines], file: Path) -> None:
    """Plot the losses of runs against tokens: training loss as a thin line, validation loss as a thick one with dots.

    Raises:
        UsageError: matplotlib is not installed, or cannot write this kind of file.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--curves needs matplotlib: pip install matplotlib") from None
    from tli_jax.reporting.curves import COLOURS, GREY
    from tli_jax.reporting.plots import add_legend

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    handles = {}
    for (name, lines), colour in zip(runs.items(), itertools.chain(COLOURS, itertools.repeat(GREY)), strict=False):
        steps = [line for line in lines if line["loss"] is not None]
        axes.plot([s["tokens"] for s in steps], [s["loss"] for s in steps], color=colour, lw=0.7, alpha=0.35)
        points = [(tokens, loss) for tokens, loss in validation(lines) if loss is not None]
        points = list(zip(*points, strict=True)) or [(), ()]
        (handles[name],) = axes.plot(*points, color=colour, lw=2, marker="o", ms=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("training loss (thin) and validation loss (thick)", fontsize="medium")
    axes.grid(alpha=0.25)
    add_legend(axes, handles)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())[:160]}") from None
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}): choose another file") from None
