"""Log-likelihoods of choices and the metrics of a task, as lm-evaluation-harness defines them.

The score of a choice is the sum of the log-probabilities of its tokens. Context, space and choice are encoded together;
as many tokens as the context alone has belong to the context, without white space at its end. BOS replaces an empty
context, or EOS in a model without BOS, and all tokens of the choice are scored. An input longer than the model's
context is truncated on the left.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tli_jax.cli.console import warn
from tli_jax.cli.progress import Advance, progress
from tli_jax.distributed.mesh import batch_sharding
from tli_jax.errors import DataError
from tli_jax.evaluation.tasks import Task
from tli_jax.hf.encoding import Tokenizer
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.training.freezing import Arrays
from tli_jax.training.trainer import Trainer

_MIN_LENGTH = 32  # tokens of the shortest program


class Row(NamedTuple):
    """Ids of a context with one choice. The last ``scored`` of them belong to the choice."""

    ids: list[int]
    scored: int


class Inputs(NamedTuple):
    """The model inputs of a task.

    Attributes:
        rows: all choices of all questions, in order.
        truncated: number of rows that lost their left end.
        tied: number of questions with choices that have the same tokens, which no model can tell apart.
    """

    rows: list[Row]
    truncated: int
    tied: int


def encode(tokenizer: Tokenizer, task: Task, shots: int, seed: int, model: LlamaConfig) -> Inputs:
    """Encode the questions of a task. For ``shots`` and ``seed`` see ``Task.prompt``.

    Raises:
        DataError: a choice is empty or longer than the model's context, nothing can replace an empty context, or ids
            are outside the model's vocabulary.
        UsageError: see ``Task.prompt``.
    """
    prompts = [task.prompt(number, shots, seed) for number in range(len(task.questions))]
    contexts = tokenizer.encode_batch([prompt.rstrip() for prompt in prompts])
    texts = [f"{prompt} {choice}" for prompt, q in zip(prompts, task.questions, strict=True) for choice in q.choices]
    encoded = iter(tokenizer.encode_batch(texts))
    limit = model.max_position_embeddings
    rows: list[Row] = []
    truncated = tied = 0
    for number, (question, prompt, context) in enumerate(zip(task.questions, prompts, contexts, strict=True), 1):
        where = f"{task.name}: question {number}"
        prefix = tokenizer.prefix
        if not prompt.strip() or not (context or prefix):
            start = next((i for i in (model.bos_token_id, *model.eos_token_ids) if i is not None), None)
            if start is None:
                raise DataError(f"{where}: no context, and the model has no bos_token_id or eos_token_id to replace it")
            prefix, context = [start], []
        choices = []
        for _ in question.choices:
            ids = prefix + next(encoded)
            scored = len(ids) - len(prefix) - len(context)
            if not 0 < scored <= limit:
                raise DataError(f"{where}: a choice of {scored:,} tokens, must be 1 to {limit:,}, the model's context")
            if max(ids) >= model.vocab_size:
                raise DataError(f"{where}: token id {max(ids):,} is outside the vocabulary of {model.vocab_size:,}")
            truncated += len(ids) > limit + 1
            choices.append(Row(ids[-limit - 1 :], scored))
        tied += len({tuple(row.ids) for row in choices}) < len(choices)
        rows += choices
    return Inputs(rows, truncated, tied)


def log_likelihoods(
    trainer: Trainer, arrays: tuple[Arrays, Arrays], task: Task, rows: Sequence[Row], advance: Advance
) -> list[np.ndarray]:
    """Log-likelihood of every choice in nats: for each question an fp64 array ``[choices]``.

    Args:
        trainer: runs one microbatch at a time on its mesh.
        arrays: trainable and frozen parameters, laid out for the trainer.
        advance: progress callback, in questions.

    Raises:
        DataError: a log-likelihood is not finite.
    """
    B = trainer.config.batch_size // trainer.config.grad_accum_steps
    sharding = batch_sharding(trainer.mesh, ("B", "T"))
    scores = np.zeros(len(rows))
    done = 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(rows), B):
        batch = order[first : first + B]
        longest = len(rows[batch[-1]].ids) - 1
        T = min(max(_MIN_LENGTH, 1 << (longest - 1).bit_length()), trainer.model.max_position_embeddings)
        tokens = np.full((B, T + 1), -1, np.int32)
        for b, i in enumerate(batch):
            tokens[b, : len(rows[i].ids)] = rows[i].ids
        tokens = jax.make_array_from_callback(tokens.shape, sharding, lambda index, tokens=tokens: tokens[index])
        losses = np.asarray(trainer.token_losses(*arrays, tokens), np.float64)
        for b, i in enumerate(batch):
            end = len(rows[i].ids) - 1
            scores[i] = -losses[b, end - rows[i].scored : end].sum()
        before, done = done, (first + len(batch)) * len(task.questions) // len(rows)
        advance(done - before)
    ends = np.cumsum([len(question.choices) for question in task.questions])
    per_question = np.split(scores, ends[:-1])
    for number, choices in enumerate(per_question, 1):
        if not np.isfinite(choices).all():
            wrong = ", ".join(str(value) for value in choices[~np.isfinite(choices)][:3])
            raise DataError(
                f"{task.name}: question {number}: log-likelihood {wrong}: the weights contain NaN or infinity, or"
                " overflow in this dtype"
            )
    return per_question


def compute_metrics(task: Task, scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """Metrics of a task from the log-likelihoods of its choices.

    Returns:
        ``accuracy`` of the highest score, a fraction, with its standard error ``stderr``; ``accuracy_normalised``, of
        the highest score per character of the choice; ``f1``, macro-averaged over answers; ``right``, a string with
        a 1 for each question answered right and a 0 for each other.
    """
    answers = np.array([question.answer for question in task.questions])
    picked = np.array([int(np.argmax(choices)) for choices in scores])
    lengths = [[len(choice) for choice in question.choices] for question in task.questions]
    normalised = np.array([int(np.argmax(choices / n)) for choices, n in zip(scores, lengths, strict=True)])
    right = picked == answers
    n = len(answers)
    f1 = []
    for label in np.union1d(answers, picked):
        hits = int(((answers == label) & (picked == label)).sum())
        f1.append(2 * hits / int((answers == label).sum() + (picked == label).sum()))
    return {
        "questions": n,
        "accuracy": float(right.mean()),
        "stderr": float(right.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "accuracy_normalised": float((normalised == answers).mean()),
        "f1": float(np.mean(f1)),
        "right": "".join(str(int(is_right)) for is_right in right),
    }


def score_tasks(
    trainer: Trainer,
    arrays: tuple[Arrays, Arrays],
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    shots: int = 0,
    seed: int = 0,
) -> dict[str, Mapping[str, Any]]:
    """For each task, by name, the result of ``compute_metrics`` with ``truncated`` and ``tied`` of ``Inputs``.

    Raises:
        DataError: see ``encode`` and ``log_likelihoods``.
        UsageError: see ``Task.prompt``.
    """
    # Other attention kernels accept only certain lengths.
    trainer = dataclasses.replace(trainer, attention_impl=causal)
    inputs = [encode(tokenizer, task, shots, seed, trainer.model) for task in tasks]
    for task, encoded in zip(tasks, inputs, strict=True):
        if encoded.truncated:
            what = f"{encoded.truncated:,} of {len(encoded.rows):,} inputs are longer than the model's context"
            warn(f"{task.name}: {what} ({trainer.model.max_position_embeddings:,} tokens): truncated on the left")
        if encoded.tied:
            what = f"{encoded.tied:,} of {len(task.questions):,} questions have choices with the same tokens"
            warn(f"{task.name}: {what}: the first of them counts as picked")
    results = {}
    with progress("score", sum(len(task.questions) for task in tasks), "questions") as advance:
        for task, encoded in zip(tasks, inputs, strict=True):
            scores = log_likelihoods(trainer, arrays, task, encoded.rows, advance)
            results[task.name] = compute_metrics(task, scores) | {"truncated": encoded.truncated, "tied": encoded.tied}
    return results
