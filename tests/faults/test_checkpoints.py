"""Damaged or foreign files in a run directory are found and named, and never resumed from."""

import json
import os
import shutil

import pytest

from tli_jax import train
from tli_jax.cli.frame import run_command

pytestmark = pytest.mark.usefixtures("_compile_once")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def damage(folder, how, part):
    """Damage every file with array data (``state``) or metadata (``meta``) in a checkpoint."""
    files = [file for file in (folder / part).rglob("*") if file.is_file()]
    files = [file for file in files if part == "meta" or file.parent.name == "d"]
    assert files
    for file in files:
        how(file)


def resume(run, steps=6):
    return run_command(train.main, ["--run", str(run), "--steps", str(steps)])


@pytest.fixture(scope="module")
def six(once, done):
    """The run after six steps, without damage."""

    def make(folder):
        shutil.copytree(done / "run", folder / "run")
        assert resume(folder / "run") == 0

    return once("six", make) / "run"


CASES = {
    "a flipped bit": (flip, "state"),
    "a truncated file": (truncate, "state"),
    "a deleted file": (os.unlink, "state"),
    "a flipped bit in the metadata": (flip, "meta"),
    "truncated metadata": (truncate, "meta"),
}
QUICK = ("a truncated file", "a flipped bit in the metadata")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_damaged_checkpoint_falls_back_to_the_previous_one(case, run, six, arrays, capsys):
    damage(run / "checkpoints" / "4", *CASES[case])
    assert resume(run) == 0
    assert str(run / "checkpoints" / "4") in capsys.readouterr().err
    assert arrays(run, 6) == arrays(six, 6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))


def test_run_with_only_damaged_checkpoints_does_not_restart(run, snapshot, capsys):
    for step in ("2", "4"):
        damage(run / "checkpoints" / step, flip, "state")
    before = snapshot(run)
    assert resume(run) == 65
    assert str(run / "checkpoints") in capsys.readouterr().err
    assert snapshot(run) == before


def test_damaged_frozen_tensors_are_refused(run, snapshot, capsys):
    damage(run / "checkpoints" / "frozen", flip, "state")
    before = snapshot(run)
    assert resume(run) == 65
    assert "frozen" in capsys.readouterr().err
    assert snapshot(run) == before


def is_refused_or_correct(run, six, arrays):
    """Return the exit code: 2 or 65, or 0 if the run ignored the foreign files and ended with the right arrays."""
    code = resume(run)
    assert code in (0, 2, 65)
    assert code or arrays(run, 6) == arrays(six, 6)
    return code


@pytest.mark.parametrize("scope", ["checkpoint", pytest.param("all checkpoints", marks=pytest.mark.long)])
def test_checkpoints_of_another_run_are_not_resumed(scope, run, done, start, six, arrays, tmp_path, capsys):
    """The other run differs only in its seed: shapes, dtypes and names are the same."""
    config = (done / "run" / "config.yaml").read_text().replace("seed: 0", "seed: 1")
    (tmp_path / "other.yaml").write_text(config)
    other = tmp_path / "other"
    assert run_command(train.main, ["--config", str(tmp_path / "other.yaml"), "--run", str(other)]) == 0
    capsys.readouterr()
    steps = ["4"] if scope == "checkpoint" else ["2", "4", "frozen"]
    for step in steps:
        shutil.rmtree(run / "checkpoints" / step)
        shutil.copytree(other / "checkpoints" / step, run / "checkpoints" / step)
    code = is_refused_or_correct(run, six, arrays)
    assert code or "checkpoints/4" in capsys.readouterr().err


FILES = {
    "config.yaml": lambda file: file.write_text(file.read_text().replace("learning_rate:", "learning_rate: {all: 1}#")),
    "run.json": lambda file: file.write_text(
        file.read_text().replace('"F32"', '"BF16"').replace("float32", "bfloat16")
    ),
    "growth.json": lambda file: file.write_text(file.read_text().replace('"guarantee": "bit"', '"guarantee": "none"')),
    "model/config.json": lambda file: file.write_text(file.read_text().replace("1e-05", "1e-03")),
}


@pytest.mark.parametrize("name", FILES)
def test_changed_file_of_a_run_is_refused(name, run, six, arrays, capsys):
    before = (run / name).read_bytes()
    FILES[name](run / name)
    assert (run / name).read_bytes() != before
    assert is_refused_or_correct(run, six, arrays) in (2, 65)
