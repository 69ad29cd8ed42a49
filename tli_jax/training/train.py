"""A training run: opened, started or resumed, trained to its last step, and exported."""

import contextlib
import math
import secrets
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tli_jax.cli.console import say
from tli_jax.cli.progress import Advance, progress
from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed import processes
from tli_jax.errors import MissingInputError, UsageError
from tli_jax.hf import sidecar
from tli_jax.hf.checkpoint import Checkpoint, model_digest
from tli_jax.hf.grown_checkpoint import GrownCheckpoint
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.training.metrics import Metrics, read_metrics
from tli_jax.training.record import describe_base, describe_training
from tli_jax.training.run_directory import RunDirectory, lock_directory
from tli_jax.training.start import open_start
from tli_jax.training.text import open_text
from tli_jax.upscaling.record import unconverged

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.memory import CompiledMemory
    from tli_jax.training.trainer import Trainer


class Trained(NamedTuple):
    """A run at its last step.

    Attributes:
        data: None if the run was only exported.
        memory: of the train step; None if it was not compiled, or the memory of the device is not known.
    """

    trainer: "Trainer"
    trained: dict[str, Any]
    frozen: dict[str, Any]
    data: "Data | None"
    memory: "CompiledMemory | None"


def train(
    config: TrainConfig,
    cache: Path | None = None,
    advance: Advance | None = None,
    *,
    loss_before: float | None = None,
    save_last: bool = True,
) -> Trained:
    """Train a run to its last step, starting or resuming it, and export it if ``config.export`` is set.

    Args:
        cache: folder for tokenized text, which runs may share; by default the run's own.
        advance: progress callback, called once per step; by default progress is shown on stderr.
        loss_before, save_last: see ``Loop``.

    Raises:
        TliError: an option is wrong, an input is damaged, the run was started with other options, or it ended early.
    """
    if not config.run:
        raise UsageError("run is not set: give --run with a folder for checkpoints, metrics and configuration")
    if "://" in (config.export or ""):
        raise UsageError(f"export {config.export}: must be a local folder: export to one, then copy it")
    run = RunDirectory(config.run)
    if processes.is_first():
        run.create()
    processes.barrier("run")
    with lock_directory(run.path):
        if run.remote is not None:
            _report(f"run {run}: object storage has no locks: make sure that only one job writes to it")
        return _train(config, run, cache or run.data, advance, loss_before=loss_before, save_last=save_last)


def _train(config: TrainConfig, run: RunDirectory, cache: Path, advance: Advance | None, **options: Any) -> Trained:
    is_resumed = run.is_begun  # read once, because the first process may begin the run before the others get here
    start = open_start(config, run, _report)
    tokenizer, warnings = open_tokenizer(start.folder, start.model, config.special_tokens == "parse")
    for warning in (*(start.weights.warnings if start.weights else ()), *warnings):
        _report(f"warning: {warning}")

    from tli_jax.training.checkpoints import Checkpoints
    from tli_jax.training.export import check_export, export
    from tli_jax.training.loop import Loop
    from tli_jax.training.state import load, restore
    from tli_jax.training.trainer import make_trainer

    trainer, T, notes = make_trainer(config, start.model, start.plan)
    facts: dict[str, Any] = run.read_facts() if is_resumed else {"id": "", "sources": ()}
    data, missing, memory = None, None, None
    if not config.export_only:
        try:
            data = open_text(config, start.model, start.folder, tokenizer, T, cache, facts["sources"])
        except MissingInputError as error:
            if not is_resumed:
                raise
            missing = error  # only an unfinished run needs its text
    if data is not None:
        data.check_enough(config.batch_size)
        if is_resumed:
            run.check_facts({"data": data.digest})
    if config.export:
        check_export(Path(config.export), run, config.model, facts["id"], config.overwrite)
    if not is_resumed:
        assert start.weights is not None and data is not None
        for warning in sidecar.left_behind(start.folder):
            _report(f"warning: {warning}")
        trainer, memory = _fit(trainer, T, _stored_dtypes(trainer, start.weights))
        with processes.first("begin"):
            if processes.is_first():
                run.begin(config, start.weights, _facts(trainer, start.weights, data))
            else:
                run.fetch()
        facts = run.read_facts()
    for line in [*_describe(trainer), *notes, *((*data.notes, *data.repeated) if data else ())]:
        _report(line)

    checkpoints = Checkpoints(run.checkpoints, config.keep, run.identity)
    restored = restore(trainer, checkpoints, facts["dtypes"], _report)
    if restored is None:
        if start.weights is None:
            raise MissingInputError(
                f"model {config.model}: is missing, and run {run} has no checkpoint yet: restore the model"
            )
        trained, frozen = load(trainer, start.weights)
        if isinstance(start.weights, GrownCheckpoint):
            for warning in unconverged(start.weights.facts):
                _report(f"warning: {warning}")
        checkpoints.save_frozen(frozen)
        restored = trainer.init(trained), frozen
    state, frozen = restored
    step = int(state.step)
    if step < config.steps and not config.export_only:
        if data is None:
            raise missing or AssertionError("the text was opened")
        if is_resumed:
            trainer, memory = _fit(trainer, T, facts["dtypes"], facts)
        _report(f"resuming from step {step:,}" if step else "starting at step 0")
        metrics, shown = None, contextlib.nullcontext(advance or (lambda amount, note="", /: None))
        if processes.is_first():
            run.write_config(config)
            metrics = Metrics(run, config, step, facts["id"])
            if advance is None:
                shown = progress("train", config.steps, "steps", step)
        profile = run.path / "profile" if processes.is_first() else None
        loop = Loop(trainer, data, checkpoints, metrics, {"data": data.digest}, _report, profile, **options)
        try:
            with shown as show_step:
                state = loop.train(state, frozen, show_step)
        finally:
            if metrics is not None:
                metrics.close()
        if processes.is_first():  # other machines have no metrics
            _report(summary(run))
    else:
        _report(f"run {run}: {step} steps are done")
    checkpoints.close()
    if config.export:
        record = describe_training(run, config, sorted(trainer.layout.outer), T, int(state.step))
        export(trainer, state.trained | frozen, facts["dtypes"], run, Path(config.export), record)
        _report(f"exported to {config.export}")
    return Trained(trainer, state.trained, frozen, data, memory)


