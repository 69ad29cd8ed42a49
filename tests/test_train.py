"""``tli-jax train``: what a run writes, how it resumes, and what it refuses.

Tests that kill or stop a run start real processes with one device. All others run in this process, with eight.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import tli_jax
from tli_jax import prepare, train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.attention import causal
from tli_jax.training.checkpoints import Checkpoints
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.start import open_start
from tli_jax.training.trainer import make_trainer

pytestmark = pytest.mark.usefixtures("_compile_once")

B, T, STEPS, SAVE, VALIDATE = 8, 16, 20, 5, 10
HALF = STEPS // 2
BASIC = {"batch-size": B, "sequence-length": T, "dtypes": "compute=float32", "learning-rate": 0.01, "warmup": 5}
# With this schedule the program does not depend on the number of steps, so most tests share one compilation.
BASIC |= {"schedule": "constant"}
USUAL = BASIC | {"steps": STEPS, "save-every": SAVE, "validate-every": VALIDATE}
# For the small model. From step 20 on every gradient is a spike.
SMALL = BASIC | {"only": "injected", "spike": 1e-6}

# The command with a pause after each step from some step on, so that tests can interrupt it.
SLOW = """
import sys, time
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes
from tli_jax.training.metrics import Metrics

since, pause, write = int(sys.argv[1]), float(sys.argv[2]), Metrics.write

def slow(self, values):
    write(self, values)
    if values["step"] >= since:
        time.sleep(pause)

Metrics.write = slow
processes.leave(run_command(train.main, sys.argv[3:]))
"""


def flags(run, **options):
    """Options as a command line. None leaves an option out, True and False are switches."""
    arguments = []
    for name, value in ({"run": run} | options).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def run_here(run, **options):
    """Run the command in this process. Returns its exit code."""
    return run_command(train.main, flags(run, **options))


def usual(start, model="grown", **options):
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return USUAL | {"model": start / model, "text": start / "ids.npy"} | options


def read_stderr(capsys):
    """The text on stderr. It ends with at most one error, on one line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) <= 1 and "Traceback" not in captured.err
    assert not errors or captured.err.endswith(errors[0] + "\n")
    return captured.err


def inode(file):
    return file.stat().st_ino if file.is_file() else None


