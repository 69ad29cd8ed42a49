"""How likely a model finds each choice, and what follows from that: as lm-evaluation-harness does it.

A choice's score is the sum of the log-probabilities of its tokens: those of context, space and choice together, less
as many as the context has alone. Spaces at the context's end count to the choice. Too long an input loses its left end.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tli_jax.checkpoint.tokens import Tokenizer
from tli_jax.command import Advance, progress
from tli_jax.errors import DataError
from tli_jax.evaluation.tasks import Task
from tli_jax.models.attention import causal
from tli_jax.parallel.mesh import batch_sharding
from tli_jax.training.freezing import Arrays
from tli_jax.training.step import Trainer

_SHORTEST = 32  # tokens of the shortest program


class _Row(NamedTuple):
    """Ids of an input with its last token, ``scored`` of which are the choice."""

    ids: list[int]
    scored: int


def score(
    trainer: Trainer,
    arrays: tuple[Arrays, Arrays],
    tokenizer: Tokenizer,
    task: Task,
    shots: int,
    seed: int,
    advance: Advance,
) -> list[np.ndarray]:
    """Log-likelihood of every choice, nats, fp64: for each question an array ``[choices]``.

    Args:
        trainer: its batch is run at a time, on its mesh.
        arrays: what trains and what does not, as the trainer lays them out.
        shots, seed: see ``Task.prompt``.
        advance: told of questions.

    Raises:
        DataError: a choice is longer than the model's context.
        UsageError: see ``Task.prompt``.
    """
    rows = _encode(tokenizer, task, shots, seed, trainer.model.max_position_embeddings)
    B = trainer.config.batch_size // trainer.config.accumulation
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
    return np.split(found, ends[:-1])


def _encode(tokenizer: Tokenizer, task: Task, shots: int, seed: int, limit: int) -> list[_Row]:
    """All choices of all questions, one after the other."""
    contexts, wholes = [], []
    for number, question in enumerate(task.questions):
        context = task.prompt(number, shots, seed)
        contexts.append(context.rstrip())
        wholes += [f"{context} {choice}" for choice in question.choices]
    of_contexts, of_wholes = tokenizer.encode_batch(contexts), iter(tokenizer.encode_batch(wholes))
    rows = []
    for number, (question, context) in enumerate(zip(task.questions, of_contexts, strict=True)):
        for _ in question.choices:
            ids = tokenizer.prefix + next(of_wholes)
            scored = len(ids) - max(len(tokenizer.prefix) + len(context), 1)
            if not 0 < scored <= limit:
                raise DataError(
                    f"{task.name}: question {number + 1}: a choice of {scored:,} tokens, must be 1 to {limit:,},"
                    " the model's context"
                )
            rows.append(_Row(ids[-limit - 1 :], scored))
    return rows


def summarise(task: Task, scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the scores of a task say.

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
    """By name what ``summarise`` says of each task; shows progress."""
    trainer = dataclasses.replace(trainer, kernel=causal)  # lengths are too many for kernels that want certain ones
    found = {}
    with progress("score", sum(len(task.questions) for task in tasks), "questions") as advance:
        for task in tasks:
            found[task.name] = summarise(task, score(trainer, arrays, tokenizer, task, shots, seed, advance))
    return found
