"""Continued pretraining as its user meets it: what a run writes, how it is gone on with, and what it refuses.

Where the end of a process matters, real processes with one device; elsewhere within this one, which has eight.
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
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

import tli_jax
from tli_jax import train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("_compile_once")

B, T, STEPS, SAVE, VALIDATE = 8, 16, 40, 10, 20
BASIC = {"batch-size": B, "sequence-length": T, "dtypes": "compute=float32", "learning-rate": 0.01, "warmup": 5}
USUAL = BASIC | {"steps": STEPS, "save-every": SAVE, "validate-every": VALIDATE}
# Of the small model: all runs of it are one program. From step 20 on every gradient is a spike.
SMALL = BASIC | {"only": "injected", "schedule": "constant", "spike": 1e-6}

# The command, slowed down from some step on, so that there is time to do something to it.
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


def words(run, **options):
    """Options of a run as a command line; None leaves one out, True and False are switches."""
    found = []
    for name, value in ({"run": run} | options).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def here(run, **options):
    """The command within this process; its exit code."""
    return run_command(train.main, words(run, **options))


def usual(start, model="grown", **options):
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return USUAL | {"model": start / model, "text": start / "ids.npy"} | options


def say(capsys):
    """What was said on stderr; the error is one line, and nothing comes after it."""
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) <= 1 and "Traceback" not in captured.err
    assert not errors or captured.err.endswith(errors[0] + "\n")
    return captured.err


def inode(file):
    return file.stat().st_ino if file.is_file() else None


class Process:
    """A real one, with one device."""

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
        """Until that step is in the metrics, and a checkpoint complete."""
        file = self.run / "metrics.jsonl"
        until = time.monotonic() + 120
        while not (
            inode(file) != self.before  # which is put in the place of the old one
            and file.read_bytes().count(b"\n") >= step
            and (checkpoint is None or (self.run / "checkpoints" / str(checkpoint)).is_dir())
        ):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.005)
        return self

    def end(self, number=None, code=0):
        """Send a signal, and wait: all that it said."""
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
    """Of every array of a step's state: parameters, moments, step, and the running mean of the gradient's norm."""
    meta = json.loads((run / "checkpoints" / str(step) / "meta" / "meta.json").read_text())["content"]
    assert meta["meta"]["step"] == step
    return {name: array["digest"] for name, array in meta["arrays"].items()}


def tensors(folder):
    return {name: read_tensor(tensor).tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


def copy_run(source, target, until=STEPS):
    """A run as it was when a step was complete."""
    shutil.copytree(source, target)
    for step in (target / "checkpoints").iterdir():
        if step.name.isdecimal() and int(step.name) > until:
            shutil.rmtree(step)
    return target


# Real processes. Two threads of stories, told once; the tests look at what they left.


def tell_killed(folder, start, environment):
    options = usual(start, only="injected")
    straight, killed = folder / "straight", folder / "killed"
    Process(environment, words(straight, **options, export=folder / "straight-out")).end()
    every = words(killed, **options, export=folder / "killed-out")
    Process(environment, every, slow=(21, 0.3)).wait_for(23, checkpoint=20).end(signal.SIGKILL, -9)
    kill_somewhere(environment, every, random.Random(1))
    (folder / "last.err").write_text(Process(environment, every).end())


def tell_stopped(folder, start, environment):
    options = usual(start, only="all", grad_accum_steps=2)
    straight, stopped = folder / "straight", folder / "stopped"
    Process(environment, words(straight, **options, export=folder / "straight-out")).end()
    every = words(stopped, **options, export=folder / "stopped-out")
    first = Process(environment, every, slow=(3, 0.6)).wait_for(3)
    second = Process(environment, every).end(code=73)
    said = {"second": second, "SIGTERM": first.end(signal.SIGTERM, 75), "saved": [newest(stopped)]}
    said["SIGINT"] = Process(environment, every, slow=(15, 0.3)).wait_for(16).end(signal.SIGINT, 75)
    said["saved"].append(newest(stopped))
    # Nothing but the run: the rest is known.
    Process(environment, words(stopped)).end()
    (folder / "said.json").write_text(json.dumps(said))


def kill_somewhere(environment, arguments, draw):
    """SIGKILL at a random moment: of the start, or some steps after the newest checkpoint, or while one is written."""
    process = Process(environment, arguments, slow=(0, 0.05))
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0.2, 4))
    else:
        done = newest(process.run)
        process.wait_for(done + draw.randrange(1, 1 + SAVE + 3))
        time.sleep(draw.uniform(0, 0.1))
    process.end(signal.SIGKILL, -9)


def newest(run):
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0) if folder.is_dir() else 0


@pytest.fixture(scope="session")
def stories(once, start, compiled):
    """Folders of what was killed and of what was stopped, each beside what ran straight."""

    def make(folder):
        (folder / "kill").mkdir()
        (folder / "stop").mkdir()
        with ThreadPoolExecutor(2) as pool:
            both = pool.submit(tell_killed, folder / "kill", start, compiled)
            tell_stopped(folder / "stop", start, compiled)
            both.result()

    folder = once("stories", make)
    return folder / "kill", folder / "stop"


@pytest.mark.parametrize(("number", "name"), [(0, "killed"), (1, "stopped")])
def test_what_ends_early_ends_like_what_ran_straight_bit_for_bit(stories, number, name):
    folder = stories[number]
    straight, other = folder / "straight", folder / name
    assert losses(other) == losses(straight)
    assert len(losses(other)) == STEPS
    assert tensors(folder / f"{name}-out") == tensors(folder / "straight-out")
    digests = state_digests(straight)
    assert state_digests(other) == digests
    parts = {name.split(".")[0] for name in digests}
    assert {"step", "trained", "moments", "norm"} <= parts


def test_restored_states_are_equal_bit_for_bit(stories):
    """Read back as training does, not by what was noted when they were saved."""
    folder = stories[0]
    states = []
    for name in ("straight", "killed"):
        run = train.RunDirectory(folder / name)
        config = run.read_config()
        start = train._open_model(config, run)
        trainer, _, _ = train.make_trainer(config, start.model, start.plan)
        checkpoints = Checkpoints(run.checkpoints, 1, run.identity, read_only=True)
        step, state, meta = checkpoints.restore_newest(trainer.abstract_state(), pytest.fail)
        checkpoints.close()
        assert step == STEPS == int(state.step) and meta["tokens"] == STEPS * B * T
        states.append(jax.device_get(state))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_kill_loses_nothing_that_was_complete(stories):
    said = (stories[0] / "last.err").read_text()
    assert "error" not in said
    assert re.search(r"^train .*done", said, re.M)
    assert (stories[0] / "killed" / "checkpoints" / "20").is_dir()


def test_signals_save_the_step_they_name(stories):
    said = json.loads((stories[1] / "said.json").read_text())
    for name, saved in zip(("SIGTERM", "SIGINT"), said["saved"], strict=True):
        (line,) = [line for line in said[name].splitlines() if line.startswith("error:")]
        assert f"stopped at step {saved}, which is saved: run the same command again" in line
    assert 3 <= said["saved"][0] < said["saved"][1] < STEPS


def test_second_run_on_a_folder_is_refused(stories):
    said = json.loads((stories[1] / "said.json").read_text())["second"]
    assert "in use by another process" in said and str(stories[1] / "stopped") in said


@pytest.mark.long
@pytest.mark.parametrize("only", ["injected", "all"])
def test_ten_kills(start, stories, compiled, tmp_path, only):
    options = usual(start, only=only) | ({"grad_accum_steps": 2} if only == "all" else {})
    every, draw = words(tmp_path / "run", **options, export=tmp_path / "out"), random.Random(only)
    for _ in range(10):
        if newest(tmp_path / "run") >= 30:  # from here on a kill may come too late
            shutil.rmtree(tmp_path / "run")
        kill_somewhere(compiled, every, draw)
    Process(compiled, every).end()
    straight = stories[only == "all"]
    assert losses(tmp_path / "run") == losses(straight / "straight")
    assert state_digests(tmp_path / "run") == state_digests(straight / "straight")
    assert tensors(tmp_path / "out") == tensors(straight / "straight-out")


@pytest.mark.long
def test_what_is_compiled_anew_gives_the_same_bits(start, stories, tmp_path):
    """The other processes here share what was compiled; a user's do not."""
    every = words(tmp_path / "run", **usual(start, only="injected"))
    Process({}, every, slow=(21, 0.3)).wait_for(23, checkpoint=20).end(signal.SIGKILL, -9)
    Process({}, every).end()
    assert state_digests(tmp_path / "run") == state_digests(stories[0] / "straight")