class Process:
    """The command in a process of its own, with one device."""

    def __init__(self, environment, arguments, slow=None):
        script = ["-m", "tli_jax.train"] if slow is None else ["-c", SLOW, *map(str, slow)]
        self.run = Path(arguments[arguments.index("--run") + 1])
        self.before = inode(self.run / "metrics.jsonl")
        device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *script, *arguments],
            env=os.environ | device | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, step, checkpoint=None):
        """Wait until the step is in the metrics and the checkpoint is complete."""
        file = self.run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (
            inode(file) != self.before  # a resumed run replaces the file
            and file.read_bytes().count(b"\n") >= step
            and (checkpoint is None or (self.run / "checkpoints" / str(checkpoint)).is_dir())
        ):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self

    def end(self, number=None, code=0):
        """Send a signal, if any, and wait for the end. Returns the text on stderr."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=600)
        assert self.process.returncode == code, err
        assert out == "" and "Traceback" not in err and err.count("error:") == (code > 0)
        return err


def metrics(run):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["gradient_norm"], line.get("validation_loss")) for line in lines]


def state_digests(run, step=STEPS):
    """Digest of every array in the state of a step."""
    meta = json.loads((run / "checkpoints" / str(step) / "meta" / "meta.json").read_text())["content"]
    assert meta["meta"]["step"] == step
    return {name: array["digest"] for name, array in meta["arrays"].items()}


def tensors(folder):
    return {name: read_tensor(tensor).tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


def copy_run(source, target, until=STEPS):
    """Copy a run as it was at step ``until``."""
    shutil.copytree(source, target)
    for step in (target / "checkpoints").iterdir():
        if step.name.isdecimal() and int(step.name) > until:
            shutil.rmtree(step)
    return target


# Real processes. Two sequences run once, in two threads, and several tests check the results.


def run_killed(folder, start, environment):
    options = usual(start, only="injected")
    straight, killed = folder / "straight", folder / "killed"
    Process(environment, flags(straight, **options, export=folder / "straight-out")).end()
    every = flags(killed, **options, export=folder / "killed-out")
    Process(environment, every, slow=(HALF + 1, 0.3)).wait_for(HALF + 3, checkpoint=HALF).end(signal.SIGKILL, -9)
    (folder / "last.err").write_text(Process(environment, every).end())


def run_stopped(folder, start, environment):
    options = usual(start, only="all", grad_accum_steps=2, steps=2 * STEPS, save_every=2 * SAVE, schedule="wsd")
    straight, stopped = folder / "straight", folder / "stopped"
    Process(environment, flags(straight, **options, export=folder / "straight-out")).end()
    every = flags(stopped, **options, export=folder / "stopped-out")
    first = Process(environment, every, slow=(3, 0.6)).wait_for(3)
    second = Process(environment, every).end(code=73)
    stderr = {"second": second, "SIGTERM": first.end(signal.SIGTERM, 75), "saved": [newest(stopped)]}
    stderr["SIGINT"] = Process(environment, every, slow=(15, 0.3)).wait_for(16).end(signal.SIGINT, 75)
    stderr["saved"].append(newest(stopped))
    stderr["last"] = Process(environment, flags(stopped)).end()  # the stored configuration has the other options
    (folder / "stderr.json").write_text(json.dumps(stderr))


def kill_somewhere(environment, arguments, rng):
    """SIGKILL at a random moment: while starting, after some steps, or while a checkpoint is written."""
    process = Process(environment, arguments, slow=(0, 0.05))
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0.2, 4))
    else:
        saved = newest(process.run)
        process.wait_for(saved + rng.randrange(1, 1 + SAVE + 3))
        time.sleep(rng.uniform(0, 0.1))
    process.end(signal.SIGKILL, -9)


def newest(run):
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0) if folder.is_dir() else 0


@pytest.fixture(scope="session")
def interrupted(once, start, compiled):
    """Two folders: a run that was killed, and one that was stopped, each with an uninterrupted run to compare to."""

    def make(folder):
        (folder / "kill").mkdir()
        (folder / "stop").mkdir()
        with ThreadPoolExecutor(2) as pool:
            killed = pool.submit(run_killed, folder / "kill", start, compiled)
            run_stopped(folder / "stop", start, compiled)
            killed.result()

    folder = once("interrupted", make)
    return folder / "kill", folder / "stop"


@pytest.mark.parametrize(("index", "name", "steps"), [(0, "killed", STEPS), (1, "stopped", 2 * STEPS)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one_bit_for_bit(interrupted, index, name, steps):
    folder = interrupted[index]
    straight, other = folder / "straight", folder / name
    assert losses(other) == losses(straight)
    assert len(losses(other)) == steps
    assert tensors(folder / f"{name}-out") == tensors(folder / "straight-out")
    digests = state_digests(straight, steps)
    assert state_digests(other, steps) == digests
    parts = {name.split(".")[0] for name in digests}
    assert {"step", "trained", "optimizer_state", "norm"} <= parts


def test_restored_states_are_equal_bit_for_bit(interrupted):
    """As training reads them, instead of by their digests."""
    folder = interrupted[0]
    states = []
    for name in ("straight", "killed"):
        run = RunDirectory(folder / name)
        config = run.read_config()
        start = open_start(config, run, pytest.fail)
        trainer, _, _ = make_trainer(config, start.model, start.plan)
        checkpoints = Checkpoints(run.checkpoints, 1, run.identity, read_only=True)
        step, state, meta = checkpoints.restore_newest(trainer.abstract_state(), pytest.fail)
        checkpoints.close()
        assert step == STEPS == int(state.step) and meta["tokens"] == STEPS * B * T
        states.append(jax.device_get(state))
    for straight, killed in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(straight).tobytes() == np.asarray(killed).tobytes()


def test_kill_keeps_complete_checkpoints(interrupted):
    stderr = (interrupted[0] / "last.err").read_text()
    assert "error" not in stderr
    assert re.search(r"^train .*done", stderr, re.M)
    assert (interrupted[0] / "killed" / "checkpoints" / str(HALF)).is_dir()


def test_start_resume_validation_and_checkpoints_are_reported(interrupted):
    stderr = json.loads((interrupted[1] / "stderr.json").read_text())
    assert re.search(r"^starting at step 0$", stderr["SIGTERM"], re.M)
    assert re.search(r"^validation loss 4\.\d{4} at step 0$", stderr["SIGTERM"], re.M)
    for word, saved in zip(("SIGINT", "last"), stderr["saved"], strict=True):
        assert re.search(rf"^resuming from step {saved}$", stderr[word], re.M)
    assert re.search(rf"^validation loss \d\.\d{{4}} at step {2 * STEPS}$", stderr["last"], re.M)
    assert re.search(rf"^saving checkpoint at step {2 * STEPS}$", stderr["last"], re.M)


def test_signals_save_the_reported_step(interrupted):
    stderr = json.loads((interrupted[1] / "stderr.json").read_text())
    for name, saved in zip(("SIGTERM", "SIGINT"), stderr["saved"], strict=True):
        (line,) = [line for line in stderr[name].splitlines() if line.startswith("error:")]
        assert f"stopped at step {saved}, which is saved: run the same command again" in line
    assert 3 <= stderr["saved"][0] < stderr["saved"][1] < 2 * STEPS


def test_a_step_that_needs_too_much_memory_is_refused_before_the_first(start, tmp_path, capsys, monkeypatch):
    options = usual(start, steps=2)
    with monkeypatch.context() as little:
        little.setattr("tli_jax.training.fit.free_memory", lambda mesh: 1e4)
        assert run_here(tmp_path / "run", **options) == 2
    text = read_stderr(capsys)
    assert re.search(r"error: the train step does not fit: it needs \S+ MiB of 0.0 MiB per device; try ", text)
    assert not (tmp_path / "run/run.json").exists()
    assert run_here(tmp_path / "run", **options) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["remat"] == "none" and facts["attention"] == "xla, within documents"
    assert "remat: none, " in read_stderr(capsys)


def test_another_kernel_is_reported_when_a_run_resumes(start, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert run_here(run, **usual(start, steps=1)) == 0
    capsys.readouterr()
    monkeypatch.setattr("tli_jax.training.trainer.choose_attention", lambda *args: (causal, "other"))
    assert run_here(run, **usual(start, steps=2)) == 0
    assert "warning: the run started with other attention (xla, within documents)" in read_stderr(capsys)


def test_a_second_process_on_a_run_is_refused(interrupted):
    stderr = json.loads((interrupted[1] / "stderr.json").read_text())["second"]
    assert "in use by another process" in stderr and str(interrupted[1] / "stopped") in stderr


@pytest.mark.long
@pytest.mark.parametrize("only", ["injected", "all"])
def test_ten_kills(start, interrupted, compiled, tmp_path, only):
    straight, options = interrupted[only == "all"] / "straight", usual(start, only=only)
    if only == "all":
        options = usual(start, only="all", grad_accum_steps=2, steps=2 * STEPS, save_every=2 * SAVE, schedule="wsd")
    steps = options["steps"]
    every, rng = flags(tmp_path / "run", **options, export=tmp_path / "out"), random.Random(only)
    for _ in range(10):
        if newest(tmp_path / "run") >= steps - options["save-every"]:  # from here on a kill may come too late
            shutil.rmtree(tmp_path / "run")
        kill_somewhere(compiled, every, rng)
    Process(compiled, every).end()
    assert losses(tmp_path / "run") == losses(straight)
    assert state_digests(tmp_path / "run", steps) == state_digests(straight, steps)
    assert tensors(tmp_path / "out") == tensors(straight.with_name("straight-out"))


@pytest.mark.long
def test_recompiled_programs_give_the_same_bits(start, interrupted, tmp_path):
    """The other processes share a compilation cache."""
    every = flags(tmp_path / "run", **usual(start, only="injected"))
    Process({}, every, slow=(HALF + 1, 0.3)).wait_for(HALF + 3, checkpoint=HALF).end(signal.SIGKILL, -9)
    Process({}, every).end()
    assert state_digests(tmp_path / "run") == state_digests(interrupted[0] / "straight")


# In this process: a run on eight devices, which most tests below start from.


@pytest.fixture(scope="session")
def trained(once, start):
    """A finished run of the injected layers, ``run``, and its export, ``out``."""

    def make(folder):
        assert run_here(folder / "run", **usual(start, only="injected", keep=100)) == 0
        assert run_here(folder / "run", export=folder / "out") == 0  # not stored in the run's configuration

    return once("trained", make)


def test_only_the_injected_layers_change(start, trained):
    before, after = tensors(start / "grown"), tensors(trained / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    # The layers after the base's second and fourth; each of their tensors has a gradient.
    assert changed == {name for name in before if re.search(r"\.layers\.(2|5)\.", name)}


def test_export_is_a_model_folder(start, trained):
    out = trained / "out"
    assert (out / "config.json").read_bytes() == (start / "grown" / "config.json").read_bytes()
    growth = json.loads((start / "grown" / "growth.json").read_text())
    exported = json.loads((out / "growth.json").read_text())
    assert {k: v for k, v in exported.items() if k not in ("digests", "training", "proof_before_training")} == {
        k: v for k, v in growth.items() if k != "digests"
    }
    record = json.loads((out / "training.json").read_text())
    assert exported["training"] == record
    assert record["step"] == STEPS and record["tokens"] == STEPS * B * T
    assert record["only"] == "injected" and record["outer"] == []
    assert record["run"] == json.loads((trained / "run" / "run.json").read_text())["id"]
    config, params = tli_jax.load_hf(out)
    assert config.num_hidden_layers == 6
    ids = np.load(start / "ids.npy")[-512:].reshape(8, 64).astype(np.int32)
    before = tli_jax.load_hf(start / "grown")
    assert loss_of(config, params, ids) < loss_of(*before, ids) - 0.2


def loss_of(config, params, ids):
    logits = np.asarray(tli_jax.forward(config, params, ids), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, ids[:, 1:, None], -1).mean()


def test_transformers_has_the_same_loss(start, trained):
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    from transformers import AutoModelForCausalLM

    ids = np.load(start / "ids.npy")[-512:].reshape(8, 64).astype(np.int32)
    tokens = torch.tensor(ids, dtype=torch.long)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(trained / "out")(tokens, labels=tokens).loss
    np.testing.assert_allclose(loss_of(*tli_jax.load_hf(trained / "out"), ids), float(loss), rtol=1e-5)


def test_metrics(trained):
    lines = metrics(trained / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [step * B * T for step in range(1, STEPS + 1)]
    assert [line["step"] for line in lines if "validation_loss" in line] == [VALIDATE, 2 * VALIDATE]
    assert [line["step"] for line in lines if "validation_loss_before" in line] == [1]
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss_before"] - 0.2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert all(line["skipped"] == 0 and line["tokens_per_second"] > 0 for line in lines)
    assert lines[0]["learning_rate_injected"] < lines[4]["learning_rate_injected"] == pytest.approx(0.01)
    assert not any("learning_rate_kept" in line for line in lines)


def test_a_profile_changes_no_loss(start, trained, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(run, **usual(start, only="injected", profile=2, keep=100)) == 0
    stderr = read_stderr(capsys)
    assert "profile of 2 steps" in stderr and "matmul" in stderr and f"profile written to {run}/profile" in stderr
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    assert losses(run) == losses(trained / "run")
    assert state_digests(run) == state_digests(trained / "run")
    # It is not part of the run, which resumes without it.
    assert "profile: 0" in (run / "config.yaml").read_text()
    assert "profile" not in json.loads((run / "run.json").read_text())["config"]
    assert run_here(run, steps=STEPS + 2) == 0
    assert "profile of" not in read_stderr(capsys)
    assert run_here(run, steps=STEPS + 6, profile=5) == 0  # only one step is left after the third of this process
    assert "profile of 1 step\n" in read_stderr(capsys)


def test_training_goes_on_without_its_profile(start, trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    assert run_here(run, steps=STEPS + 2, profile=1) == 0
    assert "warning: no profile: only 2 steps were left" in read_stderr(capsys)
    (run / "profile").write_text("not a folder")
    assert run_here(run, steps=STEPS + 7, profile=1) == 0
    assert "warning: no profile: " in read_stderr(capsys)
    assert len(losses(run)) == STEPS + 7


def test_another_mesh_resumes_with_the_same_losses(start, trained, tmp_path):
    run = copy_run(trained / "run", tmp_path / "run", until=HALF)
    before = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    # As after a kill: with steps after the checkpoint, and half of the last line.
    (run / "metrics.jsonl").write_text("".join(before[: HALF + 3]) + before[HALF + 3][:40])
    assert run_here(run, mesh="data=2,fsdp=2,tensor=2") == 0
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:HALF] == before[:HALF]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    compare_losses(run, trained / "run")


def test_one_device_resumes_a_run_of_eight(start, trained, interrupted, compiled, tmp_path):
    run = copy_run(trained / "run", tmp_path / "run", until=HALF)
    Process(compiled, flags(run)).end()
    compare_losses(run, trained / "run")
    compare_losses(interrupted[0] / "straight", trained / "run")


def compare_losses(one, other):
    pairs = [np.array([[v or 0 for v in line] for line in losses(run)]) for run in (one, other)]
    np.testing.assert_allclose(*pairs, rtol=2e-4)


def data_files(step):
    """All files with array data. Which of them a restore reads depends on the timing of the writers."""
    return [file for file in (step / "state").rglob("d/*") if file.is_file()]


def flip(step):
    for file in data_files(step):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def lose(step):
    for file in data_files(step):
        file.unlink()


def test_damaged_newest_checkpoints(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    flip(run / "checkpoints" / str(STEPS))
    lose(run / "checkpoints" / str(STEPS - SAVE))
    assert run_here(run, export=tmp_path / "out") == 0
    stderr = read_stderr(capsys)
    for step in (STEPS - SAVE, STEPS):
        assert re.search(rf"{run}/checkpoints/{step}: .*: set aside, resuming from the previous checkpoint", stderr)
    assert f"resuming from step {HALF}\n" in stderr
    assert losses(run) == losses(trained / "run")
    assert state_digests(run) == state_digests(trained / "run")
    assert tensors(tmp_path / "out") == tensors(trained / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning-rate": 0.02}, "learning_rate was {'all': 0.01}, is {'all': 0.02}"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch-size": 16}, "batch_size was 8, is 16"),
        ({"only": "all"}, "only was 'injected', is 'all'"),
        ({"optimizer": "lion", "adam": "b1=0.8"}, "adam was {}, is {'b1': 0.8}"),
        ({"warmup": "5,injected=9"}, "warmup was {'all': 5}, is {'all': 5, 'injected': 9}"),
        ({"model": "elsewhere"}, "is 'elsewhere'"),
    ],
)
def test_another_configuration_is_refused(start, trained, capsys, changed, message):
    assert run_here(trained / "run", **usual(start, only="injected") | changed) == 2
    error = read_stderr(capsys)
    assert message in error and "use another run" in error


@pytest.fixture(scope="session")
def relative(once, start):
    """A finished run with its own model and text by relative paths, so that the folder can be copied."""

    def make(folder):
        shutil.copytree(start / "grown", folder / "model")
        shutil.copy(start / "ids.npy", folder / "ids.npy")
        with contextlib.chdir(folder):
            options = usual(start, only="injected", keep=100) | {"model": "model", "text": "ids.npy"}
            assert run_here("run", **options) == 0

    return once("relative", make)


@pytest.fixture
def own(relative, tmp_path, monkeypatch):
    shutil.copytree(relative, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_another_model_of_the_same_name_is_refused(own, start, capsys):
    file = own.parent / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert run_here(own) == 2
    assert "the model has changed since the run started" in read_stderr(capsys)


def test_another_plan_of_the_same_name_is_refused(own, capsys):
    file = own.parent / "model" / "growth.json"
    growth = json.loads(file.read_text())
    # Swap the first injected layer with the kept one before it: same tensors and shapes.
    growth["rows"][1], growth["rows"][2] = growth["rows"][2], growth["rows"][1]
    for key in ("injected", "trainable"):
        growth[key][1], growth[key][2] = growth[key][2], growth[key][1]
    file.write_text(json.dumps(growth))
    capsys.readouterr()
    assert run_here(own) == 2
    assert "the model has changed since the run started" in read_stderr(capsys)


def test_another_text_of_the_same_name_is_refused(own, capsys):
    ids = np.load(own.parent / "ids.npy")
    ids[7] ^= 1
    np.save(own.parent / "ids.npy", ids)
    capsys.readouterr()
    assert run_here(own) == 2
    assert "the data has changed since the run started" in read_stderr(capsys)


def test_another_text_of_another_name_is_refused(own, capsys):
    ids = np.load(own.parent / "ids.npy")
    ids[7] ^= 1
    np.save(own.parent / "other.npy", ids)
    assert run_here(own, text=own.parent / "other.npy") == 2
    assert "the data has changed since the run started" in read_stderr(capsys)


def test_text_may_move_and_a_finished_run_needs_none(own, trained, tmp_path, capsys):
    (tmp_path / "moved").mkdir()
    (own.parent / "ids.npy").rename(tmp_path / "moved" / "other_name.npy")
    assert run_here(own, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(trained / "out")
    assert run_here(own, steps=STEPS + 1) == 66
    assert "ids.npy: no such file or folder" in read_stderr(capsys)
    assert run_here(own, steps=STEPS + 1, text=tmp_path / "moved" / "other_name.npy") == 0
    assert newest(own) == STEPS + 1


def test_text_may_be_missing_if_its_tokens_are_cached_or_prepared(small, tmp_path, capsys):
    shutil.copytree(small / "grown", tmp_path / "model")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i + 2 for i, letter in enumerate(letters)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time, there was a girl. " * 60)
    options = SMALL | {"model": tmp_path / "model", "text": text, "steps": 2, "batch-size": 8}
    for run in ("whole", "stopped"):
        assert run_here(tmp_path / run, **options) == 0
    assert run_here(tmp_path / "whole", steps=4) == 0
    flags = [f"--model={tmp_path / 'model'}", "--workers=1", "--max-shard-size=0.1KB"]
    assert run_command(prepare.main, [*flags, f"--text={text}", f"--output={tmp_path / 'prepared'}"]) == 0
    text.unlink()
    capsys.readouterr()
    assert run_here(tmp_path / "stopped", steps=4) == 0
    assert "a.txt: no longer exists, so its token ids in" in read_stderr(capsys)
    assert state_digests(tmp_path / "stopped", 4) == state_digests(tmp_path / "whole", 4)
    (ids,) = (tmp_path / "stopped" / "data").glob("*/*.ids")
    content = bytearray(ids.read_bytes())
    content[5] ^= 1
    ids.write_bytes(content)
    assert run_here(tmp_path / "stopped", steps=6) == 66
    assert "are damaged: restore one of them, or prepared data" in read_stderr(capsys)
    # The run goes on with the prepared text, and one that starts with it has the same losses.
    assert run_here(tmp_path / "stopped", steps=6, text=tmp_path / "prepared", verify=True) == 0
    assert run_here(tmp_path / "whole", steps=6, text=tmp_path / "prepared") == 0
    assert state_digests(tmp_path / "stopped", 6) == state_digests(tmp_path / "whole", 6)
    assert not RunDirectory(tmp_path / "stopped").read_config().verify
    assert run_here(tmp_path / "prepared run", **options | {"text": tmp_path / "prepared", "steps": 6}) == 0
    plain, prepared = ([line["loss"] for line in metrics(tmp_path / run)] for run in ("whole", "prepared run"))
    assert len(plain) == 6 and plain == prepared
    capsys.readouterr()
    (tmp_path / "prepared" / "00003.ids").unlink()
    assert run_here(tmp_path / "stopped", steps=8) == 66
    assert "prepared: 00003.ids missing" in read_stderr(capsys)


def test_a_run_with_checkpoints_does_not_need_its_model(own, trained, tmp_path):
    shutil.rmtree(own.parent / "model")
    assert run_here(own, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(trained / "out")


def test_checkpoints_of_another_run_are_refused(start, trained, small, tmp_path, capsys):
    """Steps copied from another run, and the remains of an earlier run in the same folder."""
    run = copy_run(trained / "run", tmp_path / "run", until=STEPS - SAVE)
    foreign = json.loads((small / "run" / "run.json").read_text())["id"]
    shutil.copytree(small / "run" / "checkpoints" / "2", run / "checkpoints" / str(STEPS))
    assert run_here(run, export_only=True, export=tmp_path / "out") == 0
    stderr = read_stderr(capsys)
    assert f"{run}/checkpoints/{STEPS}: belongs to another run (id {foreign}): set aside" in stderr
    assert f"{STEPS - SAVE} steps are done" in stderr and newest(run) == STEPS - SAVE
    assert (run / "checkpoints" / f"{STEPS}.foreign").is_dir()
    for step in range(SAVE, STEPS, SAVE):
        shutil.rmtree(run / "checkpoints" / str(step))
    (run / "checkpoints" / f"{STEPS}.foreign").rename(run / "checkpoints" / str(STEPS))
    assert run_here(run) == 2
    assert "no other step is of this run" in read_stderr(capsys)
    # Frozen tensors are checked even if they are equal.
    other = copy_run(small / "run", tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "frozen")
    shutil.copytree(trained / "run" / "checkpoints" / "frozen", other / "checkpoints" / "frozen")
    assert run_here(other) == 2
    assert "frozen: belongs to another run" in read_stderr(capsys)
    # A new run in a folder with old checkpoints.
    (run / "config.yaml").unlink()
    options = usual(start, only="injected")
    assert run_here(run, **options) == 2
    assert "contains checkpoints of an earlier run" in read_stderr(capsys)
    # A new run that starts from this one.
    other = tmp_path / "third"
    assert run_here(other, **options | {"model": run, "steps": 1}) != 0
    capsys.readouterr()


def test_a_run_starts_from_another_only_with_the_checkpoints_of_that(small, trained, start, tmp_path, capsys):
    other = copy_run(trained / "run", tmp_path / "other", until=SAVE)
    shutil.rmtree(other / "checkpoints" / str(SAVE))
    shutil.copytree(small / "run" / "checkpoints" / "2", other / "checkpoints" / "2")
    assert run_here(tmp_path / "run", **usual(start) | {"model": other}) == 2
    assert "checkpoints/2: belongs to another run" in read_stderr(capsys)
    assert (other / "checkpoints" / "2").is_dir()


def replace_in(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            lambda run: replace_in(run / "config.yaml", "seed: 0", "seed: 1"),
            2,
            "config.yaml: does not match run.json: seed was 0",
        ),
        (lambda run: replace_in(run / "config.yaml", "only: injected", "only: all"), 2, "config.yaml: does not match"),
        (lambda run: replace_in(run / "config.yaml", "seed: 0", "seed: [0"), 2, "config.yaml: is not YAML"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe"), 2, "config.yaml: is not YAML"),
        (lambda run: replace_in(run / "model" / "config.json", "10000.0", "20000.0"), 2, "config.json: was changed"),
        (lambda run: os.truncate(run / "model" / "config.json", 2**40), 2, "config.json: was changed"),
        (lambda run: (run / "model" / "config.json").unlink(), 2, "config.json: was removed"),
        (lambda run: (run / "model" / "tokenizer.json").write_text("{}"), 2, "tokenizer.json: was added"),
        (lambda run: replace_in(run / "growth.json", "tli", "dus"), 2, "growth.json: was changed"),
        (lambda run: (run / "growth.json").unlink(), 2, "growth.json: was removed"),
        (lambda run: (run / "run.json").unlink(), 66, "run.json: is missing"),
        (lambda run: (run / "run.json").write_text("{"), 65, "run.json"),
        (lambda run: (run / "run.json").write_text("{}"), 65, "run.json: .*id.* is missing or damaged"),
        (lambda run: replace_in(run / "run.json", '"id": "', '"id": 1, "was": "'), 65, "run.json: id is missing"),
        (lambda run: replace_in(run / "run.json", '"dtypes"', '"dtype"'), 65, "run.json: dtypes is missing"),
        (lambda run: replace_in(run / "run.json", '"growth.json"', '"../../x"'), 65, "run.json: files is missing"),
        (
            lambda run: replace_in(run / "run.json", '"jax": "', '"jax": "1'),
            2,
            "the run.json of this run changed",
        ),
        (lambda run: replace_in(run / "run.json", '"seed": 0', '"seed": 1'), 2, "config.yaml: does not match"),
        (lambda run: replace_in(run / "run.json", '"id": "', '"id": "0'), 2, "belongs to another run"),
        (lambda run: fifo(run / "run.json"), 66, "run.json: is missing"),
        (lambda run: fifo(run / "model" / "config.json"), 2, "config.json: was changed"),
        (lambda run: fifo(run / "lock"), 0, ""),
        (lambda run: fifo(run / "metrics.jsonl"), 0, ""),
    ],
)
def test_changed_files_of_a_run(trained, tmp_path, capsys, change, code, message):
    run = copy_run(trained / "run", tmp_path / "run")
    change(run)
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert run_here(run) == code
    error = read_stderr(capsys)
    assert code == 0 or re.search(f"error: .*{message}", error)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == steps


def fifo(file):
    file.unlink()
    os.mkfifo(file)


def test_variable_options_may_be_edited(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    replace_in(run / "config.yaml", f"steps: {STEPS}", f"steps: {HALF}")
    assert run_here(run) == 0
    assert f"{STEPS} steps are done" in read_stderr(capsys)


def test_a_damaged_log_does_not_block_resuming(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=STEPS - SAVE)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:5], b"null", b"\xff", *lines[6:]]) + b"\n")
    assert run_here(run) == 0
    assert f"metrics.jsonl: 2 of {STEPS + 1} lines are damaged and ignored" in read_stderr(capsys)
    steps = [line["step"] for line in metrics(run)]
    assert steps == [*range(1, 6), *range(7, STEPS + 1)]


def test_finished_run_exports(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):  # a run may replace its own export
        assert run_here(run, export=tmp_path / "out") == 0
        stderr = read_stderr(capsys)
        assert f"{STEPS} steps are done" in stderr and f"exported to {tmp_path / 'out'}" in stderr
    assert tensors(tmp_path / "out") == tensors(trained / "out")
    assert (run / "metrics.jsonl").read_bytes() == before
    # But no other folder.
    assert run_here(run, export=trained / "out") == 0
    shutil.copytree(trained / "out", tmp_path / "foreign")
    (tmp_path / "foreign" / "training.json").unlink()
    assert run_here(run, export=tmp_path / "foreign") == 73


def test_export_only(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=HALF)
    stored = (run / "config.yaml").read_bytes()
    assert run_here(run, export_only=True, export=tmp_path / "out", max_shard_size="100KB") == 0
    assert f"{HALF} steps are done" in read_stderr(capsys)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == HALF
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    early, late = tensors(tmp_path / "out"), tensors(trained / "out")
    assert {name for name in late if early[name] != late[name]} == {n for n in late if re.search(r"\.(2|5)\.", n)}
    assert (run / "config.yaml").read_bytes() == stored and newest(run) == HALF


@pytest.fixture(scope="session")
def small(once, start):
    """A bfloat16 model of two layers, ``grown`` from a ``base`` of one, and a ``run`` of two steps with its export."""

    def make(folder):
        config = tli_jax.LlamaConfig(64, 32, 64, 1, 4, 2, 8, dtype="bfloat16", initializer_range=0.1, bos_token_id=0)
        params, plan = tli_jax.init_params(config, jax.random.key(1), "bfloat16"), tli_jax.tli(1, every=1)
        tli_jax.save_hf(folder / "base", config, params)
        tli_jax.save_hf(folder / "grown", config, tli_jax.inject(params, plan), plan=plan)
        options = SMALL | {"model": folder / "grown", "text": start / "ids.npy", "steps": 2}
        assert run_here(folder / "run", **options) == 0
        assert run_here(folder / "run", export=folder / "out") == 0

    return once("small", make)


def test_bf16_model_exports_bf16(small):
    assert {tensor.dtype for tensor in open_checkpoint(small / "out").tensors.values()} == {"BF16"}
    old, new = tensors(small / "grown"), tensors(small / "out")
    changed = {name for name in old if old[name] != new[name]}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


def test_layers_stored_in_different_dtypes_train_resume_and_export(start, tmp_path, capsys):
    mixed = shutil.copytree(start / "grown", tmp_path / "mixed")
    stored = load_file(mixed / "model.safetensors")
    for name in stored:
        if name.startswith("model.layers.1."):
            stored[name] = stored[name].astype(ml_dtypes.bfloat16)
    save_file(stored, mixed / "model.safetensors")
    options = usual(start, only="injected") | {"model": mixed}
    assert run_here(tmp_path / "run", **options | {"steps": 1}) == 0
    assert "layers are stored in different dtypes" in read_stderr(capsys)
    assert run_here(tmp_path / "run", steps=2, export=tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in stored.items():
        assert exported[name].dtype == np.float32  # holds the values of both dtypes
        is_kept = not name.startswith(("model.layers.2.", "model.layers.5."))
        assert is_kept == bool((exported[name] == array.astype(np.float32)).all()) or "norm" in name


def test_experts_train_on_a_mesh_resume_and_export_as_mixtral(start, tmp_path):
    config, params = tli_jax.load_hf(start / "base")
    plan = dataclasses.replace(tli_jax.moe(4), experts=tli_jax.Experts(count=4, router_std=0.1))
    mixture = tli_jax.upcycle(params, plan.experts)
    tli_jax.save_hf(tmp_path / "moe", tli_jax.grown_config(config, plan), mixture, plan=plan)
    options = BASIC | {"model": tmp_path / "moe", "text": start / "ids.npy", "save-every": 4, "validate-every": 8}
    options |= {"mesh": "fsdp=2,expert=4"}
    assert run_here(tmp_path / "one", **options, steps=8, export=tmp_path / "out") == 0
    assert run_here(tmp_path / "two", **options, steps=4) == 0
    assert run_here(tmp_path / "two", **options, steps=8, export=tmp_path / "again") == 0
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and all(1 <= line["balance"] < 2 for line in lines if "loss" in line)
    one, two = ([line[:2] for line in losses(tmp_path / name)] for name in ("one", "two"))  # without the validation
    assert one == two
    assert tensors(tmp_path / "again") == tensors(tmp_path / "out")
    trained, _ = tli_jax.load_hf(tmp_path / "out")
    assert (trained.num_experts, trained.experts_per_token) == (4, 2)
    old = tensors(tmp_path / "moe")
    assert tensors(tmp_path / "out").keys() == old.keys()
    assert all(tensors(tmp_path / "out")[name] != old[name] for name in old if "experts" in name)


def test_a_run_starts_from_another_run(small, start, tmp_path):
    # With other sizes, on another mesh, and a learning rate of 0, which keeps the parameters.
    options = {"batch-size": 16, "sequence-length": 8, "steps": 1, "learning-rate": 0, "mesh": "fsdp=4,tensor=2"}
    options |= {"model": small / "run", "text": start / "ids.npy"}
    assert run_here(tmp_path / "run", **SMALL | options, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(small / "out")
    assert json.loads((tmp_path / "run" / "growth.json").read_text())["injected"] == [False, True]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["id"] != json.loads((small / "run" / "run.json").read_text())["id"]
    assert run_here(tmp_path / "run") == 0


@pytest.mark.long
def test_options_that_may_change(small, tmp_path):
    run = copy_run(small / "run", tmp_path / "moved")
    options = {"steps": 5, "save-every": 2, "keep": 2, "validate-every": 1, "validation-batches": 1}
    assert run_here(run, **options, mesh="data=2,fsdp=4", max_shard_size="100KB", process=None) == 0
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [2, 3, 4, 5]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "5", "frozen"]
    stored = RunDirectory(run).read_config()
    assert stored.steps == 5 and stored.mesh == {"data": 2, "fsdp": 4} and stored.run == str(run)


def test_loss_is_not_finite(small, start, tmp_path, capsys):
    shutil.copytree(small / "grown", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = b"\xc0\x7f"  # NaN in bf16
    file.write_bytes(content)
    options = SMALL | {"model": tmp_path / "model", "text": start / "ids.npy", "save-every": 2, "skip-limit": 3}
    assert run_here(tmp_path / "run", **options) == 76
    assert "step 3: 3 bad steps in a row (loss nan" in read_stderr(capsys)
    lines = metrics(tmp_path / "run")
    assert [(line["skipped"], line["loss"]) for line in lines] == [(1, None), (2, None), (3, None)]
    assert lines[0]["validation_loss_before"] is None
    # The checkpoint has the parameters of the start.
    assert run_here(tmp_path / "run", export_only=True, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "model")


def test_gradient_spikes(small, start, tmp_path, capsys):
    options = SMALL | {"model": small / "grown", "text": start / "ids.npy", "skip-limit": 6, "save-every": 2}
    assert run_here(tmp_path / "run", **options, keep=100) == 76
    assert "step 26: 6 bad steps in a row" in read_stderr(capsys)
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [0] * 20 + [1, 2, 3, 4, 5, 6]
    assert newest(tmp_path / "run") == 24  # complete, although the run ended while writing it
    good, bad = state_digests(tmp_path / "run", 20), state_digests(tmp_path / "run", 24)
    assert {name for name in good if good[name] != bad[name]} == {"step", "skipped"}


def test_disk_full_while_saving(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=HALF)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    # Write nothing to the compilation cache, which would fail with a warning.
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code = run_here(run, steps=2 * STEPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    assert code == 74
    assert "writing a checkpoint failed" in read_stderr(capsys)
    # Steps run on while a checkpoint is written, but no further than to the next one.
    assert newest(run) == HALF and len(metrics(run)) <= HALF + 2 * SAVE
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.fixture
def disk(tmp_path):
    """A folder on a separate disk, and a function that remounts the disk with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=64m,nr_inodes=100k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tli_jax_test", folder], check=False).returncode:
        pytest.skip("only root may mount")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("what", ["nr_inodes", "size"])
