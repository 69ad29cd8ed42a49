"""The command that measures a model: its loss on texts, its answers to tasks."""

import json
import math
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
from tli_jax.evaluate import main
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


def test_loss_is_that_of_the_windows(text, capsys) -> None:
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


def test_tables(text, task, capsys) -> None:
    """Both kinds at once, in the dtype of the weights; an exact growth gives the same in any."""
    assert run_command(main, ["--model", "embedded", "--text", str(text), "--tasks", str(task)]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "macro F1" in shown
    line = next(line.split() for line in shown.splitlines() if "next" in line)
    assert line[:3] == ["next", "2", "1.0000"]


def test_grown_model_does_as_its_base(task, tmp_path, capsys) -> None:
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
        (["--model", "embedded", "--task", "embedded"], 2, "is --tasks meant?"),
        (["--model", "embedded", "--learning-rate", "1"], 2, "--learning-rate is not known"),
    ],
)
def test_refused(capsys, flags, code, message) -> None:
    assert run_command(main, flags) == code
    assert message in capsys.readouterr().err


def test_run_is_to_be_exported_first(start, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    flags = ["--model", str(start / "base"), "--text", str(start / "ids.npy"), "--run", str(run), "--steps", "1"]
    assert run_command(train.main, [*flags, "--sequence-length", "16"]) == 0
    assert run_command(main, ["--model", str(run), "--text", str(start / "ids.npy")]) == 2
    assert f"--run {run} --export-only" in capsys.readouterr().err


def test_tasks_without_a_tokenizer_are_refused(start, task, capsys) -> None:
    assert open_checkpoint(start / "base").config.vocab_size == 64
    assert run_command(main, ["--model", str(start / "base"), "--tasks", str(task)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_two_processes_find_the_same(text, task, capsys) -> None:
    """In float32: in bfloat16 what a device has of a batch decides how it is rounded."""
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
    started = [subprocess.Popen([*call, "--process", f"{i}/2@{where}"], stdout=subprocess.PIPE) for i in range(2)]
    said = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "{" not in said[1]
    found, _ = json.JSONDecoder().raw_decode(said[0], said[0].index("{"))  # around it Gloo tells who connected
    assert found["tasks"] == alone["tasks"]
    assert found["texts"][str(text)]["loss"] == pytest.approx(alone["texts"][str(text)]["loss"], rel=1e-5)
