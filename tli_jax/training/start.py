"""The model that a run starts from: a folder, a hub id, another run, or the run itself once it has begun."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed import processes
from tli_jax.errors import MissingInputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import Checkpoint, model_digest, open_checkpoint
from tli_jax.hf.grown_checkpoint import grow_checkpoint
from tli_jax.hf.inputs import read_json
from tli_jax.models.config import LlamaConfig
from tli_jax.training.record import describe_training
from tli_jax.training.run_directory import RunDirectory
from tli_jax.upscaling.loading import grow_while_loading


@dataclasses.dataclass(frozen=True)
class Start:
    """The starting model.

    Attributes:
        plan: how it was grown; None if it was not.
        folder: where its tokenizer is.
        weights: None if the run has begun and the folder is gone.
    """

    model: LlamaConfig
    plan: Plan | None
    folder: Path
    weights: Checkpoint | None


def open_start(config: TrainConfig, run: RunDirectory, report: Callable[[str], None]) -> Start:
    """Open the starting model of a run.

    Args:
        report: called with one line for each damaged checkpoint of another run.

    Raises:
        UsageError: the run was started with another configuration or model, or an option is missing.
        MissingInputError, DataError: the model cannot be opened, see ``open_checkpoint``.
    """
    copy = run.path / "start"  # the model, if it is the export of another run
    if not run.is_begun:
        if config.export_only:
            raise UsageError(f"run {run}: has not begun, so there is nothing to export")
        if not config.model:
            raise UsageError("model is not set: give --model with a folder, a hub id, a run directory or 'embedded'")
        other = RunDirectory(config.model)
        if other.is_begun:
            folder = copy
            _export_run(other, config, folder, report)
        else:
            folder = hub.resolve(config.model, config.revision)
            if processes.is_first():
                shutil.rmtree(copy, ignore_errors=True)  # left by a start that was interrupted
        weights = open_checkpoint(folder)
        if config.grow is not None:
            weights = grow_while_loading(config.grow, weights, config.model)
            report(f"model {config.model}: growing it while loading; not proved: tli-jax upscale proves a growth")
        return Start(weights.config, _plan(weights.growth), folder, weights)
    run.check_config(config)
    folder = copy if copy.is_dir() else Path(config.model)
    weights = None
    if config.model == hub.EMBEDDED or (folder.exists() and not RunDirectory(folder).is_begun):
        weights = open_checkpoint(folder if folder.is_dir() else hub.resolve(config.model))
        if config.grow is not None and run.growth is not None:
            weights = grow_checkpoint(weights, Plan.from_json(run.growth), run.growth)
        run.check_facts({"model": model_digest(weights)})
    file = run.model / "config.json"
    return Start(LlamaConfig.from_hf(read_json(file), str(file)), _plan(run.growth), run.model, weights)


def _plan(growth: dict[str, Any] | None) -> Plan | None:
    return None if growth is None else Plan.from_json(growth)


def _export_run(other: RunDirectory, config: TrainConfig, folder: Path, report: Callable[[str], None]) -> None:
    """Export the newest checkpoint of another run, restored on the mesh of this one."""
    from tli_jax.training.checkpoints import Checkpoints
    from tli_jax.training.export import export
    from tli_jax.training.state import restore
    from tli_jax.training.trainer import make_trainer

    stored = other.read_config()
    start = open_start(stored, other, report)
    here = {"mesh": config.mesh, "batch_size": config.batch_size, "grad_accum_steps": 1, "attention": "auto"}
    trainer, T, _ = make_trainer(dataclasses.replace(stored, **here), start.model, start.plan)
    facts = other.read_facts()
    checkpoints = Checkpoints(other.checkpoints, stored.keep, other.identity, read_only=True)
    restored = restore(trainer, checkpoints, facts["dtypes"], report)
    checkpoints.close()
    if restored is None:
        raise MissingInputError(f"model {other}: this run has no checkpoint yet: train it first")
    state, frozen = restored
    record = describe_training(other, stored, sorted(trainer.layout.outer), T, int(state.step))
    export(trainer, state.trained | frozen, facts["dtypes"], other, folder, record)
