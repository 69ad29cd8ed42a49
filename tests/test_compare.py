"""The comparison: growth, training and measurement of every contender, resumed and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.parse import from_values, parse
from tli_jax.compare import main
from tli_jax.comparison.contenders import make_contenders
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.models.shapes import SHAPES
from tli_jax.upscaling.options import make_plan

pytestmark = pytest.mark.usefixtures("_compile_once")
CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = "tli:identity,tli:half,stack,llama_pro,dus,moe"


def call(start: Path, output: Path, *more: str) -> list[str]:
    flags = ["--model", str(start / "base"), "--text", str(start / "ids.npy"), "--output", str(output)]
    flags += [
        "--methods",
        METHODS,
        "--every",
        "2",
        "--steps",
        "4",
        "--seeds",
        "2",
        "--batch-size",
        "8",
        "--warmup",
        "2",
    ]
    flags += ["--sequence-length", "16", "--learning-rate", "3e-3", "--validate-every", "2", "--remat", "none"]
    flags += ["--no-isolate", "--save-every", "2"]
    return [*flags, "--dtypes", "compute=float32", "--validation-batches", "4", *more]


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that does not depend on the clock or on the output folder."""
    starts = [{k: v for k, v in start.items() if k not in ("seconds", "proof")} for start in results["starts"]]
    runs = [{key: value for key, value in run.items() if key != "seconds"} for run in results["runs"]]
    return {"starts": starts, "runs": runs, "claims": results["claims"], "reach": results["reach"]}


