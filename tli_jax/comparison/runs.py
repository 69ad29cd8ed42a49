"""The training runs of a comparison: train each contender, and measure the trained model."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tli_jax.cli.console import logging_to
from tli_jax.cli.progress import Advance, progress
from tli_jax.comparison.contenders import Contender
from tli_jax.comparison.starts import score
from tli_jax.comparison.workspace import Workspace, write_json
from tli_jax.errors import DataError, DivergedError
from tli_jax.hf.inputs import read_json
from tli_jax.reporting.results import start_of
from tli_jax.training.metrics import read_metrics, validation
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import Trained, train

Records = list[dict[str, Any]]
Rates = Mapping[tuple[str, str], float]  # the learning rate by name of the contender and ``only``


class Run(NamedTuple):
    """One training run.

    Args:
        rate: learning rate of all groups of tensors; None for that of the configuration.
        is_trial: whether it only serves to choose the learning rate.
    """

    contender: Contender
    only: str
    seed: int
    rate: float | None = None
    is_trial: bool = False

    @property
    def name(self) -> str:
        last = f"rate-{self.rate:g}" if self.is_trial else f"{self.seed}"
        return f"{self.contender.file_name}-{self.only}-{last}"


def pairs(space: Workspace) -> list[tuple[Contender, str]]:
    """Each contender with the choices of trainable layers that it takes part in."""
    return [(one, only) for one in space.contenders for only in space.config.only if only in one.only]


def train_all(space: Workspace, starts: Records, rates: Rates) -> Records:
    """Train and measure every contender with every seed. A run that diverges is a result, not an error."""
    # Seeds are outermost, so that an interrupted comparison has all contenders with fewer seeds.
    runs = [
        Run(contender, only, seed, rates.get((contender.name, only)))
        for seed in space.seeds
        for contender, only in pairs(space)
    ]
    return train_each(space, "train", runs, starts)


def train_each(space: Workspace, title: str, runs: Sequence[Run], starts: Records) -> Records:
    """The results of runs, in order. What is measured is not trained again."""
    if not runs or not space.config.steps:
        return []
    steps = space.config.steps
    done = 0
    for run in runs:
        if _file(space, run).is_file():
            done += steps
        elif _keeps(space, run):  # an interrupted run resumes
            done += len(read_metrics(_directory(space, run)))
    with progress(title, len(runs) * steps, "steps", done) as advance:
        return [_train_and_measure(space, run, starts, advance) for run in runs]


def _file(space: Workspace, run: Run) -> Path:
    return space.output / "measured" / f"{run.name}.json"


def _keeps(space: Workspace, run: Run) -> bool:
    return space.config.keep_checkpoints and not run.is_trial


def _directory(space: Workspace, run: Run) -> RunDirectory:
    return RunDirectory(space.output / "runs" / run.name)


def _train_and_measure(space: Workspace, run: Run, starts: Records, advance: Advance) -> dict[str, Any]:
    contender, only, seed, rate, is_trial = run
    file, directory, keeps = _file(space, run), _directory(space, run), _keeps(space, run)
    if not file.is_file():
        config = dataclasses.replace(
            space.recipe,
            model=str(space.model_path(contender, seed)),
            run=str(directory),
            only=contender.only[only],
            seed=seed,
            keep=1,
            learning_rate=space.recipe.learning_rate if rate is None else {"all": rate},
            validate_every=space.config.steps if is_trial else space.recipe.validate_every,
        )
        title = f"{contender.name}, {only}, " + (f"learning rate {rate:g}" if is_trial else f"seed {seed}")
        advance(0, title)
        result: dict[str, Any] = {"name": contender.name, "only": only, "seed": seed, "learning_rate": rate}
        with (space.output / "logs" / f"{run.name}.txt").open("a", encoding="utf-8") as log, logging_to(log):
            try:
                trained = train(
                    config,
                    space.output / "data",
                    lambda n, note="", /: advance(n, f"{title} · {note}"),
                    loss_before=start_of(starts, contender.name, seed)["new"],
                    save_last=keeps,
                )
                curve = _curve(directory)
                result |= {"diverged": None, "curve": curve}
                result |= {} if is_trial else _measure(space, trained, directory)
            except DivergedError as error:
                result |= {"diverged": str(error)}
        write_json(file, result)
    if not keeps:
        shutil.rmtree(str(directory.checkpoints), ignore_errors=True)
    return read_json(file)


def _curve(directory: RunDirectory) -> list[tuple[int, float | None]]:
    """Tokens and held-out loss. Raises ``DivergedError`` if a loss is not finite."""
    curve = validation(read_metrics(directory))
    if infinite := [tokens for tokens, loss in curve if loss is None]:
        raise DivergedError(f"the validation loss is not finite after {infinite[0]:,} tokens")
    return curve


def _measure(space: Workspace, run: Trained, directory: RunDirectory) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        DivergedError: a loss of the trained model is not finite.
    """
    from tli_jax.training.feed import Feed, contributions
    from tli_jax.training.memory import compile_step

    trainer, trained, frozen, data, memory = run
    assert data is not None, "the run was trained, not only exported"
    lines, arrays = read_metrics(directory), trained | frozen
    # A finished run that was not measured yet has not compiled its step again.
    memory = memory or compile_step(trainer, data.T, lambda leaf: arrays[leaf.name].dtype)
    # Layers are left out one by one, on a third of the tokens that the run was trained on.
    batches = min(space.recipe.validation_batches // 4, space.config.steps // (3 + 3 * sum(trainer.layout.injected)))
    try:
        measured = {
            "old": space.old and Feed(trainer, space.old).validate(trained, frozen),
            **score(space, trainer, trained, frozen),
            "contributions": contributions(Feed(trainer, data), trained, frozen, max(1, batches)),
        }
    except DataError as error:  # the start of this run was finite on the same text and tasks
        raise DivergedError(f"the trained model cannot be measured: {error}") from error
    return {
        **measured,
        "seconds": sum(space.recipe.batch_size * data.T / line["tokens_per_second"] for line in lines),
        "attention": trainer.kernel,
        "remat": trainer.config.remat,
        "trained_parameters": sum(array.size for array in trained.values()),
        "flops_per_token": trainer.flops_per_token(data.T),
        "memory": memory.peak,
    }
