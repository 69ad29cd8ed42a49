"""The models of a comparison before training: grow or initialise each, and measure it."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.console import logging_to
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.parse import from_values
from tli_jax.cli.progress import progress
from tli_jax.comparison.contenders import Contender
from tli_jax.comparison.workspace import Workspace, write_json
from tli_jax.errors import DataError, UsageError
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.inputs import read_json
from tli_jax.models.config import LlamaConfig
from tli_jax.reporting.results import RANDOM
from tli_jax.upscaling.job import grow, prepare

if TYPE_CHECKING:
    from tli_jax.training.trainer import Trainer


def measure_starts(space: Workspace) -> list[dict[str, Any]]:
    """Make and measure the model of every contender, for every seed that changes it, with that of the trials.

    Raises:
        UsageError: the folder holds a measurement of other options or inputs.
        DataError: the loss of a model is not finite.
    """
    measured: dict[Path, dict[str, Any]] = {}  # two baselines start as the same model
    starts = []
    with progress("grow", len(space.contenders), "models") as advance:
        for contender in space.contenders:
            advance(0, contender.name)
            seeds = space.seeds + ([space.trial_seed] if space.config.learning_rates else [])
            for seed in seeds if contender.is_random else seeds[:1]:
                starts.append(_measure_start(space, contender, seed, measured))
            advance(1, contender.name)
    return starts


def _measure_start(
    space: Workspace, contender: Contender, seed: int, measured: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    file = space.output / "measured" / f"start-{contender.file_name}-{seed}.json"
    if file.is_file():
        start = read_json(file)
        _check_unchanged(space, contender, start)
        return start
    with (space.output / "logs" / f"{file.stem}.txt").open("w", encoding="utf-8") as log, logging_to(log):
        made = _make_model(space, contender, seed)
        folder = Path(hub.resolve(space.model_path(contender, seed), space.config.revision))
        if folder not in measured:
            try:
                measured[folder] = _measure(space, folder)
            except DataError as error:
                raise DataError(f"{contender.name} ({folder}): {error}") from error
    start = {"name": contender.name, "seed": seed, "method": contender.method, "growth": contender.growth}
    start |= {"is_drawn": contender.is_random, **made, **measured[folder], "facts": space.digests}
    write_json(file, start)
    return start


def _check_unchanged(space: Workspace, contender: Contender, start: dict[str, Any]) -> None:
    for key, value in space.digests.items():
        if start["facts"][key] != value:
            raise UsageError(
                f"output {space.output}: the {key} has changed since the comparison started: restore it, or choose"
                " another output"
            )
    if start["growth"] != contender.growth:
        raise UsageError(
            f"methods: {contender.name} was {start['growth']} in {space.output}, is {contender.growth}: give it another"
            " name, or choose another output"
        )


def _make_model(space: Workspace, contender: Contender, seed: int) -> dict[str, Any]:
    """Write the model, and describe it."""
    folder = space.model_path(contender, seed)
    if contender.method is None:
        config = space.size if contender.name == RANDOM else space.base.config
        if contender.name == RANDOM:
            _initialise(space, seed, Path(folder))
        return _sizes(config) | {"plan": None, "proof": None, "seconds": 0.0}
    values = contender.growth | {"model": space.config.model, "revision": space.config.revision}
    values |= {"output": str(folder), "overwrite": True} | ({"seed": seed} if contender.is_random else {})
    job = prepare(from_values(UpscaleConfig, values, f"methods: {contender.name}"))
    seconds: dict[str, float] = {}
    record = grow(job, seconds)
    return {
        **_sizes(grown_config(space.base.config, job.plan)),
        "plan": job.plan.to_json(),
        "proof": record["proof"],
        "seconds": sum(value for name, value in seconds.items() if name != "proof"),
    }


def _initialise(space: Workspace, seed: int, folder: Path) -> None:
    """Write a randomly initialised model in the dtype of the base."""
    import jax
    import jax.numpy as jnp

    from tli_jax.hf.save import save_hf
    from tli_jax.models.llama import init_params

    config = space.size
    params = jax.jit(lambda key: init_params(config, key, jnp.dtype(config.dtype)))(jax.random.key(seed))
    save_hf(folder, config, params, source=space.base.folder, overwrite=True)


def _sizes(config: LlamaConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "parameters": config.num_params,
        "active_parameters": config.num_active_params,
        "forward_flops_per_token": config.flops_per_token(min(config.max_position_embeddings, 2048)),
    }


def _measure(space: Workspace, folder: Path) -> dict[str, Any]:
    """The loss on the new and the old text, and the tasks."""
    from tli_jax.training.feed import Feed
    from tli_jax.training.state import load
    from tli_jax.training.trainer import make_trainer

    weights = open_checkpoint(folder)
    trainer, _, _ = make_trainer(space.recipe, weights.config, None)
    arrays = load(trainer, weights)
    old = space.old and Feed(trainer, space.old).validate(*arrays)
    return {"new": Feed(trainer, space.new).validate(*arrays), "old": old} | score(space, trainer, *arrays)


def score(space: Workspace, trainer: "Trainer", trained: Any, frozen: Any) -> dict[str, Any]:
    """The result of each task, and the mean accuracy."""
    if not space.tasks:
        return {"tasks": {}, "accuracy": None}
    from tli_jax.evaluation import scoring

    assert space.tokenizer is not None
    tasks = scoring.score_tasks(trainer, (trained, frozen), space.tokenizer, space.tasks)
    return {"tasks": tasks, "accuracy": statistics.fmean(task["accuracy"] for task in tasks.values())}