def test_disk_full_at_any_moment(disk, small, start, tmp_path, capsys, what):
    """Allow a few more files or pages at a time until a run succeeds, first a new run, then a resumed one."""
    folder, remount = disk
    options = SMALL | {"model": small / "grown", "text": start / "ids.npy", "save-every": 1}
    failures = 0
    for steps, more in [(2, range(1, 200, 3)), (4, range(0, 200, 5))]:
        stats = os.statvfs(folder)
        used = {"nr_inodes": stats.f_files - stats.f_ffree, "size": (stats.f_blocks - stats.f_bfree) * 4096}[what]
        for room in more:
            remount(f"{what}={used + room * (1 if what == 'nr_inodes' else 4096)}")
            if (code := run_here(folder / "run", **options | {"steps": steps})) == 0:
                break
            error = read_stderr(capsys).splitlines()[-1]
            assert code in (73, 74) and str(folder) in error and "No space left" in error, error
            failures += 1
        assert code == 0
        read_stderr(capsys)
    assert [line["step"] for line in metrics(folder / "run")] == [1, 2, 3, 4]
    assert failures > 10


def test_upscale_continues_with_training(small, start, tmp_path, capsys):
    section = SMALL | {"text": start / "ids.npy", "run": tmp_path / "run", "steps": 100}
    file = tmp_path / "both.yaml"
    lines = [f"model: {small / 'base'}", f"output: {tmp_path / 'grown'}", "every: 1", "proof: false", "train:"]
    file.write_text("\n".join(lines + [f"  {name.replace('-', '_')}: {value}" for name, value in section.items()]))

    def both(*flags):
        code = run_command(upscale.main, ["--config", str(file), *map(str, flags)])
        return code, capsys.readouterr().err

    assert both("--train.steps", 3, "--train.export", tmp_path / "out")[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    at = (tmp_path / "grown" / "growth.json").stat().st_mtime_ns
    # The second time it does not grow again, and resumes the run.
    code, stderr = both("--train.steps", 5)
    assert code == 0 and "skipping growth" in stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "grown" / "growth.json").stat().st_mtime_ns == at
    # The same file works for the training alone.
    assert run_command(train.main, ["--config", str(file), "--steps", "5"]) == 0
    assert "5 steps are done" in read_stderr(capsys)
    old, new = tensors(tmp_path / "grown"), tensors(tmp_path / "out")
    assert {re.findall(r"\d+", name)[0] for name in old if old[name] != new[name]} == {"1"}


