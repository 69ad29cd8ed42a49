"""Read the ``results.json`` of a comparison, and format its numbers."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASE, OLD_LAYERS, RANDOM = BASELINES = ("base", "old_layers", "random")
HOLDS, FAILS, UNDECIDED, UNKNOWN = "holds", "does not hold here", "not decided", "not measured"
# Values of ``only``: which layers a run trains.
TRAINED = {None: "before training", "all": "all layers trained", "injected": "only injected layers trained"}


def first_of_each(starts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The start of each contender with its first seed."""
    return list({start["name"]: start for start in reversed(starts)}.values())[::-1]


def select(items: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [item for item in items if all(item[key] == value for key, value in wanted.items())]


def start_of(starts: Sequence[Mapping[str, Any]], name: str, seed: int) -> Mapping[str, Any]:
    """The start of a contender with a seed. Models that are not random have the same one for all seeds."""
    of_name = select(starts, name=name)
    return next((start for start in of_name if start["seed"] == seed), of_name[0])


def by_only(results: Mapping[str, Any]) -> dict[str | None, list[dict[str, Any]]]:
    """Rows of the summary, grouped by which layers were trained."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for row in results["summary"]:
        groups.setdefault(row["only"], []).append(row)
    return groups


def final_loss(run: Mapping[str, Any]) -> float:
    return run["curve"][-1][1]


def mean_curve(results: Mapping[str, Any], name: str, only: str) -> list[tuple[float, float, float]]:
    """``(tokens, mean loss, standard deviation)`` over the seeds that did not diverge."""
    runs = [run for run in select(results["runs"], name=name, only=only) if not run["diverged"]]
    curve = []
    for points in zip(*(run["curve"] for run in runs), strict=True):
        losses = [loss for _, loss in points]
        curve.append((points[0][0], statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return curve


def mean_and_spread(value: Mapping[str, Any] | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    spread = f" ± {value['sd']:.{digits}f}" if value["sd"] else ""
    return f"{value['mean']:.{digits}f}{spread}"


def signed(value: float) -> str:
    """A number with its sign. ``-0.0000`` becomes ``+0.0000``."""
    return f"{round(value, 4) + 0.0:+.4f}"


def signed_with_error(difference: Mapping[str, Any]) -> str:
    """A mean difference and half of its 95 % confidence interval."""
    error = f" ± {difference['error']:.4f}" if difference["error"] else ""
    return f"{signed(difference['mean'])}{error}"