# Within this process: a run over eight devices, which others start from.


@pytest.fixture(scope="session")
def trained(once, start):
    """A run of the grown model's injected layers to its end, ``run``, and its export, ``out``."""

    def make(folder):
        assert here(folder / "run", **usual(start, only="injected", keep=100)) == 0
        assert here(folder / "run", export=folder / "out") == 0  # copies of the run do not know of it

    return once("trained", make)


def test_only_the_injected_layers_change(start, trained):
    before, after = tensors(start / "grown"), tensors(trained / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    # The layers after the 2nd and the 4th of the base; every tensor of them has had a gradient.
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
    # It has learnt: nothing else was said to.
    ids = np.load(start / "ids.npy")[-512:].reshape(8, 64).astype(np.int32)
    before = tli_jax.load_hf(start / "grown")
    assert loss_of(config, params, ids) < loss_of(*before, ids) - 0.2


def loss_of(config, params, ids):
    logits = np.asarray(tli_jax.forward(config, params, ids), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, ids[:, 1:, None], -1).mean()


def test_transformers_gives_the_same_loss(start, trained):
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
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40]
    assert [line["step"] for line in lines if "validation_loss_before" in line] == [1]
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss_before"] - 0.2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert all(line["skipped"] == 0 and line["tokens_per_second"] > 0 for line in lines)
    assert lines[0]["learning_rate_injected"] < lines[4]["learning_rate_injected"] == pytest.approx(0.01)
    assert not any("learning_rate_kept" in line for line in lines)