def _stored_dtypes(trainer: "Trainer", weights: Checkpoint) -> dict[str, str]:
    return {spec.name: weights.stack(spec.tensor, spec.layers).dtype.name for spec in trainer.param_specs}


def _fit(
    trainer: "Trainer", T: int, dtypes: dict[str, str], earlier: dict[str, Any] | None = None
) -> "tuple[Trainer, CompiledMemory | None]":
    """Check that the step fits in memory, with the ``remat`` of the configuration or of the earlier part of the run.

    Args:
        dtypes: stored dtype of each parameter.
        earlier: ``run.json`` of a run whose arrays have been restored.
    """
    from tli_jax.training.fit import cache_programs, fit, free_memory, require_fit
    from tli_jax.training.memory import gib

    if earlier is not None and (kernel := earlier.get("attention", trainer.kernel)) != trainer.kernel:
        _report(f"warning: the run started with other attention ({kernel}): losses may differ by rounding")
    if (cache := cache_programs(trainer.mesh)) is not None:
        _report(f"compiled programs are kept in {cache}")
    limit = free_memory(trainer.mesh)
    is_cpu = trainer.mesh.devices.flat[0].platform == "cpu"
    trainer, memory = fit(
        trainer,
        T,
        lambda spec: dtypes[spec.name],
        limit,
        _report,
        first=None if earlier is None else earlier.get("remat"),
        held=lambda memory: memory.arguments if is_cpu and earlier is not None else 0.0,
    )
    require_fit(trainer, T, memory, limit)
    if memory is not None and limit is not None:
        _report(
            f"remat: {trainer.config.remat}, {gib(memory.peak)} of {gib(limit)} per device, compiled in"
            f" {memory.seconds:.0f} s"
        )
    return trainer, memory


def _facts(trainer: "Trainer", weights: Checkpoint, data: "Data") -> dict[str, Any]:
    """The content of ``run.json``. ``dtypes`` are the stored dtypes, in which the tensors are exported."""
    names = ("tli_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "id": secrets.token_hex(8),
        "model": model_digest(weights),
        "data": data.digest,
        "sources": list(data.sources),
        "dtypes": _stored_dtypes(trainer, weights),
        "attention": trainer.kernel,
        "remat": trainer.config.remat,
        **describe_base(weights),
        "versions": sidecar.versions(*names),
    }


def _describe(trainer: "Trainer") -> list[str]:
    """One line each on trainable layers, on mesh and dtype, and on how FLOPs are counted."""
    model, config, mesh = trainer.model, trainer.config, trainer.mesh
    sizes = {spec.name: math.prod(spec.shape(model)) for spec in trainer.param_specs}
    trained = sum(sizes[spec.name] for spec in trainer.param_specs if spec.trains)
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    outer = ", ".join(sorted(trainer.layout.outer)) or "no tensors"
    return [
        f"training {sum(trainer.layout.trains)} of {model.num_hidden_layers} layers and {outer} outside the layers:"
        f" {trained:,} of {sum(sizes.values()):,} parameters",
        f"mesh {axes} of {mesh.size} × {mesh.devices.flat[0].device_kind}, {config.compute_dtype}, {config.optimizer}",
        "FLOPs per token, for MFU: 2 per matrix weight forward, 2 for activation gradients from the lowest trainable"
        " layer up, 2 for weight gradients of trainable weights; causal attention counts half; the head counts,"
        " embedding lookups and rematerialization do not",
    ]


def summary(run: RunDirectory) -> str:
    """One line about a finished run."""
    lines = read_metrics(run)
    before = next((line["validation_loss_before"] for line in lines if "validation_loss_before" in line), None)
    after = next((line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None)
    rate = statistics.median(line["tokens_per_second"] for line in lines)
    validation = "" if before is None or after is None else f", validation loss {before:.4f} → {after:.4f}"
    return f"{lines[-1]['step']} steps, {lines[-1]['tokens']:,} tokens{validation}, {rate:,.0f} tokens/s"


def _report(line: str) -> None:
    if processes.is_first():
        say(line)
