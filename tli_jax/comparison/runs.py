"""The training runs of a comparison: train each contender, and measure the trained model."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from tli_jax.cli.console import logging_to
from tli_jax.cli.progress import Advance, progress
from tli_jax.comparison.contenders import Contender
from tli_jax.comparison.starts import score
from tli_jax.comparison.workspace import Workspace, write_json
from tli_jax.errors import DataError, DivergedError
from tli_jax.hf.inputs import read_json
from tli_jax.training.metrics import read_metrics, validation
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import Trained, train


class _Run(NamedTuple):
    contender: Contender
    only: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.contender.file_name}-{self.only}-{self.seed}"


def train_all(space: Workspace) -> list[dict[str, Any]]:
    """Train and measure every contender with every seed. A run that diverges is a result, not an error."""
    if not space.config.steps:
        return []
    runs = [
        _Run(contender, only, seed)
        for seed in space.seeds  # outermost, so that an interrupted comparison has all contenders with fewer seeds
        for contender in space.contenders
        for only in space.config.only
        if only in contender.only
    ]
    steps = space.config.steps
    done = sum(steps if _file(space, run).is_file() else len(read_metrics(_directory(space, run))) for run in runs)
    with progress("train", len(runs) * steps, "steps", done) as advance:
        return [_train_and_measure(space, run, advance) for run in runs]


def _file(space: Workspace, run: _Run) -> Path:
    return space.output / "measured" / f"{run.name}.json"


def _directory(space: Workspace, run: _Run) -> RunDirectory:
    return RunDirectory(space.output / "runs" / run.name)


def _train_and_measure(space: Workspace, run: _Run, advance: Advance) -> dict[str, Any]:
    contender, only, seed = run
    if _file(space, run).is_file():
        return read_json(_file(space, run))
    directory, title = _directory(space, run), f"{contender.name}, {only}, seed {seed}"
    config = dataclasses.replace(
        space.recipe,
        model=str(space.model_path(contender, seed)),
        run=str(directory),
        only=contender.only[only],
        seed=seed,
        keep=1,
    )
    advance(0, title)
    result: dict[str, Any] = {"name": contender.name, "only": only, "seed": seed}
    with (space.output / "logs" / f"{run.name}.txt").open("a", encoding="utf-8") as log, logging_to(log):
        try:
            trained = train(config, space.output / "data", lambda n, note="", /: advance(n, f"{title} · {note}"))
            result |= {"diverged": None} | _measure(space, trained, directory)
        except DivergedError as error:
            result |= {"diverged": str(error)}
    write_json(_file(space, run), result)
    return result


def _measure(space: Workspace, run: Trained, directory: RunDirectory) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        DivergedError: a loss of the trained model is not finite.
    """
    import jax

    from tli_jax.training.feed import Feed, contributions
    from tli_jax.training.memory import compile_step

    trainer, trained, frozen, data = run
    assert data is not None, "the run was trained, not only exported"
    lines, arrays = read_metrics(directory), trained | frozen
    curve = validation(lines)
    if infinite := [tokens for tokens, loss in curve if loss is None]:
        raise DivergedError(f"the validation loss is not finite after {infinite[0]:,} tokens")
    feed = Feed(trainer, data)
    batches = max(1, space.recipe.validation_batches // 4)
    try:
        measured = {
            "old": space.old and Feed(trainer, space.old).validate(trained, frozen),
            **score(space, trainer, trained, frozen),
            "contributions": contributions(feed, trained, frozen, batches),
        }
    except DataError as error:  # the start of this run was finite on the same text and tasks
        raise DivergedError(f"the trained model cannot be measured: {error}") from error
    result = {
        "curve": curve,
        **measured,
        "seconds": sum(space.recipe.batch_size * data.T / line["tokens_per_second"] for line in lines),
        "attention": trainer.kernel,
        "remat": trainer.config.remat,
        "trained_parameters": sum(array.size for array in trained.values()),
        "flops_per_token": trainer.flops_per_token(data.T),
        "memory": compile_step(trainer, data.T, lambda leaf: arrays[leaf.name].dtype).peak,
    }
    jax.clear_caches()  # or the programs of hundreds of runs fill the memory
    return result
