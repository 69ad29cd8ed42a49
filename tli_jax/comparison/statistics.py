"""Statistics of a comparison: means and spreads over seeds, tokens to a loss, and verdicts on the paper's claims.

All contenders see the same data with the same seed, so two are compared seed by seed (see ``paired``), with a
correction for the number of comparisons. Fewer than five seeds give no verdict on anything that depends on a seed.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tli_jax.comparison.claims import judge_claims
from tli_jax.comparison.measured import (
    column_by_seed,
    finals_by_seed,
    is_deterministic,
    reached,
    spread,
    starts_by_seed,
    tokens_to,
)
from tli_jax.comparison.paired import decide, difference
from tli_jax.reporting.results import OLD_LAYERS, first_of_each, select


def analyse(results: Mapping[str, Any]) -> dict[str, Any]:
    """Derive the results from the measured ``starts`` and ``runs``.

    Returns:
        ``summary``, a row per contender and choice of trained layers, baselines first, then by loss; ``reach``, tokens
        after which one contender reaches the final loss of another; ``claims``, the verdicts on the paper's claims.
    """
    summary = [_summarise(results, name, only) for only, name in _pairs(results)]
    if not results["runs"]:
        names = [start["name"] for start in first_of_each(results["starts"])]
        # Before training, the old layers are those of the base.
        summary = [_summarise(results, name, None) for name in names if name != OLD_LAYERS]
    kinds = list(dict.fromkeys(row["only"] for row in summary))

    def order(row: Mapping[str, Any]) -> tuple[int, bool, float]:
        loss = row.get("final") if row["only"] else row["initial"]
        return kinds.index(row["only"]), row["method"] is not None, loss["mean"] if loss else math.inf

    summary.sort(key=order)
    return {"summary": summary, "reach": _reach(results), "claims": judge(results, summary)}


def judge(results: Mapping[str, Any], summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark the best of each column in the summary, and return the verdicts on the paper's claims."""
    _mark_best(results, summary)
    return judge_claims(results)


def _pairs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(only, name)`` of all runs, grouped by ``only``."""
    pairs = dict.fromkeys((run["only"], run["name"]) for run in results["runs"])
    order = {only: i for i, only in enumerate(results["config"]["only"])}
    return sorted(pairs, key=lambda pair: order[pair[0]])


def _summarise(results: Mapping[str, Any], name: str, only: str | None) -> dict[str, Any]:
    start = select(results["starts"], name=name)[0]
    base, size = results["base"], results["size"]
    runs = [] if only is None else select(results["runs"], name=name, only=only)
    done = [run for run in runs if not run["diverged"]]
    initial = spread(starts_by_seed(results, name, "new"))
    before = spread(starts_by_seed(results, name, "old"))
    row: dict[str, Any] = {"name": name, "only": only, "method": start["method"], "diverged": len(runs) - len(done)}
    row |= {key: start[key] for key in ("layers", "parameters", "active_parameters", "forward_flops_per_token")}
    row["size_difference"] = start["active_parameters"] / size - 1
    row["guarantee"] = None if start["plan"] is None else start["plan"]["guarantee"]
    row |= {"initial": initial, "old_before": before}
    row["tasks"] = _mean_tasks(start["tasks"], done)
    row["accuracy_before"] = spread(starts_by_seed(results, name, "accuracy"))
    row["change"] = None if initial is None or base["new"] is None else initial["mean"] - base["new"]
    if only is not None:
        row["final"] = spread(finals_by_seed(results, name, only))
        row["old_after"] = spread(finals_by_seed(results, name, only, "old"))
        row["accuracy_after"] = spread(finals_by_seed(results, name, only, "accuracy"))
        row["to_base"] = spread({run["seed"]: reached(run["curve"], base["new"]) for run in done}) if done else None
        row["to_rival"] = tokens_to(results, done, finals_by_seed(results, "base", "all"))
        for key in ("seconds", "memory", "trained_parameters", "flops_per_token"):
            row[key] = statistics.fmean(run[key] for run in done) if done else None
        row["flops"] = row["flops_per_token"] and row["flops_per_token"] * done[0]["curve"][-1][0]
        row["contributions"] = _contributions(done)
        row["learning_rate"] = runs[0]["learning_rate"]
    row["growth_seconds"] = start["seconds"]
    return row


def _mean_tasks(before: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """The accuracy of each task before training, and its mean over the runs after training."""
    return {
        name: (task["accuracy"], statistics.fmean(run["tasks"][name]["accuracy"] for run in runs) if runs else None)
        for name, task in before.items()
    }


def _contributions(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        layer: statistics.fmean(run["contributions"][layer] for run in runs)
        for layer in (runs[0]["contributions"] if runs else ())
    }


def _mark_best(results: Mapping[str, Any], summary: list[dict[str, Any]]) -> None:
    """Mark the best value of each column, and the values that the seeds cannot distinguish from it.

    Nothing is best unless it differs from all values that depend on a seed. Every pair of a column counts as compared.
    """
    for only in dict.fromkeys(row["only"] for row in summary):
        rows = [row for row in summary if row["only"] == only]
        for key in ("initial", "final", "old_after", "accuracy_after"):
            known = [row for row in rows if row.get(key)]
            pairs = {
                (a["name"], b["name"]): difference(
                    *(column_by_seed(results, row["name"], only, key) for row in (a, b)),
                    is_exact=key == "initial" and is_deterministic(results, a["name"], b["name"]),
                )
                for a, b in itertools.combinations(known, 2)
            }
            decide(list(pairs.values()))
            if not known:
                continue
            best = min(known, key=lambda row: row[key]["mean"] * (-1 if key == "accuracy_after" else 1))
            to_best = {
                name: found
                for names, found in pairs.items()
                if best["name"] in names
                for name in names
                if name != best["name"]
            }
            verdicts = [one["verdict"] for one in to_best.values()]
            is_close = any(one["verdict"] == "alike" and not one["is_exact"] for one in to_best.values())
            is_best = not is_close and ("lower" in verdicts or "higher" in verdicts)
            for row in known:
                if row is best:
                    mark = "best" if is_best else "alike" if "alike" in verdicts else ""
                else:
                    mark = "alike" if to_best[row["name"]]["verdict"] == "alike" else ""
                row.setdefault("marks", {})[key] = mark


def _reach(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """``reach[only][name][other]``: mean tokens after which a contender reaches the final loss of another with the same
    seed. None if it does not with every seed."""
    reach: dict[str, dict[str, dict[str, float | None]]] = {}
    pairs = _pairs(results)
    for only, name in pairs:
        runs = [run for run in select(results["runs"], name=name, only=only) if not run["diverged"]]
        row = reach.setdefault(only, {}).setdefault(name, {})
        for kind, other in pairs:
            if kind == only:
                tokens = tokens_to(results, runs, finals_by_seed(results, other, only))
                row[other] = None if tokens is None else tokens["mean"]
    return reach
