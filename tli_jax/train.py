"""``python -m tli_jax.train``: continued pretraining of a Llama on a mesh, grown or not."""

import contextlib
import dataclasses
import json
import math
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tli_jax import command
from tli_jax.checkpoint import hub, sidecar, tokens
from tli_jax.checkpoint.headers import read_json
from tli_jax.checkpoint.hf import Checkpoint, open_checkpoint
from tli_jax.checkpoint.tokenizer import tokenizer_digest
from tli_jax.config import Recipe, TrainConfig, parse
from tli_jax.errors import MissingInputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LlamaConfig
from tli_jax.parallel import processes
from tli_jax.training.metrics import Metrics, read_metrics
from tli_jax.training.record import describe_base, describe_training
from tli_jax.training.run import RunFolder, model_digest, replacing
from tli_jax.values import Source

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.step import Trainer

PROGRAM = "python -m tli_jax.train"


def main(arguments: Sequence[str]) -> None:
    config = read_config(arguments)
    with processes.joined(config.distributed, config.process):
        train(config)


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration; with ``--run`` of a run that has begun and no ``--config``, over what that was started with.

    Raises:
        UsageError, MissingInputError: see ``config.parse``.
    """
    config = parse(TrainConfig, PROGRAM, "Train a Llama on, all of it or its injected layers.", arguments)
    run = RunFolder(config.run)
    if config.run and run.is_begun and not any(word.split("=")[0] == "--config" for word in arguments):
        config = parse(TrainConfig, PROGRAM, "", [*arguments, "--config", str(run.config)])
    return config


class Trained(NamedTuple):
    """A run at its last step: its programs, its parameters and its data."""

    trainer: "Trainer"
    trained: dict[str, Any]
    frozen: dict[str, Any]
    data: "Data | None"  # None of a run that was only exported


def train(config: TrainConfig, cache: Path | None = None, advance: command.Advance | None = None) -> Trained:
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
    run = RunFolder(config.run)
    if processes.is_first():
        run.create()
    processes.barrier("run")
    with processes.lock(run.path):
        if run.remote is not None:
            _say(f"run {run}: object storage has no lock: see to it that only one job writes to it")
        return _train(config, run, cache or run.data, advance)


@dataclasses.dataclass(frozen=True)
class Start:
    """The model of a run: configuration, plan, where its tokenizer is, and its weights where they are at hand."""

    model: LlamaConfig
    plan: Plan | None
    folder: Path
    weights: Checkpoint | None


def _train(config: TrainConfig, run: RunFolder, cache: Path, advance: command.Advance | None) -> Trained:
    has_begun = run.is_begun  # asked once: the first process may begin it before another one asks again
    start = _open_model(config, run)
    tokenizer, warnings = tokens.open_tokenizer(start.folder, start.model, config.special_tokens == "parse")
    for warning in (*(start.weights.warnings if start.weights else ()), *warnings):
        _say(f"warning: {warning}")

    from tli_jax.checkpoint.state import Checkpoints
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
                shown = command.progress("train", config.steps, "steps", done)
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


def _open_model(config: TrainConfig, run: RunFolder) -> Start:
    """Where the weights come from: a folder, a hub id, another run; or this run, once it has begun.

    Raises:
        UsageError: the run was started with another configuration or another model.
        MissingInputError, DataError: see ``open_checkpoint``.
    """
    if not run.is_begun:
        if config.export_only:
            raise UsageError(f"run {run}: has not begun, so there is nothing to export")
        if not config.model:
            raise UsageError("model is not set: --model FOLDER, a hub id, a run folder or 'embedded'")
        other = RunFolder(config.model)
        folder = run.path / "start" if other.is_begun else hub.resolve(config.model, config.revision)
        if other.is_begun:
            _export_other(other, config, folder)
        elif processes.is_first():
            shutil.rmtree(run.path / "start", ignore_errors=True)  # of a start from a run that came to nothing
        weights = open_checkpoint(folder)
        return Start(weights.config, _plan(weights.growth), folder, weights)
    run.check_config(config)
    here = run.path / "start" if (run.path / "start").is_dir() else Path(config.model)
    weights = None
    if config.model == hub.EMBEDDED or (here.is_dir() and not RunFolder(here).is_begun):
        weights = open_checkpoint(here if here.is_dir() else hub.resolve(config.model))
        run.check_facts({"model": model_digest(weights)})
    file = run.model / "config.json"
    return Start(LlamaConfig.from_hf(read_json(file), str(file)), _plan(run.growth), run.model, weights)


def open_text(
    config: Recipe,
    model: LlamaConfig,
    folder: Path,
    tokenizer: tokens.Tokenizer | None,
    T: int,
    cache: Path,
    known: Sequence[str] = (),
) -> "Data":
    """What a recipe trains on, tokenized for a model.

    The word ``embedded`` among the sources is the text kept out of the embedded base's training.

    Args:
        folder: of the model, with its tokenizer.
        T: tokens a sequence.
        cache: folder of tokenized text.
        known: see ``open_data``.

    Raises:
        TliError: see ``open_data``.
    """
    from tli_jax.data.batches import open_data

    file = cache / "topics.jsonl"
    text, validation_text = (
        replace_embedded(sources, config.field, file, tokens.topics)
        for sources in (config.text, config.validation_text)
    )
    config = dataclasses.replace(config, text=text, validation_text=validation_text)
    return open_data(config, model, tokenizer, tokenizer_digest(folder), T, cache, known)


def replace_embedded(
    sources: Sequence[Source], field: str, file: Path, read: Callable[[], list[str]]
) -> tuple[Source, ...]:
    """The sources, where the word ``embedded`` stands for documents that are written to a file of their own."""

    def find(source: Source) -> Source:
        if source.path != hub.EMBEDDED or Path(source.path).exists():
            return source
        if processes.is_first() or not file.is_file():  # each machine has its own, where the run is in object storage
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as temporary:
                lines = [json.dumps({field: document}) for document in read()]
                temporary.write_text("\n".join(lines), encoding="utf-8")
        return dataclasses.replace(source, path=str(file))

    return tuple(map(find, sources))


def _plan(growth: dict[str, Any] | None) -> Plan | None:
    return None if growth is None else Plan.from_json(growth)


def sequence_length(config: Recipe, model: LlamaConfig) -> int:
    """T: as configured, or the model's context, up to 2,048."""
    return config.sequence_length or min(model.max_position_embeddings, 2048)


