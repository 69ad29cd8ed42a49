"""What a comparison found: means and spreads over seeds, who reaches what when, and what becomes of the paper's claims.

Spread is the standard deviation over seeds. As all contenders see the same data with the same seed, two are compared
seed by seed: one is called better where it is so in every seed, and the mean difference is more than twice its standard
error. With one seed nothing is said of what is trained.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tli_jax.reporting.results import (
    FAILS,
    HOLDS,
    UNKNOWN,
    final_loss,
    first_of_each,
    mean_and_spread,
    select,
    signed,
    signed_with_error,
)


def analyse(results: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the starts and runs of a comparison: ``summary``, a row for each contender and what trains in
    it; ``reach``, tokens after which one has come to the final loss of another; ``claims``, of the paper."""
    summary = [_summarise(results, name, only) for only, name in _pairs(results)]
    if not results["runs"]:
        summary = [
            _summarise(results, start["name"], None) for start in first_of_each(results["starts"]) if _is_shown(start)
        ]
    # Baselines first, then the best.
    kinds = list(dict.fromkeys(row["only"] for row in summary))

    def order(row: Mapping[str, Any]) -> tuple[int, bool, float]:
        known = row.get("final") if row["only"] else row["initial"]
        return kinds.index(row["only"]), row["method"] is not None, known["mean"] if known else math.inf

    summary.sort(key=order)
    _mark_best(results, summary)
    return {"summary": summary, "reach": _reach(results), "claims": _claims(results)}


def _is_shown(start: Mapping[str, Any]) -> bool:
    return start["name"] != "old_layers"  # before training that is the base


