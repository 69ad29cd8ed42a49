"""Log-likelihoods of choices, and the figures that follow from them, as lm-evaluation-harness defines them.

The score of a choice is the sum of the log-probabilities of its tokens: those of context, space and choice encoded
together, after as many as the context alone has. White space at the end of the context counts to the choice. Where
there is no context, BOS stands for it, or EOS in a model without BOS, and all tokens of the choice are scored. An input
longer than the model's context loses its left end.
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
from tli_jax.hf.tokens import Tokenizer
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.training.freezing import Arrays
from tli_jax.training.trainer import Trainer

_SHORTEST = 32  # tokens of the shortest program


class Row(NamedTuple):
    """Ids of one context with one choice, the last ``scored`` of which are the choice's."""

    ids: list[int]
    scored: int


class Inputs(NamedTuple):
    """What a model is to be run on for a task.

    Attributes:
        rows: all choices of all questions, one after the other.
        truncated: how many of them have lost their left end.
        tied: questions with choices that are the same tokens, which no model can tell apart.
    """

    rows: list[Row]
    truncated: int
    tied: int


def encode(tokenizer: Tokenizer, task: Task, shots: int, seed: int, model: LlamaConfig) -> Inputs:
    """The inputs of a task.

    Args:
        shots, seed: see ``Task.prompt``.

    Raises:
        DataError: a choice has no tokens, or more than the model's context; there is no context, and no token to stand
            for it; the tokenizer gives ids that the model does not have.
        UsageError: see ``Task.prompt``.
    """
    prompts = [task.prompt(number, shots, seed) for number in range(len(task.questions))]
    of_contexts = tokenizer.encode_batch([prompt.rstrip() for prompt in prompts])
    wholes = [
        f"{prompt} {choice}" for prompt, one in zip(prompts, task.questions, strict=True) for choice in one.choices
    ]
    of_wholes = iter(tokenizer.encode_batch(wholes))
    limit = model.max_position_embeddings
    rows: list[Row] = []
    truncated = tied = 0
    for number, (question, prompt, context) in enumerate(zip(task.questions, prompts, of_contexts, strict=True), 1):
        where = f"{task.name}: question {number}"
        if prompt.strip() and (context or tokenizer.prefix):
            front = tokenizer.prefix
        else:
            front, context = [_stand_in(model, where)], []
        own = []
        for _ in question.choices:
            ids = front + next(of_wholes)
            scored = len(ids) - len(front) - len(context)
            if not 0 < scored <= limit:
                raise DataError(f"{where}: a choice of {scored:,} tokens, must be 1 to {limit:,}, the model's context")
            if max(ids) >= model.vocab_size:
                raise DataError(f"{where}: has token id {max(ids):,}, the model's vocabulary {model.vocab_size:,} ids")
            truncated += len(ids) > limit + 1
            own.append(Row(ids[-limit - 1 :], scored))
        tied += len({tuple(row.ids) for row in own}) < len(own)
        rows += own
    return Inputs(rows, truncated, tied)


def _stand_in(model: LlamaConfig, where: str) -> int:
    """The token that a choice follows where there is no context."""
    tokens = [one for one in (model.bos_token_id, *model.eos_token_ids) if one is not None]
    if not tokens:
        raise DataError(f"{where}: no context, and the model has neither bos_token_id nor eos_token_id to stand for it")
    return tokens[0]