def make_trainer(
    config: TrainConfig, model: LlamaConfig, plan: Plan | None, devices: Sequence[Any] | None = None
) -> "tuple[Trainer, int, list[str]]":
    """The programs of a run, its sequence length T, and what there is to say of it.

    Args:
        devices: to run on, or to compile for; by default those that there are.

    Raises:
        UsageError: layers, mesh, kernel or batch do not fit the model or the devices.
        DataError: the model's RoPE type cannot be run.
    """
    from tli_jax.parallel.mesh import batch_degree, check_fits, make_mesh
    from tli_jax.training.freezing import make_layout
    from tli_jax.training.kernels import choose_kernel, choose_mix
    from tli_jax.training.step import Trainer

    model.check_runnable()
    T = sequence_length(config, model)
    layout = make_layout(model, None if plan is None else plan.injected, config.only, config.outer)
    mesh = make_mesh(config.mesh, devices)
    if not config.accumulation:
        at_a_time = batch_degree(mesh)
        config = dataclasses.replace(config, accumulation=max(1, config.batch_size // at_a_time))
    if config.batch_size % config.accumulation:
        raise UsageError(f"batch_size {config.batch_size} is not a multiple of accumulation {config.accumulation}")
    sizes = model.sizes | {"H": model.num_attention_heads, "K": model.num_key_value_heads}
    check_fits(mesh, sizes, config.batch_size // config.accumulation)
    kernel, says = choose_kernel(config.attention, mesh, T, model.head_dim, config.compute_dtype, config.isolate)
    mix, how = choose_mix(mesh)
    notes = [f"attention: {says}"] + ([f"experts: {how}"] if model.num_experts else [])
    if model.max_position_embeddings < T:
        notes.append(f"warning: sequence_length {T} is more than the model's context, {model.max_position_embeddings}")
    return Trainer(model, config, layout, mesh, kernel, mix), T, notes


def _facts(trainer: "Trainer", weights: Checkpoint, data: "Data") -> dict[str, Any]:
    """What ``run.json`` says; ``dtypes`` are those in which the tensors were stored, and will be exported."""
    dtypes = {leaf.name: weights.stored(leaf.tensor, leaf.layers).dtype.name for leaf in trainer.leaves}
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


def _export_other(other: RunFolder, config: TrainConfig, folder: Path) -> None:
    """The newest checkpoint of another run as a folder to start from, on the mesh of this one."""
    from tli_jax.checkpoint.state import Checkpoints
    from tli_jax.training.export import export
    from tli_jax.training.loop import restore

    theirs = other.read_config()
    start = _open_model(theirs, other)
    here = {"mesh": config.mesh, "batch_size": config.batch_size, "accumulation": 1, "attention": "auto"}
    theirs = dataclasses.replace(theirs, **here)
    trainer, T, _ = make_trainer(theirs, start.model, start.plan)
    facts = other.read_facts()
    checkpoints = Checkpoints(other.checkpoints, theirs.keep, other.identity, read_only=True)
    restored = restore(trainer, checkpoints, facts["dtypes"], _say)
    checkpoints.close()
    if restored is None:
        raise MissingInputError(f"model {other}: is a run that has no checkpoint yet")
    state, frozen = restored
    record = describe_training(other, other.read_config(), sorted(trainer.layout.outer), T, int(state.step))
    export(trainer, state.trained | frozen, facts["dtypes"], other, folder, record)


def _introduce(trainer: "Trainer", notes: Sequence[str]) -> None:
    """What is about to run, and by which convention its FLOPs are counted."""
    model, config, mesh = trainer.model, trainer.config, trainer.mesh
    sizes = {leaf.name: math.prod(leaf.shape(model)) for leaf in trainer.leaves}
    trained = sum(sizes[leaf.name] for leaf in trainer.leaves if leaf.trains)
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


def summary(run: RunFolder) -> str:
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
        command.say(line)


if __name__ == "__main__":
    processes.leave(command.run(main, sys.argv[1:]))