# Refusals, before anything is compiled.


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"mesh": "data=3,fsdp=2"}, 2, "data 3 × fsdp 2 × expert 1 × tensor 1 does not give the 8 devices"),
        ({"mesh": "data=-1,tensor=3"}, 2, "data -1 × fsdp 1 × expert 1 × tensor 3 does not give the 8 devices"),
        ({"mesh": "fsdp=-1,tensor=-1"}, 2, "at most one may be -1"),
        ({"mesh": "tensr=2"}, 2, "mesh"),
        ({"mesh": "tensor=4,fsdp=2"}, 2, "key/value heads 2 is not divisible by tensor = 4"),
        ({"batch-size": 12}, 2, "batch size / grad_accum_steps 12 is not divisible by fsdp = 8"),
        ({"grad-accum-steps": 3}, 2, "batch_size 8 is not a multiple of grad_accum_steps 3"),
        ({"lerning-rate": 1}, 2, "--lerning-rate is not known, did you mean --learning-rate?"),
        ({"steps": "many"}, 2, "steps is 'many'"),
        ({"steps": 0}, 2, "steps is '0'"),
        ({"only": "injectd"}, 2, "only: 'injectd' is not valid"),
        ({"only": "last_n(7)"}, 2, "the model has 6 layers, choose 1 to 6"),
        ({"model": None}, 2, "model is not set"),
        ({"text": None}, 2, "text is not set"),
        ({"export-only": True}, 2, "has not begun"),
        ({"model": "nowhere"}, 66, "nowhere"),
        ({"text": "nowhere.txt"}, 66, "nowhere.txt"),
        ({"model": "FOLDER/base", "only": "injected"}, 2, "injected needs a grown model"),
        ({"export": "RUN/out"}, 2, "must not be the same folder, and neither may contain"),
        (
            {"export": "FOLDER/grown", "overwrite": True},
            2,
            "must not be the same folder, and neither may contain the other",
        ),
        ({"sequence-length": 5000}, 65, "has 4,001 tokens, one window takes 5,001"),
        ({"batch-size": 256}, 65, "a batch needs 256 of 16 + 1 tokens"),
    ],
)
def test_wrong_options_are_refused(start, tmp_path, capsys, options, code, message):
    folders = {"RUN": str(tmp_path / "run"), "FOLDER": str(start)}
    options = {
        name: re.sub("RUN|FOLDER", lambda match: folders[match[0]], value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    assert run_here(tmp_path / "run", **usual(start) | options) == code
    assert message in read_stderr(capsys)
    assert not newest(tmp_path / "run")


def test_a_folder_that_is_not_a_run(start, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert run_here(tmp_path / "run", **usual(start)) == 73
    assert "is not a run and not empty (thesis.tex)" in read_stderr(capsys)
    assert run_command(train.main, flags("", **usual(start))) == 2
    (tmp_path / "file").touch()
    assert run_here(tmp_path / "file", **usual(start)) == 73


@pytest.mark.long
def test_a_run_starts_after_a_kill_during_its_start(small, start, tmp_path):
    """A run begins when its configuration is written; earlier files are ignored."""
    run = tmp_path / "run"
    shutil.copytree(start / "grown", run / "start")
    (run / "model").mkdir()
    (run / "model" / "tokenizer.json").touch()
    (run / ".start.partial-x").mkdir()
    (run / ".config.yaml.partial").write_text("half: ")
    shutil.copy(start / "grown" / "growth.json", run)
    assert run_here(run, **BASIC, model=small / "base", text=start / "ids.npy", validation_fraction=0, steps=1) == 0
    assert not (run / "growth.json").exists() and not (run / "model" / "tokenizer.json").exists()
    assert run_here(run) == 0


def test_unknown_key_in_a_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: x\nlerning_rate: 1\nsteps: yes\n")
    assert run_command(train.main, ["--config", str(tmp_path / "run.yaml")]) == 2
    stderr = read_stderr(capsys)
    assert "'lerning_rate' is not known, did you mean learning_rate?" in stderr
    assert "steps is True, must be a number" in stderr


def test_tokenizer_larger_than_the_vocabulary(start, tmp_path, capsys):
    shutil.copytree(start / "base", tmp_path / "model")
    shutil.copy(hub.resolve("embedded") / "tokenizer.json", tmp_path / "model")
    assert run_here(tmp_path / "run", **usual(start) | {"model": tmp_path / "model"}) == 65
    assert "tokenizer" in read_stderr(capsys)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [("a.txt", b"one\ntwo\xff\n", "a.txt: line 2"), ("b.jsonl", b'{"text": "one"}\n{"text": \n', "b.jsonl: line 2")],
)
def test_text_that_cannot_be_read(start, tmp_path, capsys, name, content, where):
    (tmp_path / name).write_bytes(content)
    options = USUAL | {"model": "embedded", "text": tmp_path / name}
    assert run_here(tmp_path / "run", **options) == 65
    assert where in read_stderr(capsys)
