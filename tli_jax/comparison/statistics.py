"""Statistics of a comparison: means and spreads over seeds, tokens to a loss, and verdicts on the paper's claims.

All contenders see the same data with the same seed, so two are compared seed by seed. One is better if it is
better with every seed, and if the mean difference exceeds twice its standard error. One seed gives no verdict on a
trained model.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tli_jax.reporting.results import (
    BASE,
    FAILS,
    HOLDS,
    OLD_LAYERS,
    UNKNOWN,
    final_loss,
    first_of_each,
    mean_and_spread,
    select,
    signed,
    signed_with_error,
)


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
    _mark_best(results, summary)
    return {"summary": summary, "reach": _reach(results), "claims": _claims(results)}


def _pairs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(only, name)`` of all runs, grouped by ``only``."""
    pairs = dict.fromkeys((run["only"], run["name"]) for run in results["runs"])
    order = {only: i for i, only in enumerate(results["config"]["only"])}
    return sorted(pairs, key=lambda pair: order[pair[0]])


def _starts(results: Mapping[str, Any], name: str, key: str) -> dict[int, float | None]:
    """A measurement before training by seed. Models that are not random have the same one for all seeds."""
    starts = select(results["starts"], name=name)
    if not starts:
        return {}
    first, count = results["config"]["seed"], results["config"]["seeds"]
    by_seed = {start["seed"]: start[key] for start in starts}
    return {seed: by_seed.get(seed, starts[0][key]) for seed in range(first, first + count)}


def _finals(results: Mapping[str, Any], name: str, only: str, key: str = "loss") -> dict[int, float | None]:
    """A measurement after training by seed. None if the run diverged."""
    runs = select(results["runs"], name=name, only=only)
    return {run["seed"]: None if run["diverged"] else final_loss(run) if key == "loss" else run[key] for run in runs}


def _spread(values: Mapping[int, float | None]) -> dict[str, Any] | None:
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


def _summarise(results: Mapping[str, Any], name: str, only: str | None) -> dict[str, Any]:
    start = select(results["starts"], name=name)[0]
    base, size = results["base"], results["size"]
    runs = [] if only is None else select(results["runs"], name=name, only=only)
    done = [run for run in runs if not run["diverged"]]
    initial = _spread(_starts(results, name, "new"))
    before = _spread(_starts(results, name, "old"))
    row: dict[str, Any] = {"name": name, "only": only, "method": start["method"], "diverged": len(runs) - len(done)}
    row |= {key: start[key] for key in ("layers", "parameters", "active_parameters", "forward_flops_per_token")}
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
    """The accuracy of each task before training, and its mean over the runs after training."""
    return {
        name: (task["accuracy"], statistics.fmean(run["tasks"][name]["accuracy"] for run in runs) if runs else None)
        for name, task in before.items()
    }


def _tokens_to(
    results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], levels: Mapping[int, float | None]
) -> dict[str, Any] | None:
    """Tokens after which each run reaches the loss given for its seed. None if a run never does."""
    if len(runs) < results["config"]["seeds"] or any(levels.get(run["seed"]) is None for run in runs):
        return None
    return _spread({run["seed"]: reached(run["curve"], levels[run["seed"]]) for run in runs})


def _contributions(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        layer: statistics.fmean(run["contributions"][layer] for run in runs)
        for layer in (runs[0]["contributions"] if runs else ())
    }


def _mark_best(results: Mapping[str, Any], summary: list[dict[str, Any]]) -> None:
    """Mark the best value of each column, and the values that the seeds cannot distinguish from it."""
    for only in dict.fromkeys(row["only"] for row in summary):
        rows = [row for row in summary if row["only"] == only]
        for key in ("initial", "final", "old_after", "accuracy_after"):
            known = [row for row in rows if row.get(key)]
            if not known:
                continue
            best = min(known, key=lambda row: row[key]["mean"] * (-1 if key == "accuracy_after" else 1))
            for row in known:
                of_best, of_row = (_values(results, name, only, key) for name in (best["name"], row["name"]))
                is_exact = key == "initial" and _is_deterministic(results, best["name"], row["name"])
                is_alike = _difference(of_best, of_row, is_exact)["verdict"] == "alike"
                row.setdefault("marks", {})[key] = "best" if row is best else "alike" if is_alike else ""


def _values(results: Mapping[str, Any], name: str, only: str | None, key: str) -> dict[int, float | None]:
    """A column by seed, with its sign such that lower is better."""
    if key == "initial":
        return _starts(results, name, "new")
    assert only is not None, "all other columns come from runs"
    if key == "accuracy_after":
        accuracies = _finals(results, name, only, "accuracy")
        return {seed: None if value is None else -value for seed, value in accuracies.items()}
    return _finals(results, name, only, {"final": "loss", "old_after": "old"}[key])


def _is_deterministic(results: Mapping[str, Any], *names: str) -> bool:
    """Whether all seeds give the same models before training."""
    return not any(start["is_drawn"] for name in names for start in select(results["starts"], name=name))


