"""The command ``evaluate``: a model's loss on texts and its accuracy on tasks."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tli_jax
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.data.embedded import embedded_text
from tli_jax.errors import UsageError
from tli_jax.evaluate import main
from tli_jax.evaluation.evaluate import evaluate_model
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import open_tokenizer

FLAGS = ["--model", "embedded", "--dtypes", "compute=float32"]


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(embedded_text()[:6000], encoding="utf-8")
    return file


@pytest.fixture
def task(tmp_path) -> Path:
    file = tmp_path / "next.jsonl"
    rows = [{"context": "import", "choices": ["os", "fhqwhgads"], "answer": 0}]
    rows.append({"context": "for i in", "choices": ["range(10):", "+ + +"], "answer": 0})
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_loss_equals_that_of_the_windows(text, capsys) -> None:
    assert run_command(main, [*FLAGS, "--text", str(text), "--sequence-length", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["texts"][str(text)]
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    tokenizer, _ = open_tokenizer(hub.resolve("embedded"), config)
    ids = np.array([config.bos_token_id, *tokenizer.encode(text.read_text(encoding="utf-8"))])
    count = (len(ids) - 1) // 64
    rows = np.stack([ids[i * 64 : i * 64 + 65] for i in range(count)])
    loss = float(tli_jax.losses(config, params, rows).mean())
    assert found["tokens"] == 64 * count
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    nbytes = len(tokenizer.decode(ids[1 : 64 * count + 1].tolist()).encode())
    assert found["bits_per_byte"] == pytest.approx(loss * 64 * count / math.log(2) / nbytes, rel=1e-5)


@pytest.mark.parametrize("isolate", [True, False])
def test_text_shorter_than_a_window_has_the_loss_of_the_text_alone(tmp_path, isolate) -> None:
    file = tmp_path / "short.txt"
    text = "def main():\n    return 1\n"
    file.write_text(text, encoding="utf-8")
    result = evaluate_model("embedded", texts=[file], dtypes={"compute": "float32"}, isolate=isolate)["texts"]
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    tokenizer, _ = open_tokenizer(hub.resolve("embedded"), config)
    ids = [config.bos_token_id, *tokenizer.encode(text), config.eos_token_ids[0]]
    losses = np.asarray(tli_jax.losses(config, params, np.array([ids])))
    assert list(result) == [str(file)]
    assert result[str(file)]["tokens"] == losses.size == len(ids) - 1
    assert result[str(file)]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    nats = losses.sum()
    assert result[str(file)]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_short_text_of_many_documents_has_the_loss_of_each_alone(tmp_path) -> None:
    """Documents of one window do not see each other, nor the padding after them."""
    file = tmp_path / "short.jsonl"
    texts = ["import os", "for i in range(10):\n    print(i)", "x"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    result = evaluate_model("embedded", texts=[file], dtypes={"compute": "float32"}, sequence_length=128)
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    tokenizer, _ = open_tokenizer(hub.resolve("embedded"), config)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [config.bos_token_id, *tokenizer.encode(text), config.eos_token_ids[0]]
        padded = np.array([ids + [0] * (64 - len(ids))])  # one length, to compile once
        nats += float(np.asarray(tli_jax.losses(config, params, padded))[0, : len(ids) - 1].sum())
        tokens += len(ids) - 1
    assert result["texts"][str(file)]["tokens"] == tokens
    assert result["texts"][str(file)]["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_limit_evaluates_the_first_windows_and_questions(text, task, capsys) -> None:
    sources = ["--text", str(text), "--tasks", str(task), "--sequence-length", "64", "--json"]
    assert run_command(main, [*FLAGS, *sources, "--limit", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["limit"] == 1
    assert result["tasks"]["next"]["questions"] == 1
    config, params = tli_jax.load_hf("embedded", dtype="float32")
    tokenizer, _ = open_tokenizer(hub.resolve("embedded"), config)
    ids = np.array([[config.bos_token_id, *tokenizer.encode(text.read_text(encoding="utf-8"))][:65]])
    metrics = result["texts"][str(text)]
    assert metrics["tokens"] == 64
    assert metrics["loss"] == pytest.approx(float(tli_jax.losses(config, params, ids).mean()), rel=1e-5)
    nbytes = len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] * 64 / math.log(2) / nbytes, rel=1e-5)


def test_wrong_options_of_evaluate_model_are_refused() -> None:
    for options, message in (({"limit": 0}, "limit is 0"), ({"batchsize": 8}, "'batchsize' is not known")):
        with pytest.raises(UsageError, match=message):
            evaluate_model("embedded", tasks=["embedded"], **options)


def test_embedded_text_is_named_as_given() -> None:
    result = evaluate_model("embedded", texts=["embedded"], limit=1, sequence_length=32)
    assert list(result["texts"]) == ["embedded"] and result["texts"]["embedded"]["tokens"] <= 32


def test_tables_of_texts_and_tasks(text, task, capsys) -> None:
    assert run_command(main, ["--model", "embedded", "--text", str(text), "--tasks", str(task)]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "macro F1" in shown
    line = next(line.split() for line in shown.splitlines() if "next" in line)
    assert line[:3] == ["next", "2", "1.0000"]


def test_exactly_grown_model_scores_as_its_base(task, tmp_path, capsys) -> None:
    from tli_jax import upscale

    output = tmp_path / "grown"
    assert (
        run_command(upscale.main, ["--model", "embedded", "--output", str(output), "--every", "4", "--no-proof"]) == 0
    )
    capsys.readouterr()
    found = []
    for model in ("embedded", str(output)):
        assert run_command(main, ["--model", model, "--tasks", str(task), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tasks"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "model is not set"),
        (["--model", "embedded"], 2, "neither text nor tasks is set"),
        (["--model", "nowhere/at/all", "--tasks", "embedded"], 66, "nowhere"),
        (["--model", "embedded", "--tasks", "nowhere"], 66, "nowhere"),
        (["--model", "embedded", "--tasks", "embedded", "--shots", "2"], 2, "shots is 2"),
        (["--model", "embedded", "--task", "embedded"], 2, "did you mean --tasks?"),
        (["--model", "embedded", "--learning-rate", "1"], 2, "--learning-rate is not known"),
    ],
)
def test_wrong_options_are_refused(capsys, flags, code, message) -> None:
    assert run_command(main, flags) == code
    assert message in capsys.readouterr().err


def test_run_directory_is_refused(start, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    flags = ["--model", str(start / "base"), "--text", str(start / "ids.npy"), "--run", str(run), "--steps", "1"]
    assert run_command(train.main, [*flags, "--sequence-length", "16"]) == 0
    assert run_command(main, ["--model", str(run), "--text", str(start / "ids.npy")]) == 2
    assert f"--run {run} --export-only" in capsys.readouterr().err


def test_tasks_without_a_tokenizer_are_refused(start, task, capsys) -> None:
    assert open_checkpoint(start / "base").config.vocab_size == 64
    assert run_command(main, ["--model", str(start / "base"), "--tasks", str(task)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.all_cores
def test_two_processes_give_the_same_result(text, task, capsys) -> None:
    """In float32. In bfloat16, rounding depends on how a batch is sharded."""
    flags = [
        *FLAGS,
        "--text",
        str(text),
        "--tasks",
        str(task),
        "--json",
        "--sequence-length",
        "64",
        "--batch-size",
        "16",
    ]
    assert run_command(main, flags) == 0
    alone = json.loads(capsys.readouterr().out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    call = [sys.executable, "-W", "error", "-m", "tli_jax.evaluate", *flags]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen([*call, "--process", f"{i}/2@{where}"], stdout=subprocess.PIPE, env=environment)
        for i in range(2)
    ]
    outputs = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert outputs[1] == ""
    found = json.loads(outputs[0])  # and nothing else, though Gloo reports its connections on stdout
    assert found["tasks"] == alone["tasks"]
    assert found["texts"][str(text)]["loss"] == pytest.approx(alone["texts"][str(text)]["loss"], rel=1e-5)
