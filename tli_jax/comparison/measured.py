"""What a comparison measured, by contender and seed."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tli_jax.reporting.results import final_loss, select, start_of


def starts_by_seed(results: Mapping[str, Any], name: str, key: str) -> dict[int, float | None]:
    """A measurement before training by seed; empty if the contender was not measured."""
    starts = select(results["starts"], name=name)
    first, count = results["config"]["seed"], results["config"]["seeds"]
    return {seed: start_of(starts, name, seed)[key] for seed in range(first, first + count) if starts}


def finals_by_seed(results: Mapping[str, Any], name: str, only: str, key: str = "loss") -> dict[int, float | None]:
    """A measurement after training by seed. None if the run diverged."""
    runs = select(results["runs"], name=name, only=only)
    return {run["seed"]: None if run["diverged"] else final_loss(run) if key == "loss" else run[key] for run in runs}


def spread(values: Mapping[int, float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation. None if the value of a seed is missing."""
    known = [value for value in values.values() if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def reached(curve: Sequence[Sequence[float]], level: Any) -> float | None:
    """Tokens after which a curve of ``(tokens, loss)`` first reaches a loss, with linear interpolation."""
    if curve[0][1] <= level:
        return float(curve[0][0])
    for (start, before), (end, after) in itertools.pairwise(curve):
        if after <= level:
            return start + (end - start) * (before - level) / (before - after)
    return None


def tokens_to(
    results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], levels: Mapping[int, float | None]
) -> dict[str, Any] | None:
    """Tokens after which each run reaches the loss given for its seed. None if a run never does."""
    if len(runs) < results["config"]["seeds"] or any(levels.get(run["seed"]) is None for run in runs):
        return None
    return spread({run["seed"]: reached(run["curve"], levels[run["seed"]]) for run in runs})


def column_by_seed(results: Mapping[str, Any], name: str, only: str | None, key: str) -> dict[int, float | None]:
    """A column by seed, with its sign such that lower is better."""
    if key == "initial":
        return starts_by_seed(results, name, "new")
    assert only is not None, "all other columns come from runs"
    if key == "accuracy_after":
        accuracies = finals_by_seed(results, name, only, "accuracy")
        return {seed: None if value is None else -value for seed, value in accuracies.items()}
    return finals_by_seed(results, name, only, {"final": "loss", "old_after": "old"}[key])


def is_deterministic(results: Mapping[str, Any], *names: str) -> bool:
    """Whether all seeds give the same models before training."""
    return not any(start["is_drawn"] for name in names for start in select(results["starts"], name=name))
