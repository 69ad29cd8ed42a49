"""Paired differences against SciPy, Holm's correction against its definition, and how often noise gets a verdict."""

import numpy as np
import pytest
import scipy.stats

from tli_jax.comparison.paired import MIN_SEEDS, decide, difference, holm
from tli_jax.comparison.statistics import analyse
from tli_jax.reporting.results import FAILS, HOLDS


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_the_test_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 5, 10):
        a, b = rng.normal(0, 1, n), rng.normal(0.5, 1, n)
        found, theirs = difference(by_seed(a), by_seed(b)), scipy.stats.ttest_rel(a, b)
        interval = theirs.confidence_interval(0.95)
        assert found["p"] == pytest.approx(theirs.pvalue) and found["seeds"] == n
        assert (found["mean"] - found["error"], found["mean"] + found["error"]) == pytest.approx(tuple(interval))


def test_holm():
    assert holm([]) == []
    # Sorted: 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, which may not fall below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_verdicts():
    clear, level = by_seed([1.0, 1.1, 0.9, 1.0, 1.1]), by_seed([2.0] * 5)
    few = {seed: clear[seed] for seed in range(MIN_SEEDS - 1)}
    found = [difference(clear, level), difference(level, clear), difference(few, level), difference(clear, {})]
    found += [difference({0: 1.0}, {0: 1.0}, is_exact=True), difference({0: 1.0}, {0: 0.5}, is_exact=True)]
    found += [difference(level, level), difference({0: 1.0, 1: None}, {0: 2.0, 1: 2.0})]
    decide(found)
    expected = ["lower", "higher", "undecided", "unknown", "alike", "higher", "alike", "unknown"]
    assert [one["verdict"] for one in found] == expected


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_contenders_get_a_verdict_in_at_most_5_percent(results, seeds):
    """Five contenders that differ by noise alone, with noise that all of a seed share: marks and claims together."""
    rng = np.random.default_rng(seeds)
    names = ["base", "tli:identity", "dus", *(f"other {i}" for i in range(2))]
    start = {one["name"]: one for one in results["starts"]}
    starts = [start.get(name, start["dus"]) | {"name": name, "method": None} for name in names]
    starts[1] |= {"method": "tli"}
    starts[2] |= {"method": "dus"}
    false, trials = 0, 200
    for _ in range(trials):
        shared = rng.normal(0, 0.1, seeds)
        runs = []
        for name in names:
            for seed in range(seeds):
                curve = [[0, 3.0], [1000, 2.6], [2000, 2.4 + shared[seed] + rng.normal(0, 0.01)]]
                runs.append(
                    results["runs"][0] | {"name": name, "seed": seed, "curve": curve, "old": 2.0 + rng.normal()}
                )
        config = results["config"] | {"seeds": seeds, "tasks": []}
        found = analyse(results | {"config": config, "starts": starts, "runs": runs})
        finals = [row["marks"]["final"] for row in found["summary"] if row["only"]]
        claims = {claim["verdict"] for claim in found["claims"] if claim["claim"].startswith("fewer steps than dus")}
        false += finals != ["" if seeds < MIN_SEEDS else "alike"] * len(names) or bool(claims & {HOLDS, FAILS})
    assert false <= (0 if seeds < MIN_SEEDS else 0.05 * trials + 3 * (0.05 * 0.95 * trials) ** 0.5)
