"""The fuzzer and the kill storm work, and find nothing in a short run."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def fuzz(*words, folder):
    call = [sys.executable, str(BENCHMARKS / "fuzz"), *words, "--failures", str(folder)]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("targets", "trials"),
    [
        ("headers config growth yaml tokenizer text tasks", 1),
        pytest.param("headers config growth yaml tokenizer", 25, marks=pytest.mark.long),
        pytest.param("text tasks", 10, marks=pytest.mark.long),
    ],
)
def test_short_fuzz_finds_nothing(targets, trials, tmp_path):
    printed = fuzz(*targets.split(), "--trials", str(trials), "--jobs", "2", folder=tmp_path / "failures")
    assert all(f"{target}: {trials} trials" in printed for target in targets.split())


@pytest.mark.long
def test_fuzz_of_run_directories_finds_nothing(tmp_path):
    fuzz("run", "--trials", "40", folder=tmp_path)


def test_trials_can_be_repeated(tmp_path):
    printed = {fuzz("config", "--trial", "7", folder=tmp_path).partition("→")[0] for _ in range(2)}
    assert len(printed) == 1


@pytest.mark.long
def test_short_kill_storm_loses_nothing(tmp_path):
    call = [sys.executable, str(BENCHMARKS / "killstorm.py"), "--kills", "4", "--work", str(tmp_path), "--no-write"]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("nothing lost") == 2
