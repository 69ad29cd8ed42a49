"""``python -m tli_jax.train``: continued pretraining of a Llama on a mesh, grown or not."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import Recipe, TrainConfig
from tli_jax.cli.console import say
from tli_jax.cli.values import Source
from tli_jax.distributed import processes
from tli_jax.errors import MissingInputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.inputs import read_json
from tli_jax.hf.tokenizer import tokenizer_digest
from tli_jax.models.config import LlamaConfig
from tli_jax.training.record import describe_training
from tli_jax.training.run_directory import RunDirectory, model_digest, replacing

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Start:
    """The model of a run: configuration, plan, where its tokenizer is, and its weights where they are at hand."""

    model: LlamaConfig
    plan: Plan | None
    folder: Path
    weights: Checkpoint | None


def _open_model(config: TrainConfig, run: RunDirectory) -> Start:
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
        other = RunDirectory(config.model)
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
    if config.model == hub.EMBEDDED or (here.is_dir() and not RunDirectory(here).is_begun):
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
    from tli_jax.distributed.kernels import choose_attention, choose_dispatch
    from tli_jax.distributed.mesh import batch_degree, check_fits, make_mesh
    from tli_jax.training.freezing import make_layout
    from tli_jax.training.step import Trainer

    model.check_runnable()
    T = sequence_length(config, model)
    layout = make_layout(model, None if plan is None else plan.injected, config.only, config.outer)
    mesh = make_mesh(config.mesh, devices)
    if not config.grad_accum_steps:
        at_a_time = batch_degree(mesh)
        config = dataclasses.replace(config, grad_accum_steps=max(1, config.batch_size // at_a_time))
    if config.batch_size % config.grad_accum_steps:
        raise UsageError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum_steps {config.grad_accum_steps}"
        )
    sizes = model.sizes | {"H": model.num_attention_heads, "K": model.num_key_value_heads}
    check_fits(mesh, sizes, config.batch_size // config.grad_accum_steps)
    kernel, says = choose_attention(config.attention, mesh, T, model.head_dim, config.compute_dtype, config.isolate)
    dispatch, how = choose_dispatch(mesh)
    notes = [f"attention: {says}"] + ([f"experts: {how}"] if model.num_experts else [])
    if model.max_position_embeddings < T:
        notes.append(f"warning: sequence_length {T} is more than the model's context, {model.max_position_embeddings}")
    return Trainer(model, config, layout, mesh, kernel, dispatch), T, notes


def _export_other(other: RunDirectory, config: TrainConfig, folder: Path) -> None:
    """The newest checkpoint of another run as a folder to start from, on the mesh of this one."""
    from tli_jax.training.checkpoints import Checkpoints
    from tli_jax.training.export import export
    from tli_jax.training.loop import restore

    theirs = other.read_config()
    start = _open_model(theirs, other)
    here = {"mesh": config.mesh, "batch_size": config.batch_size, "grad_accum_steps": 1, "attention": "auto"}
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


def _say(line: str) -> None:
    if processes.is_first():
        say(line)
