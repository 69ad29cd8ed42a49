"""``python -m tli_jax.evaluate``: a model's loss on texts, and how it does on multiple-choice tasks."""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import EvaluateConfig, Reading, TrainConfig
from tli_jax.cli.console import say, warn
from tli_jax.cli.progress import progress
from tli_jax.errors import DataError, UsageError
from tli_jax.hf import hub, sidecar, tokens
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.text import open_text

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.feed import Measured

PROGRAM = "python -m tli_jax.evaluate"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure what is asked for.

    Returns:
        ``texts``, by path: ``loss`` in nats a token, its ``perplexity``, ``bits_per_byte`` and ``tokens``; ``tasks``,
        by name: see ``scoring.summarise``; and what was measured with which versions.

    Raises:
        TliError: a wrong option, or damaged input.
    """
    if not config.model:
        raise UsageError("model is not set: --model FOLDER, a hub id or 'embedded'")
    if RunDirectory(config.model).is_begun:
        export = f"python -m tli_jax.train --run {config.model} --export-only --export DIR"
        raise UsageError(f"model {config.model}: is a run: export it, and measure what that gives: {export}")
    if not config.text and not config.tasks:
        raise UsageError("neither text nor tasks is set, so there is nothing to measure: --text FILE, --tasks FILE")
    from tli_jax.evaluation import scoring
    from tli_jax.evaluation.tasks import open_tasks
    from tli_jax.training.feed import Feed
    from tli_jax.training.state import load
    from tli_jax.training.trainer import make_trainer

    weights = open_checkpoint(hub.resolve(config.model, config.revision))
    parse_special = config.special_tokens == "parse"
    tokenizer, warnings = tokens.open_tokenizer(weights.folder, weights.config, parse_special)
    for warning in (*weights.warnings, *warnings):
        warn(warning)
    tasks = open_tasks(config.tasks)
    if tasks and tokenizer is None:
        raise UsageError(f"tasks: {weights.folder} has no tokenizer to read them with")
    recipe = _recipe(config, weights.config.dtype)
    trainer, T, notes = make_trainer(recipe, weights.config, None)
    for note in notes:
        say(note)
    texts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        data = {
            source.path: open_text(
                dataclasses.replace(recipe, text=(source,), validation_text=(source,)),
                weights.config,
                weights.folder,
                tokenizer,
                T,
                Path(cache),
            )
            for source in config.text
        }
        arrays = load(trainer, weights)
        for path, one in data.items():
            for note in one.notes:
                say(note)
            batches = math.ceil(one.validation_windows / config.batch_size)
            with progress("read", batches, "batches") as advance:
                measured = Feed(trainer, one).measure(*arrays, batches, advance)
            texts[path] = _of_text(path, measured, one, tokenizer)
    scores = {}
    if tasks:
        assert tokenizer is not None
        scores = scoring.evaluate(trainer, arrays, tokenizer, tasks, config.shots, config.seed)
    return {
        "version": 1,
        "model": config.model,
        "dtype": recipe.compute_dtype,
        "sequence_length": T,
        "shots": config.shots,
        "seed": config.seed,
        "texts": texts,
        "tasks": scores,
        "versions": sidecar.versions("tli_jax", "jax"),
    }


def _recipe(config: EvaluateConfig, dtype: str) -> TrainConfig:
    """What training would validate with; by default in the dtype of the weights, float16 widened."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Reading)}
    one = "bfloat16" if dtype == "bfloat16" else "float32"
    values["dtypes"] = {"param": one, "compute": one} | config.dtypes
    return TrainConfig(**values)


def _of_text(path: str, measured: "Measured", data: "Data", tokenizer: tokens.Tokenizer | None) -> dict[str, Any]:
    loss = measured.loss
    if loss is None:
        raise DataError(f"{path}: has no token to predict: every document is one token long")
    found: dict[str, Any] = {"tokens": measured.tokens, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    if tokenizer is not None:
        nbytes = sum(len(tokenizer.decode(windows.targets().tolist()).encode()) for windows in data.held_out)
        if nbytes:  # none if all tokens are special
            found["bits_per_byte"] = measured.nats / math.log(2) / nbytes
    return found