def _difference(a: Mapping[int, float | None], b: Mapping[int, float | None], is_exact: bool = False) -> dict[str, Any]:
    """``a - b``, paired by seed: its mean, twice its standard error (``error``), and the ``verdict`` on a: ``lower``,
    ``higher``, ``alike`` or ``unknown``.

    Args:
        is_exact: neither depends on the seed.
    """
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    if not known or len(known) < len(pairs):
        return {"mean": None, "error": None, "verdict": "unknown"}
    mean = statistics.fmean(known)
    error = 2 * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    if is_exact:
        error = 0.0
    if error is None:
        return {"mean": mean, "error": None, "verdict": "unknown"}
    is_clear = abs(mean) > error and (all(d < 0 for d in known) or all(d > 0 for d in known))
    verdict = "alike" if not is_clear else "lower" if mean < 0 else "higher"
    return {"mean": mean, "error": error, "verdict": verdict}


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
                tokens = _tokens_to(results, runs, _finals(results, other, only))
                row[other] = None if tokens is None else tokens["mean"]
    return reach


def _claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's claims (arXiv 2410.11654) for each ``tli`` against the first ``dus`` and the first ``moe``. The paper
    does not state how its injected layers are initialised, so each ``tli`` gets its own verdicts."""
    starts = first_of_each(results["starts"])
    methods = {start["method"]: start["name"] for start in reversed(starts)}
    rivals = {method: methods.get(method) for method in ("dus", "moe")}
    claims: list[dict[str, Any]] = []

    def judge(claim: str, only: str | None, numbers: dict[str, Any]) -> None:
        claims.append({"claim": claim, "only": only, "tli": name, **numbers})

    for name in (start["name"] for start in starts if start["method"] == "tli"):
        for method, rival in rivals.items():
            judge(f"lower initial loss than {method}", None, _compare_starts(results, name, rival, "new"))
        for only in results["config"]["only"]:
            for method, rival in rivals.items():
                judge(f"fewer steps than {method}", only, _compare_tokens(results, name, rival, only))
        for method, rival in ({BASE: BASE} | rivals).items():
            judge(f"better without any training than {method}", None, _compare_starts(results, name, rival, "old"))
            claim = f"better on tasks without any training than {method}"
            judge(claim, None, _compare_tasks(results, name, rival))
    return claims


_NOT_MEASURED = {"verdict": UNKNOWN, "numbers": "", "difference": None}


def _compare_starts(results: Mapping[str, Any], name: str, rival: str | None, text: str) -> dict[str, Any]:
    a = _starts(results, name, text)
    b = {} if rival is None else _starts(results, rival, text)
    difference = _difference(a, b, rival is not None and _is_deterministic(results, name, rival))
    if difference["mean"] is None:
        return _NOT_MEASURED
    losses = " against ".join(mean_and_spread(_spread(values)) for values in (a, b))
    numbers = f"{losses} on the {text} text, {signed_with_error(difference)}"
    return {"verdict": _verdict(difference), "numbers": numbers, "difference": difference}


def _compare_tasks(results: Mapping[str, Any], name: str, rival: str | None) -> dict[str, Any]:
    """The mean over tasks of the difference in accuracy, and twice its standard error over questions."""
    ours, theirs = (select(results["starts"], name=contender) for contender in (name, rival))
    if not theirs or not ours[0]["tasks"]:
        return _NOT_MEASURED
    means, variances = [], []
    for task in ours[0]["tasks"]:
        shares = [
            [statistics.fmean(map(int, question)) for question in zip(*answers, strict=True)]
            for answers in ([start["tasks"][task]["right"] for start in starts] for starts in (ours, theirs))
        ]
        pairs = [a - b for a, b in zip(*shares, strict=True)]
        means.append(statistics.fmean(pairs))
        variances.append(statistics.variance(pairs) / len(pairs) if len(pairs) > 1 else 0.0)
    mean, error = statistics.fmean(means), 2 * math.sqrt(sum(variances)) / len(variances)
    accuracies = [statistics.fmean(start["accuracy"] for start in starts) for starts in (ours, theirs)]
    numbers = f"accuracy {accuracies[0]:.4f} against {accuracies[1]:.4f}, {signed(mean)} ± {error:.4f} over questions"
    verdict = HOLDS if mean > error else FAILS
    return {"verdict": verdict, "numbers": numbers, "difference": {"mean": mean, "error": error}}


def _compare_tokens(results: Mapping[str, Any], name: str, rival: str | None, only: str) -> dict[str, Any]:
    """Tokens to the rival's final loss, against all tokens that the rival was trained on."""
    ours, theirs = (
        {run["seed"]: run for run in select(results["runs"], name=contender, only=only)} for contender in (name, rival)
    )
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs or any(run["diverged"] for pair in pairs for run in pair):
        return _NOT_MEASURED
    total = pairs[0][1]["curve"][-1][0]
    times = [reached(run["curve"], final_loss(other)) for run, other in pairs]
    shown = ", ".join("never" if tokens is None else f"{tokens / total:.0%}" for tokens in times)
    numbers = f"{rival}'s final loss by seed: {shown} (of {total:,} tokens)"
    if len(pairs) < 2:
        return {"verdict": UNKNOWN, "numbers": f"{numbers}; one seed gives no verdict", "difference": None}
    if None in times:
        return {"verdict": FAILS, "numbers": numbers, "difference": None}
    difference = _difference(dict(enumerate(times)), dict.fromkeys(range(len(times)), float(total)))
    return {"verdict": _verdict(difference), "numbers": numbers, "difference": difference}


def _verdict(difference: Mapping[str, Any]) -> str:
    return {"lower": HOLDS, "unknown": UNKNOWN}.get(difference["verdict"], FAILS)
