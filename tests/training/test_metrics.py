"""Metrics of a run: one line per step, also for TensorBoard and Weights & Biases; and their plots."""

import json
import os
import resource
import time
from pathlib import Path

import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.errors import DataError, StorageError, UsageError
from tli_jax.reporting.run import draw_curves, make_table, read_run, summarise
from tli_jax.training.metrics import Metrics, losses, read_metrics, validation
from tli_jax.training.run_directory import RunDirectory


def line(step: int) -> dict:
    return {"step": step, "loss": 3.0 / step, "tokens": 8 * step, "tokens_per_second": 100.0, "mfu": None, "skipped": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of ten steps, validated before training, in the middle and at the end."""
    metrics = Metrics(RunDirectory(tmp_path), TrainConfig(), 0, "id")
    for step in range(1, 11):
        before = {"validation_loss_before": 4.0} if step == 1 else {}
        metrics.write(line(step) | before | ({"validation_loss": 4.0 - step / 10} if step in (5, 10) else {}))
    metrics.close()
    return tmp_path


def test_lines_after_the_resumed_step_are_dropped(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while writing
    assert [entry["step"] for entry in read_metrics(RunDirectory(folder))] == list(range(1, 11))
    metrics = Metrics(RunDirectory(folder), TrainConfig(), 7, "id")
    metrics.write(line(8))
    metrics.close()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == list(range(1, 9))


def test_a_loss_from_before_the_last_step_is_not_that_after_training(folder):
    lines = read_metrics(RunDirectory(folder))
    assert losses(lines) == {"validation_before": 4.0, "validation_after": 3.0, "training": 0.3}
    assert losses(lines[:9])["validation_after"] is None  # step 5 has the newest validation
    assert losses([]) == {"validation_before": None, "validation_after": None, "training": None}


BAD = {
    "not UTF-8": b"\xff\xfe",
    "null": b"null",
    "empty": b"{}",
    "not JSON": b"{'step': 3}",
    "wrong key": json.dumps({**line(3), "stdp": 3} | {"step": None}).encode(),
    "missing key": json.dumps({k: v for k, v in line(3).items() if k != "skipped"}).encode(),
    "string": json.dumps(line(3) | {"loss": "3.0"}).encode(),
    "boolean": json.dumps(line(3) | {"skipped": True}).encode(),
    "list": json.dumps(line(3) | {"validation_loss": [1]}).encode(),
    "NaN": json.dumps(line(3) | {"loss": float("nan")}).encode(),
    "infinite rate": json.dumps(line(3)).encode().replace(b"100.0", b"1e999"),
    "too many digits": json.dumps(line(3)).encode().replace(b"24", b"2" * 5000),
    "beyond floats": json.dumps(line(3) | {"loss": 10**400}).encode(),
    "nested too deeply": b"[" * 100_000,
    "no rate": json.dumps(line(3) | {"tokens_per_second": 0}).encode(),
    "earlier step": json.dumps(line(1)).encode(),
    "repeated step": json.dumps(line(2)).encode(),
    "far ahead": json.dumps(line(10**6)).encode(),
    "negative": json.dumps(line(3) | {"step": -3}).encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_line_is_dropped_and_counted(folder, name, capsys):
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:2], BAD[name], *lines[2:], b'{"step": 11, "lo']))
    intact = [json.loads(text) for text in lines]
    assert read_run(folder) == intact
    assert f"{file}: 1 of 11 lines are damaged and ignored" in capsys.readouterr().err
    make_table({"a": summarise(read_run(folder))})
    Metrics(RunDirectory(folder), TrainConfig(), 7, "id").close()
    capsys.readouterr()
    assert read_run(folder) == intact[:7] and not capsys.readouterr().err


def test_only_damaged_lines(folder, capsys):
    (folder / "metrics.jsonl").write_bytes(os.urandom(2000) + b"\n")
    assert read_metrics(RunDirectory(folder)) == []
    assert "damaged" in capsys.readouterr().err


def test_full_disk(tmp_path):
    metrics = Metrics(RunDirectory(tmp_path), TrainConfig(), 0, "id")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        for step in range(1, 4):
            metrics.write(line(step))
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(File too large\)"):
            metrics.write(line(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.close()
    assert [entry["step"] for entry in read_metrics(RunDirectory(tmp_path))] == [1, 2, 3]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(RunDirectory(tmp_path), TrainConfig(track=("tensorboard",)), 0, "id")
    metrics.write(line(1))
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"tokens_per_second" in events.read_bytes() and b"mfu" not in events.read_bytes()


def test_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = Metrics(RunDirectory(tmp_path), TrainConfig(track=("wandb:project",)), 0, "abc123")
    metrics.write(line(1))
    metrics.close()
    (log,) = (tmp_path / "wandb").glob("offline-run-*-abc123/run-abc123.wandb")
    deadline = time.monotonic() + 20  # written by another process
    while b"tokens_per_second" not in log.read_bytes():
        assert time.monotonic() < deadline, "wandb logged nothing"
        time.sleep(0.05)


def test_report_of_a_run(folder, tmp_path):
    lines = read_run(folder)
    assert validation(lines) == [(0, 4.0), (40, 3.5), (80, 3.0)]
    (row,) = make_table({"a run": summarise(lines)}).rows
    assert row == ["a run", "10", "80", "0.3000", "4.0000", "3.0000", "3.0000", "100", "–", "0"]
    pytest.importorskip("matplotlib")
    draw_curves({"a run": lines, "b": lines}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"curves\.xyz: .*not supported"):
        draw_curves({"a run": lines}, tmp_path / "curves.xyz")


def test_a_run_without_steps(tmp_path):
    with pytest.raises(DataError, match="has no metrics yet"):
        read_run(tmp_path)