def _pairs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What trains, and who: in the order of the runs, all of one kind together."""
    pairs = dict.fromkeys((run["only"], run["name"]) for run in results["runs"])
    order = {only: i for i, only in enumerate(results["config"]["only"])}
    return sorted(pairs, key=lambda pair: order[pair[0]])


def _starts(results: Mapping[str, Any], name: str, key: str) -> dict[int, float | None]:
    """Seed -> of the model before training; the same in every seed where nothing is drawn."""
    found = select(results["starts"], name=name)
    if not found:
        return {}
    seed, count = results["config"]["seed"], results["config"]["seeds"]
    of_seed = {start["seed"]: start[key] for start in found}
    return {s: of_seed.get(s, found[0][key]) for s in range(seed, seed + count)}


def _finals(results: Mapping[str, Any], name: str, only: str, key: str = "loss") -> dict[int, float | None]:
    """Seed -> of the trained model; None where it diverged."""
    runs = select(results["runs"], name=name, only=only)
    return {run["seed"]: None if run["diverged"] else final_loss(run) if key == "loss" else run[key] for run in runs}


def _spread(values: Mapping[int, float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation; None where a seed has none."""
    known = [value for value in values.values() if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def reached(curve: Sequence[Sequence[float]], level: Any) -> float | None:
    """Tokens after which a curve of ``(tokens, loss)`` is first at or below a level, straight between its points."""
    if curve[0][1] <= level:
        return float(curve[0][0])
    for (at, before), (then, after) in itertools.pairwise(curve):
        if after <= level:
            return at + (then - at) * (before - level) / (before - after)
    return None


def _summarise(results: Mapping[str, Any], name: str, only: str | None) -> dict[str, Any]:
    start = select(results["starts"], name=name)[0]
    base, size = results["base"], results["size"]
    runs = [] if only is None else select(results["runs"], name=name, only=only)
    done = [run for run in runs if not run["diverged"]]
    initial = _spread(_starts(results, name, "new"))
    before = _spread(_starts(results, name, "old"))
    row: dict[str, Any] = {"name": name, "only": only, "method": start["method"], "diverged": len(runs) - len(done)}
    row |= {key: start[key] for key in ("layers", "parameters", "active_parameters", "forward_flops_per_token")}
    # Of what a token goes through: for a dense model, all.
    row["size_difference"] = start["active_parameters"] / size - 1
    row["guarantee"] = None if start["plan"] is None else start["plan"]["guarantee"]
    row |= {"initial": initial, "old_before": before}
    row["tasks"] = _mean_tasks(start["tasks"], done)
    row["accuracy_before"] = _spread(_starts(results, name, "accuracy"))
    row["change"] = None if initial is None or base["new"] is None else initial["mean"] - base["new"]
    if only is not None:
        row["final"] = _spread(_finals(results, name, only))
        row["old_after"] = _spread(_finals(results, name, only, "old"))
        row["accuracy_after"] = _spread(_finals(results, name, only, "accuracy"))
        row["to_base"] = _spread({run["seed"]: reached(run["curve"], base["new"]) for run in done}) if done else None
        row["to_rival"] = _tokens_to(results, done, _finals(results, "base", "all"))
        for key in ("seconds", "memory", "trained_parameters", "flops_per_token"):
            row[key] = statistics.fmean(run[key] for run in done) if done else None
        row["flops"] = row["flops_per_token"] and row["flops_per_token"] * done[0]["curve"][-1][0]
        row["contributions"] = _contributions(done)
    row["growth_seconds"] = start["seconds"]
    return row


def _mean_tasks(before: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """By task: accuracy of the first start, and the mean of the runs."""
    return {
        name: (task["accuracy"], statistics.fmean(run["tasks"][name]["accuracy"] for run in runs) if runs else None)
        for name, task in before.items()
    }


def _tokens_to(
    results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], levels: Mapping[int, float | None]
) -> dict[str, Any] | None:
    """After which each run comes to the level of its seed; None where one never does."""
    if len(runs) < results["config"]["seeds"] or any(levels.get(run["seed"]) is None for run in runs):
        return None
    return _spread({run["seed"]: reached(run["curve"], levels[run["seed"]]) for run in runs})


def _contributions(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        layer: statistics.fmean(run["contributions"][layer] for run in runs)
        for layer in (runs[0]["contributions"] if runs else ())
    }


def _mark_best(results: Mapping[str, Any], summary: list[dict[str, Any]]) -> None:
    """For each kind of run: the lowest of a column, and those that cannot be told from it."""
    for only in dict.fromkeys(row["only"] for row in summary):
        rows = [row for row in summary if row["only"] == only]
        for key in ("initial", "final", "old_after", "accuracy_after"):
            known = [row for row in rows if row.get(key)]
            if not known:
                continue
            best = min(known, key=lambda row: row[key]["mean"] * (-1 if key == "accuracy_after" else 1))
            for row in known:
                of_best, of_row = (_values(results, one["name"], only, key) for one in (best, row))
                is_certain = key == "initial" and _is_certain(results, best["name"], row["name"])
                is_alike = _difference(of_best, of_row, is_certain)["verdict"] == "alike"
                row.setdefault("marks", {})[key] = "best" if row is best else "alike" if is_alike else ""


def _values(results: Mapping[str, Any], name: str, only: str | None, key: str) -> dict[int, float | None]:
    """Seed -> what is the better the lower it is."""
    if key == "initial":
        return _starts(results, name, "new")
    assert only is not None, "trained by some kind of run"
    if key == "accuracy_after":
        known = _finals(results, name, only, "accuracy")
        return {seed: None if value is None else -value for seed, value in known.items()}
    return _finals(results, name, only, {"final": "loss", "old_after": "old"}[key])


def _is_certain(results: Mapping[str, Any], *names: str) -> bool:
    """Whether models are the same for every seed before training."""
    return not any(start["is_drawn"] for name in names for start in select(results["starts"], name=name))


def _difference(
    a: Mapping[int, float | None], b: Mapping[int, float | None], is_certain: bool = False
) -> dict[str, Any]:
    """How a differs from b, seed by seed: mean, twice its standard error, and whether a is ``lower``, ``higher``,
    ``alike``, or that is ``unknown``.

    Args:
        is_certain: neither depends on the seed.
    """
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    if not known or len(known) < len(pairs):
        return {"mean": None, "error": None, "verdict": "unknown"}
    mean = statistics.fmean(known)
    error = 2 * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    if is_certain:
        error = 0.0
    if error is None:
        return {"mean": mean, "error": None, "verdict": "unknown"}
    is_clear = abs(mean) > error and (all(d < 0 for d in known) or all(d > 0 for d in known))
    verdict = "alike" if not is_clear else "lower" if mean < 0 else "higher"
    return {"mean": mean, "error": error, "verdict": verdict}


def _reach(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """What trains -> contender -> another -> mean tokens to the other's final loss in the same seed, None where a
    seed never gets there."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    pairs = _pairs(results)
    for only, name in pairs:
        runs = [run for run in select(results["runs"], name=name, only=only) if not run["diverged"]]
        row = found.setdefault(only, {}).setdefault(name, {})
        for kind, other in pairs:
            if kind == only:
                tokens = _tokens_to(results, runs, _finals(results, other, only))
                row[other] = None if tokens is None else tokens["mean"]
    return found


def _claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three claims of the paper (arXiv 2410.11654), for each ``tli`` that takes part, against the first ``dus`` and
    the first ``moe``. What the paper's injected layer starts as is not known, so none of them is *the* TLI."""
    starts = first_of_each(results["starts"])
    ours = [start["name"] for start in starts if start["method"] == "tli"]
    rivals = [next((start["name"] for start in starts if start["method"] == m), None) for m in ("dus", "moe")]
    rows = []
    for name in ours:
        for method, rival in zip(("dus", "moe"), rivals, strict=True):
            found = _compare_starts(results, name, rival, "new")
            rows.append({"claim": f"lower initial loss than {method}", "only": None, "tli": name, **found})
        for only in results["config"]["only"]:
            for method, rival in zip(("dus", "moe"), rivals, strict=True):
                found = _compare_tokens(results, name, rival, only)
                rows.append({"claim": f"fewer steps than {method}", "only": only, "tli": name, **found})
        for method, rival in (("base", "base"), *zip(("dus", "moe"), rivals, strict=True)):
            found = _compare_starts(results, name, rival, "old")
            rows.append({"claim": f"better without any training than {method}", "only": None, "tli": name, **found})
            found = _compare_tasks(results, name, rival)
            claim = f"better on tasks without any training than {method}"
            rows.append({"claim": claim, "only": None, "tli": name, **found})
    return rows


def _compare_starts(results: Mapping[str, Any], name: str, rival: str | None, text: str) -> dict[str, Any]:
    a = _starts(results, name, text)
    b = {} if rival is None else _starts(results, rival, text)
    found = _difference(a, b, rival is not None and _is_certain(results, name, rival))
    domain = {"new": "new text", "old": "old text"}[text]
    if found["mean"] is None:
        return {"verdict": UNKNOWN, "numbers": "", "difference": None}
    means = [_spread(values) for values in (a, b)]
    numbers = (
        f"{mean_and_spread(means[0])} against {mean_and_spread(means[1])} on the {domain}, {signed_with_error(found)}"
    )
    return {"verdict": _verdict(found), "numbers": numbers, "difference": found}


def _compare_tasks(results: Mapping[str, Any], name: str, rival: str | None) -> dict[str, Any]:
    """Question by question: the mean over tasks of the difference, within twice its standard error over questions."""
    ours, theirs = (select(results["starts"], name=one) for one in (name, rival))
    if not theirs or not ours[0]["tasks"]:
        return {"verdict": UNKNOWN, "numbers": "", "difference": None}
    means, errors = [], []
    for task in ours[0]["tasks"]:
        shares = [
            [statistics.fmean(map(int, one)) for one in zip(*rights, strict=True)]
            for rights in ([start["tasks"][task]["right"] for start in starts] for starts in (ours, theirs))
        ]
        pairs = [a - b for a, b in zip(*shares, strict=True)]
        means.append(statistics.fmean(pairs))
        errors.append(statistics.variance(pairs) / len(pairs) if len(pairs) > 1 else 0.0)
    mean, error = statistics.fmean(means), 2 * math.sqrt(sum(errors)) / len(errors)
    known = [statistics.fmean(start["accuracy"] for start in starts) for starts in (ours, theirs)]
    numbers = f"{known[0]:.4f} against {known[1]:.4f} right, {signed(mean)} ± {error:.4f} over questions"
    verdict = HOLDS if mean > error else FAILS
    return {"verdict": verdict, "numbers": numbers, "difference": {"mean": mean, "error": error}}


def _compare_tokens(results: Mapping[str, Any], name: str, rival: str | None, only: str) -> dict[str, Any]:
    """Tokens to the rival's final loss, against the tokens that the rival took; all of them are the end of the run."""
    mine = {run["seed"]: run for run in select(results["runs"], name=name, only=only)}
    theirs = {} if rival is None else {run["seed"]: run for run in select(results["runs"], name=rival, only=only)}
    pairs = [(mine[s], theirs[s]) for s in sorted(mine.keys() & theirs.keys())]
    if not pairs or any(run["diverged"] for pair in pairs for run in pair):
        return {"verdict": UNKNOWN, "numbers": "", "difference": None}
    total = pairs[0][1]["curve"][-1][0]
    times = [reached(run["curve"], final_loss(other)) for run, other in pairs]
    shown = ", ".join("not reached" if at is None else f"{at / total:.0%}" for at in times)
    numbers = f"{rival}'s final loss after {shown} of {total:,} tokens, a figure a seed"
    if len(pairs) < 2:
        return {"verdict": UNKNOWN, "numbers": f"{numbers}; one seed has no spread", "difference": None}
    if None in times:
        return {"verdict": FAILS, "numbers": numbers, "difference": None}
    found = _difference(dict(enumerate(times)), dict.fromkeys(range(len(times)), float(total)))
    return {"verdict": _verdict(found), "numbers": numbers, "difference": found}


def _verdict(difference: Mapping[str, Any]) -> str:
    return {"lower": HOLDS, "unknown": UNKNOWN}.get(difference["verdict"], FAILS)