def score(
    trainer: Trainer, arrays: tuple[Arrays, Arrays], task: Task, rows: Sequence[Row], advance: Advance
) -> list[np.ndarray]:
    """Log-likelihood of every choice, nats, fp64: for each question an array ``[choices]``.

    Args:
        trainer: runs one of its batches at a time, on its mesh.
        arrays: the trainable and the frozen ones, as the trainer lays them out.
        advance: progress callback, in questions.

    Raises:
        DataError: the model gives NaN or infinity.
    """
    B = trainer.config.batch_size // trainer.config.grad_accum_steps
    sharding = batch_sharding(trainer.mesh, ("B", "T"))
    found = np.zeros(len(rows))
    done = 0.0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(rows), B):
        part = order[first : first + B]
        longest = len(rows[part[-1]].ids) - 1
        T = min(max(_SHORTEST, 1 << (longest - 1).bit_length()), trainer.model.max_position_embeddings)
        tokens = np.full((B, T + 1), -1, np.int32)
        for place, i in enumerate(part):
            tokens[place, : len(rows[i].ids)] = rows[i].ids
        tokens = jax.make_array_from_callback(tokens.shape, sharding, lambda index, tokens=tokens: tokens[index])
        losses = np.asarray(trainer.token_losses(*arrays, tokens), np.float64)
        for place, i in enumerate(part):
            end = len(rows[i].ids) - 1
            found[i] = -losses[place, end - rows[i].scored : end].sum()
        before, done = done, (first + len(part)) / len(rows) * len(task.questions)
        advance(int(done) - int(before))
    ends = np.cumsum([len(question.choices) for question in task.questions])
    of_questions = np.split(found, ends[:-1])
    for number, one in enumerate(of_questions, 1):
        if not np.isfinite(one).all():
            wrong = ", ".join(str(value) for value in one[~np.isfinite(one)][:3])
            raise DataError(
                f"{task.name}: question {number}: log-likelihood {wrong}: the model's weights hold NaN or infinity, or"
                " overflow in this dtype"
            )
    return of_questions


def summarise(task: Task, scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """The figures of a task.

    Returns:
        ``accuracy``, of the highest score, with its standard error ``stderr``; ``accuracy_normalised``, of the highest
        score for each character of the choice; ``f1``, the mean over answers (macro); ``right``, a digit a question, 1
        where the highest score is the answer's.
    """
    answers = np.array([question.answer for question in task.questions])
    picked = np.array([int(np.argmax(one)) for one in scores])
    lengths = [[len(choice) for choice in question.choices] for question in task.questions]
    of_length = np.array([int(np.argmax(one / n)) for one, n in zip(scores, lengths, strict=True)])
    right = picked == answers
    n = len(answers)
    return {
        "questions": n,
        "accuracy": float(right.mean()),
        "stderr": float(right.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "accuracy_normalised": float((of_length == answers).mean()),
        "f1": _macro_f1(answers, picked),
        "right": "".join(str(int(one)) for one in right),
    }


def _macro_f1(answers: np.ndarray, picked: np.ndarray) -> float:
    """Mean of F1 over all that is an answer or was picked."""
    found = []
    for label in np.union1d(answers, picked):
        hits = int(((answers == label) & (picked == label)).sum())
        found.append(2 * hits / int((answers == label).sum() + (picked == label).sum()))
    return float(np.mean(found))


def evaluate(
    trainer: Trainer,
    arrays: tuple[Arrays, Arrays],
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    shots: int = 0,
    seed: int = 0,
) -> dict[str, Mapping[str, Any]]:
    """For each task, by name, what ``summarise`` returns, and ``truncated`` and ``tied`` of ``Inputs``.

    Raises:
        DataError: see ``encode`` and ``score``.
        UsageError: see ``Task.prompt``.
    """
    trainer = dataclasses.replace(
        trainer, attention_impl=causal
    )  # lengths are too many for kernels that want certain ones
    inputs = [encode(tokenizer, task, shots, seed, trainer.model) for task in tasks]
    found = {}
    for task, one in zip(tasks, inputs, strict=True):
        if one.truncated:
            what = f"{one.truncated:,} of {len(one.rows):,} inputs exceed the model's context"
            warn(f"{task.name}: {what} of {trainer.model.max_position_embeddings:,} tokens and lose their left end")
        if one.tied:
            what = f"{one.tied:,} of {len(task.questions):,} questions"
            warn(
                f"{task.name}: choices of {what} are the same tokens to this tokenizer; the first one counts as picked"
            )
    with progress("score", sum(len(task.questions) for task in tasks), "questions") as advance:
        for task, one in zip(tasks, inputs, strict=True):
            scores = score(trainer, arrays, task, one.rows, advance)
            found[task.name] = summarise(task, scores) | {"truncated": one.truncated, "tied": one.tied}
    return found
