"""The learning rate of each contender: the best of a grid, on a seed that is used for nothing else."""

import itertools
import math
from typing import Any

from tli_jax.comparison.runs import Rates, Records, Run, pairs, train_each
from tli_jax.comparison.workspace import Workspace
from tli_jax.reporting.results import final_loss


def choose_rates(space: Workspace, starts: Records) -> tuple[Rates, list[dict[str, Any]]]:
    """Train every contender once with each learning rate of the grid.

    Returns:
        The rates with the lowest final loss on the new text, and what they were chosen by: ``name``, ``only``,
        ``seed``, the final ``losses`` as pairs of rate and loss (None if the run diverged), and the chosen ``rate``.
    """
    grid = sorted(space.config.learning_rates)
    trials = [
        Run(contender, only, space.trial_seed, rate, is_trial=True) for contender, only in pairs(space) for rate in grid
    ]
    found = train_each(space, "learning rates", trials, starts)
    chosen = []
    for _, group in itertools.groupby(found, key=lambda run: (run["name"], run["only"])):
        some = list(group)
        losses = [(run["learning_rate"], None if run["diverged"] else final_loss(run)) for run in some]
        # If all diverge, the first is the smallest, which is the likeliest to train.
        rate, _ = min(losses, key=lambda pair: math.inf if pair[1] is None else pair[1])
        chosen.append({key: some[0][key] for key in ("name", "only", "seed")} | {"losses": losses, "rate": rate})
    return {(one["name"], one["only"]): one["rate"] for one in chosen}, chosen
