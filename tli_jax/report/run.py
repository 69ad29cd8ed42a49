"""A training run, or some side by side: the figures, and the curves of loss against tokens."""

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tli_jax.errors import DataError, UsageError
from tli_jax.training.metrics import read_metrics
from tli_jax.training.run import RunFolder

Lines = list[dict[str, Any]]


def read_run(folder: Path | str) -> Lines:
    """The metrics of a run, a dict a step.

    Raises:
        DataError: it has done no step yet.
    """
    lines = read_metrics(RunFolder(folder))
    if not lines:
        raise DataError(f"{folder}: has no metrics yet")
    return lines


def validation(lines: Lines) -> list[tuple[int, float]]:
    """Loss on what was kept out, after so many tokens; the first is before training."""
    before = [(0, line["validation_loss_before"]) for line in lines if "validation_loss_before" in line]
    return before + [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def tabulate(runs: Mapping[str, Lines]) -> rich.table.Table:
    """One row a run."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    headings = ("run", "steps", "tokens", "loss", "validation before", "after", "best", "tokens/s", "MFU", "skipped")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, lines in runs.items():
        # The last tenth, as single batches differ.
        tail = [line["loss"] for line in lines[-max(1, len(lines) // 10) :] if line["loss"] is not None]
        values = [value for _, value in validation(lines)]
        mfu = [line["mfu"] for line in lines if line["mfu"] is not None]
        table.add_row(
            name,
            f"{lines[-1]['step']:,}",
            f"{lines[-1]['tokens']:,}",
            f"{statistics.fmean(tail):.4f}" if tail else "–",
            *(f"{value:.4f}" for value in (values[0], values[-1], min(values))) if values else ("–",) * 3,
            f"{statistics.median(line['tokens_per_second'] for line in lines):,.0f}",
            f"{statistics.median(mfu):.1%}" if mfu else "–",
            str(sum(line["skipped"] > 0 for line in lines)),
        )
    return table


def draw_curves(runs: Mapping[str, Lines], file: Path) -> None:
    """Loss of every step, thin, and on what was kept out, thick with dots, against tokens; one colour a run.

    Raises:
        UsageError: matplotlib is not installed, or it does not know the kind of file.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("curves need pip install 'tli_jax[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = itertools.cycle(matplotlib.color_sequences["tab10"])
    for (name, lines), colour in zip(runs.items(), colours, strict=False):
        steps = [line for line in lines if line["loss"] is not None]
        axes.plot([s["tokens"] for s in steps], [s["loss"] for s in steps], color=colour, lw=0.7, alpha=0.35)
        points = validation(lines)
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, lw=2, marker="o", ms=4, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_title("training (thin) and what was kept out (thick)", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())[:160]}") from None
