"""A run from its first step to its last, and its export."""

import contextlib
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.console import say
from tli_jax.cli.progress import Advance, progress
from tli_jax.distributed import processes
from tli_jax.errors import MissingInputError, UsageError
from tli_jax.hf import sidecar, tokens
from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.training.metrics import Metrics, read_metrics
from tli_jax.training.record import describe_base, describe_training
from tli_jax.training.run_directory import RunDirectory, model_digest
from tli_jax.training.setup import _open_model, make_trainer, open_text

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.step import Trainer


class Trained(NamedTuple):
    """A run at its last step: its programs, its parameters and its data."""

    trainer: "Trainer"
    trained: dict[str, Any]
    frozen: dict[str, Any]
    data: "Data | None"  # None of a run that was only exported


def train(config: TrainConfig, cache: Path | None = None, advance: Advance | None = None) -> Trained:
    """Start a run, or go on with it, up to its last step, and export it.

    Args:
        cache: folder of tokenised text, which runs may share; by default the run has its own.
        advance: told of each step; by default a bar shows them.

    Raises:
        TliError: a wrong option, damaged input, a run that was started otherwise; or what ends a run early.
    """
    if not config.run:
        raise UsageError("run is not set: give a folder, which takes checkpoints, metrics and configuration")
    if "://" in (config.export or ""):
        raise UsageError(f"export {config.export}: is written to a folder only: copy it to object storage from there")
    run = RunDirectory(config.run)
    if processes.is_first():
        run.create()
    processes.barrier("run")
    with processes.lock(run.path):
        if run.remote is not None:
            _say(f"run {run}: object storage has no lock: see to it that only one job writes to it")
        return _train(config, run, cache or run.data, advance)


def _train(config: TrainConfig, run: RunDirectory, cache: Path, advance: Advance | None) -> Trained:
    has_begun = run.is_begun  # asked once: the first process may begin it before another one asks again
    start = _open_model(config, run)
    tokenizer, warnings = tokens.open_tokenizer(start.folder, start.model, config.special_tokens == "parse")
    for warning in (*(start.weights.warnings if start.weights else ()), *warnings):
        _say(f"warning: {warning}")

    from tli_jax.training.checkpoints import Checkpoints
    from tli_jax.training.export import check_export, export
    from tli_jax.training.loop import Loop, load, restore

    trainer, T, notes = make_trainer(config, start.model, start.plan)
    facts: dict[str, Any] = run.check_facts({}) if has_begun else {"id": "", "sources": ()}
    data, gone = None, None
    if not config.export_only:
        with processes.first("data"):
            try:
                data = open_text(config, start.model, start.folder, tokenizer, T, cache, facts["sources"])
            except MissingInputError as error:
                if not has_begun:
                    raise
                gone = error  # which matters only to a run that is not finished
    if data is not None:
        data.check_enough(config.batch_size)
        if has_begun:
            run.check_facts({"data": data.digest})
    if config.export:
        check_export(Path(config.export), run, config.model, facts["id"], config.overwrite)
    if not has_begun:
        assert start.weights is not None and data is not None
        for warning in sidecar.left_behind(start.folder):
            _say(f"warning: {warning}")
        with processes.first("begin"):
            if processes.is_first():
                run.begin(config, start.weights, _facts(trainer, start.weights, data))
            else:
                run.fetch()
        facts = run.check_facts({})
    _introduce(trainer, [*notes, *((*data.notes, *data.repeated) if data else ())])

    checkpoints = Checkpoints(run.checkpoints, config.keep, run.identity)
    restored = restore(trainer, checkpoints, facts["dtypes"], _say)
    if restored is None:
        if start.weights is None:
            raise MissingInputError(f"model {config.model}: is gone, and run {run} has no checkpoint yet")
        trained, frozen = load(trainer, start.weights)
        checkpoints.save_frozen(frozen)
        restored = trainer.init(trained), frozen
    state, frozen = restored
    done = int(state.step)
    if done < config.steps and not config.export_only:
        if data is None:
            raise gone or AssertionError("the data were opened")
        metrics, shown = None, contextlib.nullcontext(advance or (lambda amount, note="", /: None))
        if processes.is_first():
            run.write_config(config)
            metrics = Metrics(run, config, done, facts["id"])
            if advance is None:
                shown = progress("train", config.steps, "steps", done)
        loop = Loop(trainer, data, checkpoints, metrics, {"data": data.digest})
        try:
            with shown as told:
                state = loop.train(state, frozen, told)
        finally:
            if metrics is not None:
                metrics.close()
        if processes.is_first():  # other machines have no metrics
            _say(summary(run))
    else:
        _say(f"run {run}: {done} steps are done")
    checkpoints.close()
    if config.export:
        record = describe_training(run, config, sorted(trainer.layout.outer), T, int(state.step))
        export(trainer, state.trained | frozen, facts["dtypes"], run, Path(config.export), record)
        _say(f"written to {config.export}")
    return Trained(trainer, state.trained, frozen, data)


def _facts(trainer: "Trainer", weights: Checkpoint, data: "Data") -> dict[str, Any]:
    """What ``run.json`` says; ``dtypes`` are those in which the tensors were stored, and will be exported."""
    dtypes = {leaf.name: weights.stack(leaf.tensor, leaf.layers).dtype.name for leaf in trainer.param_specs}
    names = ("tli_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "id": secrets.token_hex(8),
        "model": model_digest(weights),
        "data": data.digest,
        "sources": list(data.sources),
        "dtypes": dtypes,
        **describe_base(weights),
        "versions": sidecar.versions(*names),
    }


def _introduce(trainer: "Trainer", notes: Sequence[str]) -> None:
    """What is about to run, and by which convention its FLOPs are counted."""
    model, config, mesh = trainer.model, trainer.config, trainer.mesh
    sizes = {leaf.name: math.prod(leaf.shape(model)) for leaf in trainer.param_specs}
    trained = sum(sizes[leaf.name] for leaf in trainer.param_specs if leaf.trains)
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{sum(trainer.layout.trains)} of {model.num_hidden_layers} layers train"
        f" ({trained:,} of {sum(sizes.values()):,} parameters), outside the layers:"
        f" {', '.join(sorted(trainer.layout.outer)) or 'nothing'}",
        f"mesh {axes} of {mesh.size} × {mesh.devices.flat[0].device_kind}, {config.compute_dtype}, {config.optimizer}",
        "FLOPs of a token: 2 for each weight forward, for activation gradients above the lowest layer that trains, and"
        " for weight gradients of what trains; causal attention half, the head counted, the embedding's look-up not",
    ]
    for line in [*lines, *notes]:
        _say(line)


def summary(run: RunDirectory) -> str:
    """One line about a run that is done."""
    lines = read_metrics(run)
    before = next((line["validation_loss_before"] for line in lines if "validation_loss_before" in line), None)
    after = next((line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None)
    rates = sorted(line["tokens_per_second"] for line in lines)
    validation = "" if before is None or after is None else f", validation loss {before:.4f} → {after:.4f}"
    return (
        f"{lines[-1]['step']} steps, {lines[-1]['tokens']:,} tokens{validation}, {rates[len(rates) // 2]:,.0f} tokens/s"
    )


def _say(line: str) -> None:
    if processes.is_first():
        say(line)
