"""``benchmarks/train.py`` on tiny models: its checks, limits, profiles and tables."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train.py"


def run(environment, *words, code=0):
    """Returns stdout, the results and stderr."""
    device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    call = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(call, env=os.environ | environment | device, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def rows(text):
    return {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| tiny")}


@pytest.mark.long
def test_contenders_in_turns(compiled, tmp_path):
    text = tmp_path / "한국어.txt"
    text.write_text("바이트가 곧 토큰이다. " * 20)
    names = ["tiny injected jax 2x32", "tiny naive jax 2x32", "tiny all jax 2x32 remat=nothing"]
    names += ["tiny injected torch 2x32 compile=no"] if importlib.util.find_spec("torch") else []
    flags = ["--turns", "--rounds", 2, "--profile", "--text", text, "--output", tmp_path / "out.jsonl"]
    done = run(compiled, *names, *flags)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == names == list(rows(done.stdout))
    # A mask over all gradients trains what the grouped stacks train, for more FLOPs.
    assert abs(results[0]["losses"][-1] - results[1]["losses"][-1]) < 1e-4
    assert results[0]["flops_per_token"] < 0.8 * results[1]["flops_per_token"]
    bad = results.pop(2)  # a failure does not stop the others
    assert "remat is 'nothing'" in bad["error"] and bad["error"] in rows(done.stdout)[bad["name"]]
    for result in results:
        assert "wrong" not in result and len(result["seconds"]) == 2 and result["peak_bytes"] > 1e7
        assert result["profile"] in done.stderr
        assert ("profile of 2 steps" if result["library"] == "jax" else "aten::mm") in result["profile"]
    assert run(compiled, "--table", tmp_path / "out.jsonl").stdout == done.stdout


def test_a_contender_over_the_limit_is_killed(compiled, tmp_path):
    done = run(compiled, "tiny all jax 2x32", "--seconds", 0.5, "--output", tmp_path / "out.jsonl")
    assert "over 0.5 s" in rows(done.stdout)["tiny all jax 2x32"]
    assert json.loads((tmp_path / "out.jsonl").read_text())["error"] == "over 0.5 s"


def test_unknown_contenders_are_refused(compiled):
    assert "'huge all jax 2x32' is not SHAPE TRAINS" in run(compiled, "huge all jax 2x32", code=2).stderr
