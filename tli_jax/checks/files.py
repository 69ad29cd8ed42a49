"""Checks of what is read and written: the model, the growth, the run directory, the data, and disk space."""

import os
import shutil
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from tli_jax.checks.context import Context, NotCheckedError, Result, require
from tli_jax.cli.console import warn
from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from tli_jax.hf.grown_config import grown_config
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.output import check_output
from tli_jax.hf.tensors import CODES, Tensor
from tli_jax.hf.tokenizer import open_tokenizer, tokenizer_digest
from tli_jax.models.config import LlamaConfig
from tli_jax.models.shapes import check_shape, read_shape
from tli_jax.training.run_directory import RunDirectory
from tli_jax.upscaling.loading import grow_while_loading
from tli_jax.upscaling.options import make_plan

_SAMPLE = 2**20  # characters of each text that are tokenized, to estimate the tokens of all of it


def check_model(context: Context) -> Result:
    config = context.config
    name = config.model if context.grows or config.train is None else config.train.model or config.model
    if not name and config.shape is None:
        raise UsageError("model is not set: --model FOLDER, a Hub id or 'embedded', or a shape: --shape llama3.1-8b")
    is_local = name == hub.EMBEDDED or (name != "" and Path(name).expanduser().exists())
    if config.shape is not None and not is_local:
        context.base = _from_shape(read_shape(config.shape))
        shape = config.shape if isinstance(config.shape, str) else "the given shape"
        raise NotCheckedError(f"{name or 'no model'} is not here: using {shape}, {_describe(context.base.config)}")
    context.base = base = open_checkpoint(hub.resolve(name, config.revision, headers_only=True))
    check_shape(base.config, config.shape, name)
    for warning in base.warnings:
        warn(warning)
    return f"{name}: {_describe(base.config)}, headers agree with config.json", {}


def check_growth(context: Context) -> Result:
    base, config = require(context.base, "a model"), context.config
    if not config.output:
        raise UsageError("output is not set: --output FOLDER")
    config.check_grows_once()
    # Any importance will do: which layers a plan repeats changes nothing that is checked here.
    importance = [0.0] * base.config.num_hidden_layers
    context.plan = plan = make_plan(config, base, importance)
    nbytes = sum(piece.nbytes for piece in grown_tensors(base, plan))
    context.writes.append(("grown model", Path(config.output), nbytes))
    has_begun = config.train is not None and config.train.run and RunDirectory(config.train.run).is_begun
    if not has_begun:
        check_output(Path(config.output), context.base_folder, config.overwrite)
    text, facts = _describe_growth(base, plan)
    return f"{text}, {decimal(nbytes)} to write", facts | {"bytes": nbytes}


def check_growth_while_loading(context: Context) -> Result:
    base, options = require(context.base, "a model"), context.train.grow
    assert options is not None
    context.plan = plan = Plan.from_json(grow_while_loading(options, base, context.train.model).growth or {})
    text, facts = _describe_growth(base, plan)
    return f"{text}, while loading", facts


def _describe_growth(base: Checkpoint, plan: Plan) -> Result:
    before, after = base.config.num_params, grown_config(base.config, plan).num_params
    text = f"{plan.method}: {plan.base_layers} → {len(plan)} layers, {_count(before)} → {_count(after)} parameters"
    return text, {"parameters": after}