def start_process(arguments: list[str], compiled: dict[str, str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Start the command as a process with one device."""
    line = [sys.executable, "-m", "tli_jax.compare", *arguments]
    device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    return subprocess.Popen(line, env=os.environ | compiled | device, stdout=stdout, text=True)


@pytest.fixture(scope="module")
def done(start, once, compiled) -> Path:
    """A comparison of everything."""

    def make(folder: Path) -> None:
        assert start_process(call(start, folder / "out", "--old-text", str(start / "ids.npy")), compiled).wait() == 0

    return once("compared", make) / "out"


def test_every_contender_is_trained_and_measured(done) -> None:
    results = read(done)
    assert results["left_out"].keys() == {"stack", "llama_pro"}
    assert "tli:identity" in results["left_out"]["llama_pro"]  # the same layers if K is 2
    trained = {(run["name"], run["only"]) for run in results["runs"]}
    both = {(name, only) for name in ("tli:identity", "tli:half", "dus") for only in ("all", "injected")}
    assert trained == both | {("base", "all"), ("random", "all"), ("moe", "all"), ("old_layers", "injected")}
    assert len(results["runs"]) == 2 * len(trained)
    for run in results["runs"]:
        assert [tokens for tokens, _ in run["curve"]] == [0, 256, 512] and run["diverged"] is None
        assert run["memory"] > 0 and run["seconds"] > 0 and run["old"] > 0
        assert run["attention"] == "xla, across documents" and run["remat"] == "none"
    layers = {start["name"]: start["layers"] for start in results["starts"]}
    assert layers == {"base": 4, "old_layers": 4, "random": 6, "tli:identity": 6, "tli:half": 6, "dus": 6, "moe": 4}
    for name in ("results.csv", "report.html", "initial_loss.png", "loss_curves.png", "forgetting.png"):
        assert (done / name).stat().st_size > 0


def test_initial_losses_are_those_of_the_guarantees(done) -> None:
    results = read(done)
    new = {(start["name"], start["seed"]): start["new"] for start in results["starts"]}
    assert new["tli:identity", 0] == new["base", 0] == results["base"]["new"]
    assert new["moe", 0] == pytest.approx(new["base", 0], abs=1e-5)
    assert new["random", 0] != new["random", 1]
    for run in results["runs"]:  # a start is measured once, not by every run
        assert run["curve"][0][1] == new.get((run["name"], run["seed"]), new[run["name"], 0])


def test_contribution_is_the_loss_without_the_layer(done) -> None:
    """Checked on the exported model, with the residual outputs of one layer set to zero."""
    import jax.numpy as jnp

    import tli_jax
    from tli_jax import train

    run = done / "runs" / "tli-half-injected-0"
    export = done.parent / "export"
    flags = ["--run", str(run), "--export", str(export), "--export-only", "--overwrite"]
    assert run_command(train.main, flags) == 0
    config, params = tli_jax.load_hf(export)
    found = next(r for r in read(done)["runs"] if (r["name"], r["only"], r["seed"]) == ("tli:half", "injected", 0))
    assert found["contributions"].keys() == {"2", "5"}
    ids = np.load(read(done)["config"]["text"][0]["path"])
    windows = (len(ids) - 1) // 16
    held_out = round(windows * 0.05)
    rows = np.stack([ids[i * 16 : i * 16 + 17] for i in range(windows - held_out, windows)]).astype(np.int32)
    count = min(held_out, 8)  # one batch, the least
    rows = rows[[i * held_out // count for i in range(count)]]

    def loss(skipped: int | None) -> float:
        layers = {part: dict(params["layers"][part]) for part in params["layers"]}
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            weight = layers[part][name]["weight"]
            weight = weight if skipped is None else weight.at[skipped].set(0)
            layers[part][name] = {"weight": weight}
        losses = tli_jax.losses(config, params | {"layers": layers}, jnp.asarray(rows))
        return float(losses[rows[:, 1:] != config.bos_token_id].mean())  # the first token of a document is not a target

    for layer in (2, 5):
        assert found["contributions"][str(layer)] == pytest.approx(loss(layer) - loss(None), abs=2e-5)


def test_measuring_reads_no_more_tokens_than_training(done) -> None:
    results = read(done)
    assert results["config"]["validation_batches"] == 4 and results["validation_batches"] == 1
    for steps, validate_every, old_text, batches in ((10, 100, "embedded", 5), (10, 5, "", 5), (600, 100, "", 20)):
        flags = ["--steps", steps, "--validate-every", validate_every, "--old-text", old_text]
        config = parse(CompareConfig, "", "", [*map(str, flags)])
        assert config.recipe.validation_batches == batches


def test_learning_rate_is_chosen_with_a_seed_of_its_own(start, compiled, tmp_path) -> None:
    flags = ["--methods", "tli:half,moe", "--only", "all", "--no-baselines", "--seeds", "1", "--no-keep-checkpoints"]
    flags = call(start, tmp_path / "out", *flags, "--learning-rates", "3e-3,1e-5")
    process = start_process(flags, compiled, subprocess.PIPE)
    assert "at the end of the grid" in process.communicate()[0] and process.returncode == 0
    results = read(tmp_path / "out")
    assert [one["name"] for one in results["learning_rates"]] == ["tli:half", "moe"]
    assert {start["seed"] for start in results["starts"]} == {0}  # that of the trial of moe is not among them
    for one, run in zip(results["learning_rates"], results["runs"], strict=True):
        losses = dict(one["losses"])
        assert list(losses) == [1e-5, 3e-3] and one["rate"] == min(losses, key=lambda rate: losses[rate])
        assert one["seed"] == 1_000_000 and run["learning_rate"] == one["rate"]
        assert run["curve"][-1][1] != losses[one["rate"]]  # other data
        directory = tmp_path / "out" / "runs" / f"{run['name']}-all-0".replace(":", "-")
        recipe = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        assert recipe["learning_rate"] == {"all": one["rate"]} and not (directory / "checkpoints").exists()
    assert {row["name"]: row["learning_rate"] for row in results["summary"]} == {
        one["name"]: one["rate"] for one in results["learning_rates"]
    }
    assert run_command(main, flags) == 0 and numbers(read(tmp_path / "out")) == numbers(results)


def test_measurements_are_reused(done, start) -> None:
    before, stamps = read(done), {file: file.stat().st_mtime_ns for file in (done / "measured").iterdir()}
    assert run_command(main, call(start, done, "--old-text", str(start / "ids.npy"))) == 0
    assert numbers(read(done)) == numbers(before)
    assert stamps == {file: file.stat().st_mtime_ns for file in (done / "measured").iterdir()}


def test_other_settings_are_refused(done, start, capsys) -> None:
    old = ["--old-text", str(start / "ids.npy")]
    assert run_command(main, call(start, done, *old, "--learning-rate", "1e-2")) == 2
    assert "learning_rate was" in capsys.readouterr().err
    changed = call(start, done, *old)
    changed[changed.index(METHODS)] = "tli:identity,tli:half,dus"
    fewer = [*changed, "--config", str(done.parent / "dus.yaml")]
    (done.parent / "dus.yaml").write_text("methods: [{method: dus, drop: 2}]\n", encoding="utf-8")
    del fewer[fewer.index("--methods") : fewer.index("--methods") + 2]
    assert run_command(main, fewer) == 2
    assert "dus was" in capsys.readouterr().err


def test_other_data_is_refused(start, tmp_path, capsys) -> None:
    shutil.copy(start / "ids.npy", tmp_path / "ids.npy")
    flags = call(start, tmp_path / "out", "--methods", "tli:identity", "--steps", "0", "--no-baselines")
    flags[flags.index("--text") + 1] = str(tmp_path / "ids.npy")
    assert run_command(main, flags) == 0
    np.save(tmp_path / "ids.npy", np.load(start / "ids.npy")[::-1])
    assert run_command(main, flags) == 2
    assert "the text has changed since the comparison started" in capsys.readouterr().err


def test_default_methods() -> None:
    """A base of 12 layers and K = 4: every default method takes part."""
    contenders, left_out = make_contenders(parse(CompareConfig, "", "", []), open_checkpoint(hub.resolve("embedded")))
    names = ["base", "old_layers", "random", "tli:identity", "tli:half", "tli:copy", "dus", "moe"]
    assert [contender.name for contender in contenders] == names and not left_out


@pytest.mark.parametrize("name", ["demo", "embedded"])
def test_shipped_configurations(name: str) -> None:
    config = parse(CompareConfig, "", "", [f"--config={CONFIGS / f'compare_{name}.yaml'}"])
    base = open_checkpoint(hub.resolve("embedded"))
    contenders, left_out = make_contenders(config, base)
    assert len(contenders) + len(left_out) == len(config.methods) + 3
    plans = {
        one.name: make_plan(from_values(UpscaleConfig, one.growth, ""), base, [0.0] * 12) for one in contenders[3:]
    }
    assert {len(plan) for name, plan in plans.items() if not name.startswith("moe")} == {18}


def test_at_the_size_of_llama_8b() -> None:
    """SOLAR's drop of 8 gives 48 layers, as tli with K = 2. Two experts per token have 19 % more active parameters."""
    base = Checkpoint(Path("nowhere"), SHAPES["llama3.1-8b"], {})
    methods = "tli:identity,tli:copy,dus,slayer,opt_deus,midas,adept,stack,moe"
    config = parse(CompareConfig, "", "", ["--methods", methods, "--every", "2"])
    contenders, left_out = make_contenders(config, base)
    growth = {one.name: one.growth for one in contenders}
    assert growth["dus"] == {"method": "dus", "drop": 8}
    assert growth["opt_deus"]["after"] == list(range(15, 31))
    assert growth["moe"] == {"method": "moe", "top_k": 2}
    assert left_out.keys() == {"stack"}
    assert {one.name: one.only for one in contenders}["old_layers"]["injected"].startswith("layers(1,3,5,")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--methods", "tli:identity,tli:identity"], 2, "names must be unique"),
        (["--methods", "tly"], 2, "tly"),
        (["--methods", "tli:identity", "--every", "9"], 2, "must be 1…4"),
        (["--only", "some"], 2, "only"),
        (["--text", ""], 2, "text is not set"),
        (["--validation-fraction", "0"], 2, "no held-out text"),
        (["--model", "nowhere/at/all"], 66, "nowhere"),
        (["--learning-rates", "1e-3", "--learning-rate", "1e-3,injected=1e-2"], 2, "remove the groups"),
    ],
)
def test_refused(start, tmp_path, capsys, flags, code, message) -> None:
    assert run_command(main, call(start, tmp_path / "out", *flags)) == code
    assert message in capsys.readouterr().err