def test_another_mesh_goes_on_with_the_same_losses(start, trained, tmp_path):
    run = copy_run(trained / "run", tmp_path / "run", until=20)
    before = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    # As a kill leaves it: steps after the checkpoint, the last one half written.
    (run / "metrics.jsonl").write_text("".join(before[:25]) + before[25][:40])
    assert here(run, mesh="data=2,fsdp=2,tensor=2") == 0
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:20] == before[:20]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    compare_losses(run, trained / "run")


def test_one_device_goes_on_with_what_eight_began(start, trained, stories, compiled, tmp_path):
    run = copy_run(trained / "run", tmp_path / "run", until=20)
    Process(compiled, words(run)).end()
    compare_losses(run, trained / "run")
    compare_losses(stories[0] / "straight", trained / "run")


def compare_losses(one, other):
    pairs = [np.array([[v or 0 for v in line] for line in losses(run)]) for run in (one, other)]
    np.testing.assert_allclose(*pairs, rtol=2e-4)


def data_files(step):
    """All that hold array data: which of them a restore reads depends on how the writers met."""
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
    flip(run / "checkpoints" / "40")
    lose(run / "checkpoints" / "30")
    assert here(run, export=tmp_path / "out") == 0
    said = say(capsys)
    for step in (30, 40):
        assert re.search(rf"{run}/checkpoints/{step}: .*: set aside, resuming from the step before", said)
    assert losses(run) == losses(trained / "run")
    assert state_digests(run) == state_digests(trained / "run")
    assert tensors(tmp_path / "out") == tensors(trained / "out")


