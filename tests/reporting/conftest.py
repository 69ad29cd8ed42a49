"""A comparison as ``results.json`` describes it."""

from pathlib import Path
from typing import Any

import pytest

from tli_jax.comparison.statistics import analyse
from tli_jax.growth.methods import dus, tli

PROOF = {"max_abs_logit_difference": 0.5, "kl": 0.01, "top1": 0.9, "tokens": 512}
TOKENS = 1000


def scored(right: str) -> dict[str, Any]:
    accuracy = right.count("1") / len(right)
    return {"tasks": {"lines": {"right": right, "accuracy": accuracy}}, "accuracy": accuracy}


def start(name: str, method: str | None, new: float, old: float, plan: Any = None, seed: int = 0) -> dict[str, Any]:
    sizes = {"layers": 6 if plan else 4, "parameters": 6000, "active_parameters": 6000, "forward_flops_per_token": 1e6}
    found = {"name": name, "method": method, "seed": seed, "new": new, "old": old, "seconds": 1.0, **sizes}
    found |= scored(5 * {"base": "0101", "dus": "0001", "moe": "0111"}.get(name, "1101"))
    return found | {"plan": plan and plan.to_json(), "proof": plan and PROOF, "growth": {}, "is_drawn": name == "moe"}


def run(name: str, only: str, seed: int, losses: list[float], old: float, **other: Any) -> dict[str, Any]:
    curve = [[i * TOKENS, loss] for i, loss in enumerate(losses)]
    found = {"name": name, "only": only, "seed": seed, "diverged": None, "curve": curve, "old": old, "seconds": 2.0}
    found |= {"learning_rate": None}
    measured = {"memory": 1e6, "trained_parameters": 10, "flops_per_token": 3e6, "contributions": {"2": 0.1, "5": -0.1}}
    return found | measured | scored("0111" if name == "tli:identity" else "1000") | other


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """A base of 4 layers, tli and dus of 6, a mixture of experts that is not trained; five seeds."""
    config = {"only": ["all"], "seed": 0, "seeds": 5, "baselines": True, "output": str(tmp_path), "steps": 2}
    config["tasks"] = ["lines.jsonl"]
    starts = [start("base", None, 3.0, 2.0), start("tli:identity", "tli", 3.0, 2.0, tli(4, every=2))]
    starts += [
        start("dus", "dus", 3.5, 2.6, dus(4, 1)),
        start("moe", "moe", 3.1, 2.1),
        start("moe", "moe", 2.9, 2.1, seed=1),
    ]
    starts += [start("moe", "moe", 3.0, 2.0, seed=seed) for seed in (2, 3, 4)]
    runs = []
    for seed in range(5):
        runs.append(run("base", "all", seed, [3.0, 2.6, 2.50 + seed / 100], 2.3))
        runs.append(run("tli:identity", "all", seed, [3.0, 2.5, 2.40 + seed / 100], 2.2))
        runs.append(run("dus", "all", seed, [3.5, 2.8, 2.45 + seed / 50], 2.5))
    config |= {"model": "embedded", "methods": [1, 2, 3]}
    found = {
        "config": config,
        "base": {"layers": 4, "new": 3.0, "old": 2.0},
        "size": 6000,
        "starts": starts,
        "runs": runs,
    }
    found |= {"left_out": {"stack": "too large"}, "command": "python -m x --text '<b>&'", "versions": {"jax": "1"}}
    found |= {"machine": {"system": "s", "cores": 2, "devices": "1 × cpu"}}
    return found | analyse(found)
