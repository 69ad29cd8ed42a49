"""Differences between contenders, paired by seed: Student's t, Holm's correction, and verdicts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# With fewer seeds, a difference is shown but not judged.
MIN_SEEDS = 5
_LEVEL = 0.05  # of all comparisons of a family together


def difference(a: Mapping[int, float | None], b: Mapping[int, float | None], is_exact: bool = False) -> dict[str, Any]:
    """``a - b``, paired by seed, still without a verdict.

    Args:
        is_exact: neither depends on the seed.

    Returns:
        ``mean``; ``error``, half of its 95 % confidence interval by Student's t with n - 1 degrees of freedom; ``p``,
        of the two-sided test that it is 0; ``seeds``; ``is_exact``. The first three are None if a value is missing.
    """
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    found = {"mean": None, "error": None, "p": None, "seeds": len(pairs), "is_exact": is_exact}
    if not known or len(known) < len(pairs):
        return found
    found["mean"] = mean = statistics.fmean(known)
    if is_exact:
        return found | {"error": 0.0}
    if len(known) < 2:
        return found
    from scipy.special import stdtr, stdtrit  # here, because it takes a moment to import

    error, freedom = statistics.stdev(known) / math.sqrt(len(known)), len(known) - 1
    # Without any spread, t is infinite, or undefined if there is no difference either.
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return found | {"error": error * float(stdtrit(freedom, 1 - _LEVEL / 2)), "p": p}


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons (Holm 1979): the chance of any false positive is at most p."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def decide(differences: Sequence[dict[str, Any]]) -> None:
    """Add ``verdict`` to the differences of one family of comparisons.

    It is ``lower`` or ``higher``; ``alike`` if no difference was found; ``undecided`` with fewer than ``MIN_SEEDS``
    seeds; ``unknown`` if it was not measured.
    """
    judged = [one for one in differences if one["p"] is not None and one["seeds"] >= MIN_SEEDS]
    adjusted = dict(zip(map(id, judged), holm([one["p"] for one in judged]), strict=True))
    for one in differences:
        if one["mean"] is None:
            one["verdict"] = "unknown"
        elif not one["is_exact"] and id(one) not in adjusted:
            one["verdict"] = "undecided"
        elif one["mean"] == 0 or adjusted.get(id(one), 0.0) > _LEVEL:
            one["verdict"] = "alike"
        else:
            one["verdict"] = "lower" if one["mean"] < 0 else "higher"
