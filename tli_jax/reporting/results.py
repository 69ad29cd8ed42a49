"""Reading ``results.json`` of a comparison, and its numbers as text."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "not measured"


def first_of_each(starts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first start of each contender."""
    return list({start["name"]: start for start in reversed(starts)}.values())[::-1]


def select(items: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [item for item in items if all(item[key] == value for key, value in wanted.items())]


def final_loss(run: Mapping[str, Any]) -> float:
    return run["curve"][-1][1]


def mean_curve(results: Mapping[str, Any], name: str, only: str) -> list[tuple[float, float, float]]:
    """``(tokens, mean loss, standard deviation)`` over the seeds that did not diverge."""
    runs = [run for run in select(results["runs"], name=name, only=only) if not run["diverged"]]
    columns = zip(*(run["curve"] for run in runs), strict=True)
    found = []
    for points in columns:
        losses = [loss for _, loss in points]
        found.append((points[0][0], statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return found


def number(value: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Mean and spread as text."""
    if value is None:
        return "–"
    spread = f" ± {value['sd']:.{digits}f}" if value["sd"] else ""
    return f"{value['mean']:.{digits}f}{spread}"


def signed(difference: Mapping[str, Any]) -> str:
    """A difference and twice its standard error as text."""
    error = f" ± {difference['error']:.4f}" if difference["error"] else ""
    return f"{plus(difference['mean'])}{error}"


def plus(value: float) -> str:
    """With its sign; nothing is below zero that does not show."""
    return f"{round(value, 4) + 0.0:+.4f}"