@pytest.mark.parametrize(
    ("changed", "said"),
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
def test_another_configuration_is_refused(start, trained, capsys, changed, said):
    assert here(trained / "run", **usual(start, only="injected") | changed) == 2
    error = say(capsys)
    assert said in error and "use another run" in error


@pytest.fixture(scope="session")
def relative(once, start):
    """A finished run whose model and text are nobody else's, by relative paths: the folder can be copied."""

    def make(folder):
        shutil.copytree(start / "grown", folder / "model")
        shutil.copy(start / "ids.npy", folder / "ids.npy")
        with contextlib.chdir(folder):
            options = usual(start, only="injected", keep=100) | {"model": "model", "text": "ids.npy"}
            assert here("run", **options) == 0

    return once("relative", make)


@pytest.fixture
def own(relative, tmp_path, monkeypatch):
    shutil.copytree(relative, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_other_model_under_the_same_name_is_refused(own, start, capsys):
    file = own.parent / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert here(own) == 2
    assert "the model is not what the run was started with" in say(capsys)


def test_other_plan_under_the_same_name_is_refused(own, capsys):
    file = own.parent / "model" / "growth.json"
    growth = json.loads(file.read_text())
    # The first injected layer and the kept one before it change places: tensors and shapes stay.
    growth["rows"][1], growth["rows"][2] = growth["rows"][2], growth["rows"][1]
    for key in ("injected", "trainable"):
        growth[key][1], growth[key][2] = growth[key][2], growth[key][1]
    file.write_text(json.dumps(growth))
    capsys.readouterr()
    assert here(own) == 2
    assert "the model is not what the run was started with" in say(capsys)


def test_other_data_under_the_same_name_are_refused(own, capsys):
    ids = np.load(own.parent / "ids.npy")
    ids[7] ^= 1
    np.save(own.parent / "ids.npy", ids)
    capsys.readouterr()
    assert here(own) == 2
    assert "the data is not what the run was started with" in say(capsys)


def test_text_from_elsewhere_is_refused_if_it_is_another(own, capsys):
    ids = np.load(own.parent / "ids.npy")
    ids[7] ^= 1
    np.save(own.parent / "other.npy", ids)
    assert here(own, text=own.parent / "other.npy") == 2
    assert "the data is not what the run was started with" in say(capsys)


def test_ids_may_move_or_be_gone_once_the_run_is_finished(own, trained, tmp_path, capsys):
    (tmp_path / "moved").mkdir()
    (own.parent / "ids.npy").rename(tmp_path / "moved" / "other_name.npy")
    assert here(own, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(trained / "out")
    assert here(own, steps=STEPS + 1) == 66
    assert "ids.npy: no such file or folder" in say(capsys)
    assert here(own, steps=STEPS + 1, text=tmp_path / "moved" / "other_name.npy") == 0
    assert newest(own) == STEPS + 1


def test_text_may_be_gone_if_its_tokens_are_whole(small, tmp_path, capsys):
    shutil.copytree(small / "grown", tmp_path / "model")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i + 2 for i, letter in enumerate(letters)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time, there was a girl. " * 60)
    options = SMALL | {"model": tmp_path / "model", "text": text, "steps": 2, "batch-size": 8}
    for run in ("whole", "stopped"):
        assert here(tmp_path / run, **options) == 0
    assert here(tmp_path / "whole", steps=4) == 0
    text.unlink()
    capsys.readouterr()
    assert here(tmp_path / "stopped", steps=4) == 0
    assert "a.txt: is gone, so the run goes on with its tokens" in say(capsys)
    assert state_digests(tmp_path / "stopped", 4) == state_digests(tmp_path / "whole", 4)
    (ids,) = (tmp_path / "stopped" / "data").glob("*.ids")
    content = bytearray(ids.read_bytes())
    content[5] ^= 1
    ids.write_bytes(content)
    assert here(tmp_path / "stopped", steps=6) == 66
    assert "its tokens are not in" in say(capsys)


def test_a_run_needs_its_model_no_longer(own, trained, tmp_path):
    shutil.rmtree(own.parent / "model")
    assert here(own, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(trained / "out")


def test_checkpoints_of_another_run_are_not_taken(start, trained, small, tmp_path, capsys):
    """Steps copied in from another run, and all that is left in a folder that is used again."""
    run = copy_run(trained / "run", tmp_path / "run", until=30)
    foreign = json.loads((small / "run" / "run.json").read_text())["id"]
    shutil.copytree(small / "run" / "checkpoints" / "2", run / "checkpoints" / "40")
    assert here(run, export_only=True, export=tmp_path / "out") == 0
    said = say(capsys)
    assert f"{run}/checkpoints/40: belongs to another run (id {foreign}): set aside" in said
    assert "30 steps are done" in said and (run / "checkpoints" / "40.foreign").is_dir() and newest(run) == 30
    for step in ("10", "20", "30"):
        shutil.rmtree(run / "checkpoints" / step)
    (run / "checkpoints" / "40.foreign").rename(run / "checkpoints" / "40")
    assert here(run) == 2
    assert "no other step is of this run" in say(capsys)
    # The frozen tensors are checked even if they are the same.
    other = copy_run(small / "run", tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "frozen")
    shutil.copytree(trained / "run" / "checkpoints" / "frozen", other / "checkpoints" / "frozen")
    assert here(other) == 2
    assert "frozen: belongs to another run" in say(capsys)
    # Used again, with what was begun removed.
    (run / "config.yaml").unlink()
    options = usual(start, only="injected")
    assert here(run, **options) == 2
    assert "holds checkpoints of an earlier run" in say(capsys)
    # As a start from another run would read it.
    other = tmp_path / "third"
    assert here(other, **options | {"model": run, "steps": 1}) != 0
    capsys.readouterr()


def test_another_run_is_started_from_only_with_its_own_checkpoints(small, trained, start, tmp_path, capsys):
    other = copy_run(trained / "run", tmp_path / "other", until=10)
    shutil.rmtree(other / "checkpoints" / "10")
    shutil.copytree(small / "run" / "checkpoints" / "2", other / "checkpoints" / "2")
    assert here(tmp_path / "run", **usual(start) | {"model": other}) == 2
    assert "checkpoints/2: belongs to another run" in say(capsys)
    assert (other / "checkpoints" / "2").is_dir()


def replace_in(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("change", "code", "said"),
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
        (lambda run: replace_in(run / "run.json", '"jax": "', '"jax": "1'), 2, "saved with another run.json"),
        (lambda run: replace_in(run / "run.json", '"seed": 0', '"seed": 1'), 2, "config.yaml: does not match"),
        (lambda run: replace_in(run / "run.json", '"id": "', '"id": "0'), 2, "belongs to another run"),
        (lambda run: fifo(run / "run.json"), 66, "run.json: is missing"),
        (lambda run: fifo(run / "model" / "config.json"), 2, "config.json: was changed"),
        (lambda run: fifo(run / "lock"), 0, ""),
        (lambda run: fifo(run / "metrics.jsonl"), 0, ""),
    ],
)
def test_files_of_a_run_changed_behind_its_back(trained, tmp_path, capsys, change, code, said):
    run = copy_run(trained / "run", tmp_path / "run")
    change(run)
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert here(run) == code
    error = say(capsys)
    assert code == 0 or re.search(f"error: .*{said}", error)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == steps


def fifo(file):
    file.unlink()
    os.mkfifo(file)


def test_what_may_change_may_be_edited(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    replace_in(run / "config.yaml", f"steps: {STEPS}", "steps: 20")
    assert here(run) == 0
    assert "40 steps are done" in say(capsys)


def test_a_damaged_log_does_not_block_resuming(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=30)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:5], b"null", b"\xff", *lines[6:]]) + b"\n")
    assert here(run) == 0
    assert "metrics.jsonl: 2 of 41 lines are damaged and ignored" in say(capsys)
    steps = [line["step"] for line in metrics(run)]
    assert steps == [*range(1, 6), *range(7, STEPS + 1)]


