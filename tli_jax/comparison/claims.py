"""Verdicts on the claims of the paper (arXiv 2410.11654)."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from tli_jax.comparison.measured import is_deterministic, reached, spread, starts_by_seed
from tli_jax.comparison.paired import MIN_SEEDS, decide, difference
from tli_jax.reporting.results import (
    BASE,
    FAILS,
    HOLDS,
    UNDECIDED,
    UNKNOWN,
    final_loss,
    first_of_each,
    mean_and_spread,
    select,
    signed,
    signed_with_error,
)


def judge_claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    # All claims are one family: the more are made, the clearer each has to be.
    decide([claim["difference"] for claim in claims if claim["difference"]])
    for claim in claims:
        if claim["difference"]:
            claim["verdict"] = _verdict(claim["difference"])
    return claims


_NOT_MEASURED = {"verdict": UNKNOWN, "numbers": "", "difference": None}


def _compare_starts(results: Mapping[str, Any], name: str, rival: str | None, text: str) -> dict[str, Any]:
    a = starts_by_seed(results, name, text)
    b = {} if rival is None else starts_by_seed(results, rival, text)
    found = difference(a, b, rival is not None and is_deterministic(results, name, rival))
    if found["mean"] is None:
        return _NOT_MEASURED
    losses = " against ".join(mean_and_spread(spread(values)) for values in (a, b))
    return {"numbers": f"{losses} on the {text} text, {signed_with_error(found)}", "difference": found}


def _compare_tasks(results: Mapping[str, Any], name: str, rival: str | None) -> dict[str, Any]:
    """The mean over tasks of the difference in accuracy, with its error over questions, not over seeds."""
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
    # Lower is better, as for losses. There are enough questions for a normal distribution.
    mean, error = -statistics.fmean(means), math.sqrt(sum(variances)) / len(variances)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    found = {"mean": mean, "error": 1.96 * error, "p": p, "seeds": MIN_SEEDS, "is_exact": False}
    accuracies = [statistics.fmean(start["accuracy"] for start in starts) for starts in (ours, theirs)]
    numbers = (
        f"accuracy {accuracies[0]:.4f} against {accuracies[1]:.4f}, {signed(-mean)} ± {1.96 * error:.4f} over questions"
    )
    return {"numbers": numbers, "difference": found}


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
    if None in times:
        never = FAILS if len(pairs) >= MIN_SEEDS and not any(times) else UNDECIDED
        return {"verdict": never, "numbers": numbers, "difference": None}
    found = difference(dict(enumerate(times)), dict.fromkeys(range(len(times)), float(total)))
    return {"numbers": numbers, "difference": found}


def _verdict(difference: Mapping[str, Any]) -> str:
    if difference["verdict"] == "alike":
        return FAILS if difference["is_exact"] else UNDECIDED  # equal is not better
    return {"lower": HOLDS, "higher": FAILS, "unknown": UNKNOWN, "undecided": UNDECIDED}[difference["verdict"]]
