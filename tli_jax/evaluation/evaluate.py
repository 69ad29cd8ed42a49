"""A model's loss on texts and its accuracy on multiple-choice tasks."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.config import EvaluateConfig
from tli_jax.cli.console import say, warn
from tli_jax.cli.parse import from_values
from tli_jax.cli.progress import progress
from tli_jax.cli.train_config import Reading, TrainConfig
from tli_jax.data.embedded import topics
from tli_jax.errors import DataError, UsageError
from tli_jax.hf import hub, sidecar
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.tokenizer import open_tokenizer, tokenizer_digest
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.text import replace_embedded

if TYPE_CHECKING:
    from tli_jax.data.batches import Data
    from tli_jax.training.feed import Measured


def evaluate_model(
    model: Path | str,
    *,
    texts: Sequence[Path | str] = (),
    tasks: Sequence[Path | str] = (),
    limit: int | None = None,
    shots: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model's loss on texts and its accuracy on multiple-choice tasks.

    Args:
        model: a Hugging Face folder, a GGUF file, a hub id, or ``"embedded"``, the small base in the package.
        texts: files or folders to read, or ``"embedded"``. A text shorter than a window is evaluated in full.
        tasks: see ``tli_jax.evaluation.tasks.open_tasks``.
        limit: evaluate only the first windows of each text and the first questions of each task.
        shots: solved examples before each question.
        **options: any other key of ``EvaluateConfig``, such as ``batch_size``, ``sequence_length``, ``mesh`` or
            ``dtypes``. The default dtype is that of the weights.

    Returns:
        A dictionary that ``json.dumps`` accepts. ``texts`` has, for each text by the path given, ``loss`` in nats per
        token, ``perplexity``, ``bits_per_byte`` (if there is a tokenizer) and ``tokens``, the number of targets.
        ``tasks`` has, for each task by name, ``accuracy``, ``stderr``, ``accuracy_normalised``, ``f1`` and more. The
        settings and versions are recorded too.

    Raises:
        TliError: a wrong option, or an input that is missing, damaged or does not fit the model.

    Example:
        >>> result = tli_jax.evaluate_model("embedded", texts=["notes.txt"], tasks=["embedded"], limit=20)
        >>> result["texts"]["notes.txt"]["loss"]
        4.649
        >>> result["tasks"]["next_line"]["accuracy"]
        0.45
    """
    values = {"model": str(model), "text": list(map(str, texts)), "tasks": list(map(str, tasks))}
    values |= {"limit": limit, "shots": shots} | options
    return evaluate(from_values(EvaluateConfig, values, "evaluate_model"))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as configured. For the result see ``evaluate_model``.

    Raises:
        TliError: a wrong option, or input that is missing or damaged.
    """
    if not config.model:
        raise UsageError("model is not set: --model FOLDER, a hub id or 'embedded'")
    if RunDirectory(config.model).is_begun:
        export = f"tli-jax train --run {config.model} --export-only --export DIR"
        raise UsageError(f"model {config.model}: is a run directory: export it and evaluate the export: {export}")
    if not config.text and not config.tasks:
        raise UsageError("neither text nor tasks is set, so there is nothing to evaluate: --text FILE, --tasks FILE")
    from tli_jax.data.batches import open_evaluation_data
    from tli_jax.evaluation.scoring import score_tasks
    from tli_jax.evaluation.tasks import open_tasks
    from tli_jax.training.feed import Feed
    from tli_jax.training.state import load
    from tli_jax.training.trainer import make_trainer

    weights = open_checkpoint(hub.resolve(config.model, config.revision))
    tokenizer, warnings = open_tokenizer(weights.folder, weights.config, config.special_tokens == "parse")
    for warning in (*weights.warnings, *warnings):
        warn(warning)
    tasks = [dataclasses.replace(task, questions=task.questions[: config.limit]) for task in open_tasks(config.tasks)]
    if tasks and tokenizer is None:
        raise UsageError(f"tasks: {weights.folder} has no tokenizer to read them with")
    settings = _trainer_config(config, weights.config.dtype)
    trainer, T, notes = make_trainer(settings, weights.config, None)
    texts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        sources = replace_embedded(config.text, config.field, cache / "topics.jsonl", topics)
        paths = [Path(source.path) for source in sources]
        digest = tokenizer_digest(weights.folder)
        data = open_evaluation_data(paths, config, weights.config, tokenizer, digest, T, cache, config.limit)
        if data and data[0].T < T:  # all texts are shorter than a window
            settings = dataclasses.replace(settings, sequence_length=data[0].T)
            trainer, T, notes = make_trainer(settings, weights.config, None)
        for note in notes:
            say(note)
        arrays = load(trainer, weights)
        for source, text in zip(config.text, data, strict=True):
            for note in text.notes:
                say(note)
            batches = math.ceil(text.validation_windows / config.batch_size)
            with progress(f"evaluate {Path(source.path).name}", batches, "batches") as advance:
                measured = Feed(trainer, text).measure(*arrays, batches, advance)
            texts[source.path] = _text_metrics(source.path, measured, text, tokenizer)
    scores = {}
    if tasks:
        assert tokenizer is not None
        scores = score_tasks(trainer, arrays, tokenizer, tasks, config.shots, config.seed)
    return {
        "version": 1,
        "model": config.model,
        "dtype": trainer.config.compute_dtype,
        "attention": trainer.kernel,
        "sequence_length": T,
        "limit": config.limit,
        "shots": config.shots,
        "seed": config.seed,
        "texts": texts,
        "tasks": scores,
        "versions": sidecar.versions("tli_jax", "jax"),
    }


def _trainer_config(config: EvaluateConfig, dtype: str) -> TrainConfig:
    """The configuration of a validation in the dtype of the weights, with float16 widened."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Reading)}
    dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    values["dtypes"] = {"param": dtype, "compute": dtype} | config.dtypes
    return TrainConfig(**values)


def _text_metrics(path: str, measured: "Measured", data: "Data", tokenizer: Tokenizer | None) -> dict[str, Any]:
    loss = measured.loss
    if loss is None:
        raise DataError(f"{path}: has no token to predict, because every document is one token long: give more text")
    metrics: dict[str, Any] = {"tokens": measured.tokens, "loss": loss, "perplexity": math.exp(min(loss, 700))}
    if tokenizer is not None:
        nbytes = sum(len(tokenizer.decode(windows.targets().tolist()).encode()) for windows in data.held_out)
        if nbytes:  # zero if all tokens are special
            metrics["bits_per_byte"] = measured.nats / math.log(2) / nbytes
    return metrics