def test_finished_run_exports(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):  # its own export it may replace
        assert here(run, export=tmp_path / "out") == 0
        said = say(capsys)
        assert "40 steps are done" in said and f"written to {tmp_path / 'out'}" in said
    assert tensors(tmp_path / "out") == tensors(trained / "out")
    assert (run / "metrics.jsonl").read_bytes() == before
    # What is not its own it may not.
    assert here(run, export=trained / "out") == 0
    shutil.copytree(trained / "out", tmp_path / "foreign")
    (tmp_path / "foreign" / "training.json").unlink()
    assert here(run, export=tmp_path / "foreign") == 73


def test_export_only(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=20)
    stored = (run / "config.yaml").read_bytes()
    assert here(run, export_only=True, export=tmp_path / "out", max_shard_size="100KB") == 0
    assert "20 steps are done" in say(capsys)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["step"] == 20
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    early, late = tensors(tmp_path / "out"), tensors(trained / "out")
    assert {name for name in late if early[name] != late[name]} == {n for n in late if re.search(r"\.(2|5)\.", n)}
    assert (run / "config.yaml").read_bytes() == stored and newest(run) == 20


@pytest.fixture(scope="session")
def small(once, start):
    """A model in bf16 of two layers, ``grown`` from a ``base`` of one, and a ``run`` of two steps with its export."""

    def make(folder):
        config = tli_jax.LlamaConfig(64, 32, 64, 1, 4, 2, 8, dtype="bfloat16", initializer_range=0.1, bos_token_id=0)
        params, plan = tli_jax.init_params(config, jax.random.key(1), "bfloat16"), tli_jax.tli(1, every=1)
        tli_jax.save_hf(folder / "base", config, params)
        tli_jax.save_hf(folder / "grown", config, tli_jax.inject(params, plan), plan=plan)
        options = SMALL | {"model": folder / "grown", "text": start / "ids.npy", "steps": 2}
        assert here(folder / "run", **options) == 0
        assert here(folder / "run", export=folder / "out") == 0

    return once("small", make)