def check_run_directory(context: Context) -> Result:
    """The size of the checkpoints, and whether an existing run has the same settings."""
    config = context.train
    if not config.run:
        raise UsageError("run is not set: --train.run FOLDER")
    import jax

    from tli_jax.training.memory import total_bytes

    trainer = require(context.trainer, "a mesh")
    params = trainer.abstract_params(context.stored_dtype)
    frozen = sum(total_bytes(params[spec.name]) for spec in trainer.param_specs if not spec.trains)
    step = sum(map(total_bytes, jax.tree.leaves(trainer.abstract_state())))
    kept = config.keep + 1  # the oldest is deleted after the next is complete
    nbytes = frozen + kept * step
    run = RunDirectory(config.run)
    if run.remote is None:
        context.writes.append(("checkpoints", run.path, nbytes))
    if config.export:
        export = trainer.model.num_params * np.dtype(trainer.model.dtype).itemsize
        context.writes.append(("export", Path(config.export), export))
    text = f"checkpoints {decimal(nbytes)}: frozen parameters {decimal(frozen)} once, {kept} steps × {decimal(step)}"
    if run.is_begun:
        run.check_config(config)
        text += f"; {run} exists and would be resumed"
    return text, {"frozen_bytes": frozen, "step_bytes": step, "checkpoint_bytes": nbytes}


def check_data(context: Context) -> Result:
    from tli_jax.data.stream import estimate_tokens
    from tli_jax.data.tokenization import Rules

    trainer, base, config = require(context.trainer, "a mesh"), require(context.base, "a model"), context.train
    if not config.text:
        raise UsageError("text is not set: files or folders to train on, or 'embedded'")
    if all(source.path == hub.EMBEDDED for source in config.text):
        return "the text that comes with the package", {}
    paths = [Path(source.path) for source in (*config.text, *config.validation_text) if source.path != hub.EMBEDDED]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise NotCheckedError(f"{', '.join(missing)}: not here")
    folder, parse = context.base_folder, config.special_tokens == "parse"
    tokenizer = open_tokenizer(folder, base.config, parse)[0] if folder is not None else None
    if tokenizer is None and any(path.suffix != ".npy" for path in paths):
        raise NotCheckedError("the text is here, but a tokenizer is not")
    digest = "" if folder is None else tokenizer_digest(folder)
    rules = Rules.of_model(config, trainer.model, tokenizer, digest)
    counts = [estimate_tokens(path, rules, _SAMPLE) for path in paths]
    total, needed = sum(counts), config.steps * config.batch_size * context.T
    if min(counts) <= context.T:
        raise UsageError(f"data: a text has fewer tokens than one window ({context.T + 1:,}): provide more text")
    text = f"about {total:,} tokens, estimated from the start of each text; all steps read {needed:,}"
    return text, {"tokens": total, "tokens_read": needed}


def check_disk(context: Context) -> Result:
    """Everything written to one disk must fit on it together."""
    if not context.writes:
        raise NotCheckedError("needs the sizes of the files")
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for name, path, nbytes in context.writes:
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        disks.setdefault(existing.stat().st_dev, []).append((name, existing, nbytes))
    texts, facts = [], []
    for writes in disks.values():
        needed, free = sum(nbytes for *_, nbytes in writes), shutil.disk_usage(writes[0][1]).free
        terms = " + ".join(f"{name} {decimal(nbytes)}" for name, _, nbytes in writes)
        texts.append(f"{terms} = {decimal(needed)}, {decimal(free)} free at {writes[0][1]}")
        facts.append({"needed": needed, "free": free, "at": str(writes[0][1])})
        if needed > free and context.base_folder is None:
            raise NotCheckedError(f"{texts[-1]}; but the model is not here, so it will be grown elsewhere")
        if needed > free:
            raise UsageError(
                f"disk: {texts[-1]}: free space, keep fewer checkpoints (--train.keep), or use another disk"
            )
    return "; ".join(texts), {"disks": facts}


def _from_shape(config: LlamaConfig) -> Checkpoint:
    """A checkpoint of which only the headers exist."""
    dtype, nowhere = np.dtype(config.dtype), Path(os.devnull)
    tensors = {
        name: Tensor(name, nowhere, CODES[dtype], dims, 0, int(np.prod(dims)) * dtype.itemsize)
        for name, dims in expected_shapes(config).items()
    }
    return Checkpoint(nowhere, config, tensors)


def _describe(config: LlamaConfig) -> str:
    return f"{config.num_hidden_layers} layers, {_count(config.num_params)} parameters, {config.dtype}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"