def test_base_without_a_loss_is_refused(start, tmp_path, capsys) -> None:
    shutil.copytree(start / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", str(tmp_path / "base"), "--methods", "tli:identity", "--steps", "0"]
    assert run_command(main, call(start, tmp_path / "out", *flags)) == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: base (") and "the loss is nan" in error
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.long
def test_growth_without_a_loss_is_refused(start, tmp_path, capsys) -> None:
    shutil.copytree(start / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    # Attention scores near the largest float: the base is finite, 1,000 times its weights are not.
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1e37
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "methods.yaml"
    file.write_text("methods: [{method: tli, init: noise, noise_ratio: 1000, name: loud}]", encoding="utf-8")
    flags = call(start, tmp_path / "out", "--model", str(tmp_path / "base"), "--steps", "0", "--config", str(file))
    at = flags.index("--methods")
    assert run_command(main, [*flags[:at], *flags[at + 2 :]]) == 65
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: loud (")
    # Its proof is not finite, which JSON cannot represent.
    record = (tmp_path / "out" / "grown" / "loud-0" / "growth.json").read_text(encoding="utf-8")
    assert json.loads(record, parse_constant=pytest.fail)["proof"]["kl"] is None


def test_ids_outside_the_vocabulary_are_refused(start, tmp_path, capsys) -> None:
    np.save(tmp_path / "ids.npy", np.full(4000, 64, np.uint16))
    assert run_command(main, call(start, tmp_path / "out", "--text", str(tmp_path / "ids.npy"))) == 65
    assert "64" in capsys.readouterr().err.splitlines()[-1]


def test_foreign_folder_is_refused(start, tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert run_command(main, call(start, tmp_path)) == 73
    assert "mine.txt" in capsys.readouterr().err


def test_a_comparison_that_never_began_may_be_corrected(start, tmp_path, capsys) -> None:
    for every in ("1", "2"):  # the second time, the folder has the configuration of the first
        assert run_command(main, call(start, tmp_path / "out", "--methods", "tli,foo", "--every", every)) == 2
        assert "method is 'foo'" in capsys.readouterr().err


def test_without_training(start, tmp_path, capsys) -> None:
    flags = ["--methods", "tli:copy,dus", "--steps", "0", "--no-baselines"]
    assert run_command(main, call(start, tmp_path / "out", *flags)) == 0
    results = read(tmp_path / "out")
    rows = results["summary"]
    assert results["runs"] == [] and [row["name"] for row in rows[:1]] == ["base"]
    assert {row["name"] for row in rows[1:]} == {"tli:copy", "dus"} and rows[1]["change"] <= rows[2]["change"]
    assert capsys.readouterr().out.startswith("before training\n")


def test_killed_comparison_is_resumed(start, tmp_path, compiled, done) -> None:
    """Kill it at three moments, then let it finish: the numbers are those of an undisturbed comparison."""
    flags = ["--methods", "tli:half,dus", "--no-baselines", "--only", "injected", "--seeds", "1"]
    arguments = call(start, tmp_path / "out", "--old-text", str(start / "ids.npy"), *flags)
    # Kill it as soon as the path exists.
    moments = [
        tmp_path / "out" / "grown",
        tmp_path / "out" / "runs" / "tli-half-injected-0" / "metrics.jsonl",
        tmp_path / "out" / "runs" / "dus-injected-0",
    ]
    for path in moments:
        process = start_process(arguments, compiled)
        while process.poll() is None and not path.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert not (tmp_path / "out" / "results.json").exists()
    assert start_process(arguments, compiled).wait() == 0
    found, expected = numbers(read(tmp_path / "out")), numbers(read(done))
    assert len(found["runs"]) == 2 and all(run in expected["runs"] for run in found["runs"])
    assert len(found["starts"]) == 3 and all(one in expected["starts"] for one in found["starts"])