def test_bf16_model_exports_bf16(small):
    assert {tensor.dtype for tensor in open_checkpoint(small / "out").tensors.values()} == {"BF16"}
    old, new = tensors(small / "grown"), tensors(small / "out")
    changed = {name for name in old if old[name] != new[name]}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


def test_layers_stored_in_different_dtypes_train_stop_and_come_back(start, tmp_path, capsys):
    mixed = shutil.copytree(start / "grown", tmp_path / "mixed")
    stored = load_file(mixed / "model.safetensors")
    for name in stored:
        if name.startswith("model.layers.1."):
            stored[name] = stored[name].astype(ml_dtypes.bfloat16)
    save_file(stored, mixed / "model.safetensors")
    options = SMALL | {"model": mixed, "text": start / "ids.npy", "only": "injected"}
    assert here(tmp_path / "run", **options, steps=1) == 0
    assert "layers are stored in different dtypes" in say(capsys)
    assert here(tmp_path / "run", steps=2, export=tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in stored.items():
        assert exported[name].dtype == np.float32  # which holds the values of both
        is_kept = not name.startswith(("model.layers.2.", "model.layers.5."))
        assert is_kept == bool((exported[name] == array.astype(np.float32)).all()) or "norm" in name


def test_experts_train_on_a_mesh_stop_and_come_back_as_a_mixtral(start, tmp_path):
    config, params = tli_jax.load_hf(start / "base")
    plan = dataclasses.replace(tli_jax.moe(4), experts=tli_jax.Experts(count=4, router_std=0.1))
    mixture = tli_jax.upcycle(params, plan.experts)
    tli_jax.save_hf(tmp_path / "moe", tli_jax.grown_config(config, plan), mixture, plan=plan)
    options = BASIC | {"model": tmp_path / "moe", "text": start / "ids.npy", "save-every": 4, "validate-every": 8}
    options |= {"mesh": "fsdp=2,expert=4", "schedule": "constant"}
    assert here(tmp_path / "one", **options, steps=8, export=tmp_path / "out") == 0
    assert here(tmp_path / "two", **options, steps=4) == 0
    assert here(tmp_path / "two", **options, steps=8, export=tmp_path / "again") == 0
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


def test_starts_from_another_run(small, start, tmp_path):
    # With other sizes, on another mesh, and at a rate of 0: the parameters stay as they are.
    options = {"batch-size": 16, "sequence-length": 8, "steps": 1, "learning-rate": 0, "mesh": "fsdp=4,tensor=2"}
    options |= {"model": small / "run", "text": start / "ids.npy"}
    assert here(tmp_path / "run", **SMALL | options, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(small / "out")
    assert json.loads((tmp_path / "run" / "growth.json").read_text())["injected"] == [False, True]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["id"] != json.loads((small / "run" / "run.json").read_text())["id"]
    assert here(tmp_path / "run") == 0


@pytest.mark.long
def test_what_may_change(small, tmp_path):
    run = copy_run(small / "run", tmp_path / "moved")
    options = {"steps": 5, "save-every": 2, "keep": 2, "validate-every": 1, "validation-batches": 1}
    assert here(run, **options, mesh="data=2,fsdp=4", max_shard_size="100KB", process=None) == 0
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [2, 3, 4, 5]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "5", "frozen"]
    stored = train.RunDirectory(run).read_config()
    assert stored.steps == 5 and stored.mesh == {"data": 2, "fsdp": 4} and stored.run == str(run)


def test_loss_that_is_not_finite(small, start, tmp_path, capsys):
    shutil.copytree(small / "grown", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = b"\xc0\x7f"  # NaN in bf16
    file.write_bytes(content)
    options = SMALL | {"model": tmp_path / "model", "text": start / "ids.npy", "save-every": 2, "skip-limit": 3}
    assert here(tmp_path / "run", **options) == 76
    assert "step 3: 3 bad steps in a row (loss nan" in say(capsys)
    lines = metrics(tmp_path / "run")
    assert [(line["skipped"], line["loss"]) for line in lines] == [(1, None), (2, None), (3, None)]
    assert lines[0]["validation_loss_before"] is None
    # What was saved on the way is what was there before.
    assert here(tmp_path / "run", export_only=True, export=tmp_path / "out") == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "model")


def test_gradient_that_spikes(small, start, tmp_path, capsys):
    options = SMALL | {"model": small / "grown", "text": start / "ids.npy", "skip-limit": 6, "save-every": 2}
    assert here(tmp_path / "run", **options, keep=100) == 76
    assert "step 26: 6 bad steps in a row" in say(capsys)
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [0] * 20 + [1, 2, 3, 4, 5, 6]
    assert newest(tmp_path / "run") == 24  # complete, though the run ended while it was being written
    good, bad = state_digests(tmp_path / "run", 20), state_digests(tmp_path / "run", 24)
    assert {name for name in good if good[name] != bad[name]} == {"step", "skipped"}


def test_disk_full_while_saving(trained, tmp_path, capsys):
    run = copy_run(trained / "run", tmp_path / "run", until=20)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    # What is compiled is not to be written either, which would be a warning.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code = here(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    assert code == 74
    assert "writing a checkpoint failed" in say(capsys)
    assert newest(run) == 20 and len(metrics(run)) < 40
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, and a function that remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=64m,nr_inodes=100k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tli_jax_test", folder], check=False).returncode:
        pytest.skip("only root may mount")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("what", ["nr_inodes", "size"])
def test_a_disk_that_is_full_at_any_moment(disk, small, start, tmp_path, capsys, what):
    """Room for some files, or some pages, more at a time, until a run gets through: from its start, and resumed."""
    folder, remount = disk
    options = SMALL | {"model": small / "grown", "text": start / "ids.npy", "save-every": 1}
    failures = 0
    for steps, more in [(2, range(1, 200, 3)), (4, range(0, 200, 5))]:
        stats = os.statvfs(folder)
        used = {"nr_inodes": stats.f_files - stats.f_ffree, "size": (stats.f_blocks - stats.f_bfree) * 4096}[what]
        for room in more:
            remount(f"{what}={used + room * (1 if what == 'nr_inodes' else 4096)}")
            if (code := here(folder / "run", **options | {"steps": steps})) == 0:
                break
            error = say(capsys).splitlines()[-1]
            assert code in (73, 74) and str(folder) in error and "No space left" in error, error
            failures += 1
        assert code == 0
        say(capsys)
    assert [line["step"] for line in metrics(folder / "run")] == [1, 2, 3, 4]
    assert failures > 10


def test_upscale_goes_straight_on(small, start, tmp_path, capsys):
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
    # Again: it grows no more, and goes on.
    code, said = both("--train.steps", 5)
    assert code == 0 and "growth is not repeated" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "grown" / "growth.json").stat().st_mtime_ns == at
    # The same file serves for the second half alone.
    assert run_command(train.main, ["--config", str(file), "--steps", "5"]) == 0
    assert "5 steps are done" in say(capsys)
    old, new = tensors(tmp_path / "grown"), tensors(tmp_path / "out")
    assert {re.findall(r"\d+", name)[0] for name in old if old[name] != new[name]} == {"1"}


