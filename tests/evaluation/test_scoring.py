"""Scores of choices against a plain softmax and lm-evaluation-harness, and the metrics computed from them."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tli_jax
from tli_jax.cli.train_config import TrainConfig
from tli_jax.errors import DataError
from tli_jax.evaluation.scoring import compute_metrics, encode, log_likelihoods, score_tasks
from tli_jax.evaluation.tasks import Question, Task, open_tasks
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.hub import resolve
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.training.state import load
from tli_jax.training.trainer import make_trainer

KOBEST = ("boolq", "copa", "hellaswag", "sentineg", "wic")


def measure(opened, task: Task, advance=lambda *_: None):
    """Zero-shot log-likelihoods of a task."""
    trainer, arrays, tokenizer = opened
    return log_likelihoods(trainer, arrays, task, encode(tokenizer, task, 0, 0, trainer.model).rows, advance)


def opened(folder: Path | str, **options):
    """Trainer, parameters and tokenizer of a model."""
    weights = open_checkpoint(Path(folder))
    config = TrainConfig(**{"dtypes": {"compute": "float32"}, "mesh": {"fsdp": 1, "data": -1}} | options)
    trainer, _, _ = make_trainer(config, weights.config, None)
    return trainer, load(trainer, weights), open_tokenizer(weights.folder, weights.config)[0]


@pytest.fixture(scope="module")
def embedded():
    return opened(resolve("embedded"))


def test_score_is_log_probability_of_the_choice(embedded) -> None:
    """Against a softmax in fp64, for contexts with spaces, an empty one, and choices of several lengths."""
    questions = (
        Question("import os\nimport", ("sys", "the quick brown fox"), 0),
        Question("def f(x):\n    return  ", ("x", "y + 1", "None"), 0),
        Question("", ("class", "zebra"), 0),
        Question("for i in range(10):\n" * 20, ("pass", "    print(i)"), 0),
    )
    _, _, tokenizer = embedded
    advances = []
    found = measure(embedded, Task("t", questions), lambda n, note="": advances.append(n))
    assert sum(advances) == len(questions)
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    for question, scores in zip(questions, found, strict=True):
        context = [0, *tokenizer.encode(question.context.rstrip())]
        for choice, ours in zip(question.choices, scores, strict=True):
            ids = [0, *tokenizer.encode(f"{question.context} {choice}")]
            logits = np.asarray(tli_jax.forward(config, params, jnp.array([ids]))[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            theirs = sum(log_p[i - 1, ids[i]] for i in range(len(context), len(ids)))
            assert ours == pytest.approx(theirs, abs=1e-3), (question, choice)


def test_long_context_is_truncated_on_the_left(embedded) -> None:
    trainer, _, tokenizer = embedded
    limit = trainer.model.max_position_embeddings
    long = "a = 1\n" * limit
    ids = tokenizer.encode(f"{long} b = 2")
    choice = ids[len(tokenizer.encode(long.rstrip())) :]
    task = Task("t", (Question(long, ("b = 2", "c"), 0), Question("a", ("b", "c"), 0)))
    assert encode(tokenizer, task, 0, 0, trainer.model).truncated == 2
    found, _ = measure(embedded, task)
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    window = jnp.array([ids[-limit - 1 :]])
    expected = -float(tli_jax.losses(config, params, window)[0, -len(choice) :].sum())
    assert found[0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(DataError, match="question 1: a choice of"):
        measure(embedded, Task("t", (Question("a", (long, "b"), 0),)))


def changed(folder: Path, config=None, tokenizer=None, weights=None) -> Path:
    """Copies the embedded model, with changed values in its files."""
    shutil.copytree(resolve("embedded"), folder)
    for name, values in (("config.json", config), ("tokenizer.json", tokenizer)):
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(raw | (values or {})), encoding="utf-8")
    if weights is not None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[weights] = np.full_like(tensors[weights], np.nan)
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("config", [{}, {"bos_token_id": None, "eos_token_id": [5, 7]}])
def test_empty_context_is_replaced_by_bos_or_eos(tmp_path, config) -> None:
    """As in lm-evaluation-harness: prefix_token_id, then all of the choice. The tokenizer itself adds no prefix."""
    model = opened(changed(tmp_path / "m", config, {"post_processor": None}))
    assert model[2].prefix == []
    first = 5 if config else model[0].model.bos_token_id
    questions = (
        Question("", ("class", "zebra crossing"), 0),
        Question(" \n", ("class", "x"), 0),
        Question("a", ("b", "c"), 0),
    )
    found = measure(model, Task("t", questions))
    settings, params = tli_jax.load_hf("embedded", dtype="float32")
    for question, scores in zip(questions, found, strict=True):
        for choice, ours in zip(question.choices, scores, strict=True):
            ids, context = model[2].encode_batch([f"{question.context} {choice}", question.context.strip()])
            ids = ids if context else [first, *ids]
            padded = jnp.array([ids + [0] * (16 - len(ids))])  # one length, to compile once
            losses = np.asarray(tli_jax.losses(settings, params, padded), np.float64)[0, : len(ids) - 1]
            assert ours == pytest.approx(-losses[max(len(context), 1) - 1 :].sum(), abs=1e-3)


def test_empty_context_without_bos_and_eos_is_refused(tmp_path) -> None:
    model = opened(changed(tmp_path / "m", {"bos_token_id": None, "eos_token_id": None}, {"post_processor": None}))
    with pytest.raises(DataError, match="t: question 2: no context, and the model has no bos_token_id or eos_token_id"):
        measure(model, Task("t", (Question("a", ("b", "c"), 0), Question("", ("b", "c"), 0))))


def test_one_token_choices_equal_the_softmax(embedded) -> None:
    _, _, tokenizer = embedded
    texts = [tokenizer.decode([i]) for i in range(tokenizer.size)]
    choices = tuple(
        text[1:] for text in texts if text.startswith(" ") and text.strip() and len(tokenizer.encode(text)) == 1
    )
    (found,) = measure(embedded, Task("t", (Question("import", choices, 0),)))
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    ids = [config.bos_token_id, *tokenizer.encode("import")]
    logits = np.asarray(tli_jax.forward(config, params, jnp.array([ids]))[0, -1], np.float64)
    expected = logits[[tokenizer.encode(f" {one}")[0] for one in choices]] - np.logaddexp.reduce(logits)
    assert len(choices) > 50
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_nan_weights_are_refused(tmp_path, embedded) -> None:
    trainer, arrays, tokenizer = opened(changed(tmp_path / "m", weights="model.norm.weight"))
    task = Task("t", (Question("a", ("b", "c"), 0),))
    with pytest.raises(DataError, match=r"t: question 1: log-likelihood nan.*: the weights contain NaN"):
        score_tasks(trainer, arrays, tokenizer, [task])


def test_ids_outside_the_vocabulary_are_refused(embedded) -> None:
    trainer, _, tokenizer = embedded
    small = dataclasses.replace(trainer.model, vocab_size=300)
    task = Task("t", (Question("import os", ("import sys", "c"), 0),))
    with pytest.raises(DataError, match=r"t: question 1: token id [\d,]+ is outside the vocabulary of 300"):
        encode(tokenizer, task, 0, 0, small)


def test_truncated_and_tied_inputs_are_reported(embedded, capsys) -> None:
    trainer, arrays, tokenizer = embedded
    long = "a = 1\n" * trainer.model.max_position_embeddings
    task = Task("t", (Question(long, ("b", "c"), 0), Question("a", ("b", "b", "c"), 0)))
    found = score_tasks(trainer, arrays, tokenizer, [task])["t"]
    assert found["truncated"] == 2 and found["tied"] == 1
    shown = capsys.readouterr().err
    assert "t: 2 of 5 inputs are longer than the model's context (" in shown
    assert "t: 1 of 2 questions have choices with the same tokens" in shown


def test_scores_are_the_same_on_a_mesh(embedded) -> None:
    (task,) = open_tasks(["embedded"])
    task = Task("few", task.questions[:12])
    one = measure(embedded, task)
    other = measure(opened(resolve("embedded"), mesh={"data": 2, "fsdp": 2, "tensor": 2}), task)
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), rtol=1e-5)


def test_embedded_base_knows_its_own_domain(embedded) -> None:
    """Its accuracy on held-out modules is far above that of guessing."""
    (task,) = open_tasks(["embedded"])
    task = Task("some", task.questions[:80])
    found = compute_metrics(task, measure(embedded, task))
    assert found["accuracy"] > 0.25 + 3 * found["stderr"]


def test_metrics_of_a_small_example() -> None:
    task = Task("t", tuple(Question("", ("aa", "b"), answer) for answer in (0, 0, 1, 1)))
    scores = [np.array(one) for one in ([-1.0, -2.0], [-3.0, -2.0], [-3.0, -2.0], [-1.0, -2.0])]
    found = compute_metrics(task, scores)
    assert found["right"] == "1010" and found["accuracy"] == 0.5
    assert found["stderr"] == pytest.approx(math.sqrt(1 / 3 / 4))
    # A character of the first choice costs half: -0.5, -1.5, -1.5, -0.5 against -2.
    assert found["accuracy_normalised"] == 0.5
    assert found["f1"] == pytest.approx(0.5)


def test_f1_averages_over_the_answers_that_occur() -> None:
    task = Task("t", tuple(Question("", ("a", "b", "c"), answer) for answer in (0, 0, 1)))
    always_first = [np.array([0.0, -1.0, -2.0])] * 3
    assert compute_metrics(task, always_first)["f1"] == pytest.approx((0.8 + 0.0) / 2)


@pytest.mark.parametrize("name", KOBEST)
def test_kobest_scores_equal_those_of_lm_eval(material, name) -> None:
    """Log-likelihoods of the first questions on stories260k."""
    (task,) = open_tasks([str(material / "kobest" / name)])
    with gzip.open(material / "kobest" / "lm_eval_reference" / f"kobest_{name}_local.jsonl.gz", "rt") as lines:
        expected = [json.loads(line) for line in itertools.islice(lines, 12)]
    task = Task(name, task.questions[:12])
    found = measure(opened(material / "stories260k"), task)
    for question, ours, theirs in zip(task.questions, found, expected, strict=True):
        assert theirs["ctx"] == question.context
        np.testing.assert_allclose(ours, theirs["ll"], rtol=2e-5, atol=2e-3)


@pytest.mark.long
def test_kobest_metrics_equal_those_of_lm_eval(material) -> None:
    """Every metric of the command, to the last digit."""
    call = [sys.executable, "-m", "tli_jax.evaluate", "--json", "--batch-size", "16"]
    call += ["--model", str(material / "stories260k"), "--tasks", str(material / "kobest")]
    environment = os.environ | {"XLA_FLAGS": ""}
    found = json.loads(subprocess.run(call, check=True, capture_output=True, env=environment).stdout)["tasks"]
    reference = material / "kobest" / "lm_eval_reference" / "results.json"
    expected = json.loads(reference.read_text(encoding="utf-8"))["results"]
    assert found.keys() == set(KOBEST)
    names = {"accuracy": "acc", "stderr": "acc_stderr", "f1": "f1", "accuracy_normalised": "acc_norm"}
    for name, figures in found.items():
        theirs = expected[f"kobest_{name}_local"]
        for ours, key in names.items():
            if f"{key},none" in theirs:
                assert figures[ours] == pytest.approx(theirs[f"{key},none"], rel=1e-9), (name, ours)