# Refusals, before anything is compiled.


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"mesh": "data=3,fsdp=2"}, 2, "data 3 × fsdp 2 × expert 1 × tensor 1 does not give the 8 devices"),
        ({"mesh": "data=-1,tensor=3"}, 2, "data -1 × fsdp 1 × expert 1 × tensor 3 does not give the 8 devices"),
        ({"mesh": "fsdp=-1,tensor=-1"}, 2, "one at most -1"),
        ({"mesh": "tensr=2"}, 2, "mesh"),
        ({"mesh": "tensor=4,fsdp=2"}, 2, "key/value heads 2 cannot be cut over tensor = 4"),
        ({"batch-size": 12}, 2, "batch size / grad_accum_steps 12 cannot be cut over fsdp = 8"),
        ({"grad-accum-steps": 3}, 2, "batch_size 8 is not a multiple of grad_accum_steps 3"),
        ({"lerning-rate": 1}, 2, "--lerning-rate is not known, is --learning-rate meant?"),
        ({"steps": "many"}, 2, "steps is 'many'"),
        ({"steps": 0}, 2, "steps is '0'"),
        ({"only": "injectd"}, 2, "only: 'injectd' is not known"),
        ({"only": "last_n(7)"}, 2, "the model has 6 layers: 1…6"),
        ({"model": None}, 2, "model is not set"),
        ({"text": None}, 2, "text is not set"),
        ({"export-only": True}, 2, "has not begun"),
        ({"model": "nowhere"}, 66, "nowhere"),
        ({"text": "nowhere.txt"}, 66, "nowhere.txt"),
        ({"model": "FOLDER/base", "only": "injected"}, 2, "needs a model that was grown"),
        ({"export": "RUN/out"}, 2, "must not be the same folder, nor one inside the other"),
        ({"export": "FOLDER/grown", "overwrite": True}, 2, "must not be the same folder, nor one inside the other"),
        ({"sequence-length": 5000}, 65, "4,001 tokens, one window takes 5,001"),
        ({"batch-size": 256}, 65, "one batch takes 256 × 16 + 1 tokens"),
    ],
)
def test_refused(start, tmp_path, capsys, options, code, said):
    folders = {"RUN": str(tmp_path / "run"), "FOLDER": str(start)}
    options = {
        name: re.sub("RUN|FOLDER", lambda found: folders[found[0]], value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    assert here(tmp_path / "run", **usual(start) | options) == code
    assert said in say(capsys)
    assert not newest(tmp_path / "run")


def test_run_folder_that_is_something_else(start, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert here(tmp_path / "run", **usual(start)) == 73
    assert "is not a run and not empty (thesis.tex)" in say(capsys)
    assert run_command(train.main, words("", **usual(start))) == 2
    (tmp_path / "file").touch()
    assert here(tmp_path / "file", **usual(start)) == 73


@pytest.mark.long
def test_what_a_kill_at_the_start_leaves_is_no_hindrance(small, start, tmp_path):
    """Before the configuration is in its place the run has not begun, and what is there is not believed."""
    run = tmp_path / "run"
    shutil.copytree(start / "grown", run / "start")
    (run / "model").mkdir()
    (run / "model" / "tokenizer.json").touch()
    (run / ".start.partial-x").mkdir()
    (run / ".config.yaml.partial").write_text("half: ")
    shutil.copy(start / "grown" / "growth.json", run)
    assert here(run, **BASIC, model=small / "base", text=start / "ids.npy", validation_fraction=0, steps=1) == 0
    assert not (run / "growth.json").exists() and not (run / "model" / "tokenizer.json").exists()
    assert here(run) == 0


def test_unknown_key_in_a_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: x\nlerning_rate: 1\nsteps: yes\n")
    assert run_command(train.main, ["--config", str(tmp_path / "run.yaml")]) == 2
    said = say(capsys)
    assert "'lerning_rate' is not known, is learning_rate meant?" in said
    assert "steps is True: " in said and "must be a number" in said


def test_tokenizer_larger_than_the_vocabulary(start, tmp_path, capsys):
    shutil.copytree(start / "base", tmp_path / "model")
    shutil.copy(hub.resolve("embedded") / "tokenizer.json", tmp_path / "model")
    assert here(tmp_path / "run", **usual(start) | {"model": tmp_path / "model"}) == 65
    assert "tokenizer" in say(capsys)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [("a.txt", b"one\ntwo\xff\n", "a.txt: line 2"), ("b.jsonl", b'{"text": "one"}\n{"text": \n', "b.jsonl: line 2")],
)
def test_text_that_cannot_be_read(start, tmp_path, capsys, name, content, place):
    (tmp_path / name).write_bytes(content)
    options = USUAL | {"model": "embedded", "text": tmp_path / name}
    assert here(tmp_path / "run", **options) == 65
    assert place in say(capsys)
