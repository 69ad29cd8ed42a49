"""A run by two real processes with four devices each: what they compute, and how they end together."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tli_jax
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor

pytestmark = pytest.mark.usefixtures("_compile_once")

STEPS = 40
# The command, slowed down from some step on, so that there is time to do something to it.
SLOW = """
import sys, time
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes
from tli_jax.training.metrics import Metrics

since, write = int(sys.argv[1]), Metrics.write

def slow(self, values):
    write(self, values)
    if values["step"] >= since:
        time.sleep(0.3)

Metrics.write = slow
processes.leave(run_command(train.main, sys.argv[2:]))
"""


def words(run, **options):
    return [f"--run={run}", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def usual(start):
    basic = {"model": start / "base", "text": start / "ids.npy", "only": "last_n(2)", "dtypes": "compute=float32"}
    basic |= {"batch_size": 8, "sequence_length": 16, "learning_rate": 0.01, "warmup": 5}
    return basic | {"steps": STEPS, "save_every": 10, "validate_every": 20, "keep": 100}


def inode(file):
    return file.stat().st_ino if file.is_file() else None


class Group:
    """Processes of one run, which together have eight devices."""

    def __init__(self, environment, run, options, count=2, since=STEPS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        self.run, self.before = run, inode(run / "metrics.jsonl")
        self.started = []
        for index in range(count):
            own = {"process": f"{index}/{count}@{where}"} if count > 1 else {}
            devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // count}"}
            # What one process compiles and another finds in the cache need not run its collectives in the same order on
            # a CPU: the two would wait for each other for ever.
            cached = environment if count == 1 else {}
            script = [sys.executable, "-W", "error", "-c", SLOW, str(since)]
            self.started.append(
                subprocess.Popen(
                    [*script, *words(run, **options, **own)],
                    env=os.environ | devices | cached,
                    stdout=subprocess.DEVNULL,  # Gloo tells who connected
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_for(self, step):
        file = self.run / "metrics.jsonl"
        until = time.monotonic() + 600
        # A run that goes on puts a new file in the place of the old one.
        while inode(file) == self.before or file.read_bytes().count(b"\n") < step:
            ended = [process.poll() for process in self.started]
            assert ended == [None] * len(ended), [process.communicate()[1] for process in self.started]
            assert time.monotonic() < until
            time.sleep(0.01)
        return self

    def end(self):
        """Exit codes, what each said last on stderr, and how many seconds it took from here."""
        since = time.monotonic()
        try:
            said = [process.communicate(timeout=600)[1] for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        took = time.monotonic() - since
        assert not any("Traceback" in text for text in said), said
        errors = [[line for line in text.splitlines() if line.startswith("error:")] for text in said]
        return [process.returncode for process in self.started], errors, took


def newest(run):
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def tell_killed(folder, start, environment):
    """SIGKILL to the first process; then one alone goes on to the end."""
    run = folder / "killed"
    group = Group(environment, run, usual(start), since=23).wait_for(24)
    while newest(run) < 20:
        time.sleep(0.01)
    group.started[0].send_signal(signal.SIGKILL)
    found = {"SIGKILL": [*group.end(), newest(run)]}
    shutil.copytree(run, folder / "early")
    return found | {"alone": Group(environment, run, {}, count=1).end()}


@pytest.fixture(scope="session")
def stories(once, one, start, compiled):
    """SIGTERM to the second of two; from there both go on to the end and export, and apart from it one is killed."""

    def make(folder):
        group = Group(compiled, folder / "both", usual(start), since=5).wait_for(6)
        group.started[1].send_signal(signal.SIGTERM)
        found = {"SIGTERM": [*group.end(), newest(folder / "both")]}
        shutil.copytree(folder / "both", folder / "killed")
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(tell_killed, folder, start, compiled)
            found["both"] = Group(compiled, folder / "both", usual(start) | {"export": folder / "out"}).end()
            found |= killed.result()
        (folder / "found.json").write_text(json.dumps(found))

    return once("pairs", make)


@pytest.fixture(scope="session")
def one(once, start, compiled):
    """The same run by one process with eight devices."""

    def make(folder):
        assert run_command(train.main, words(folder / "run", **usual(start))) == 0
        assert run_command(train.main, words(folder / "run", export=folder / "out")) == 0

    return once("one", make)


def found(folder, name):
    return json.loads((folder / "found.json").read_text())[name]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([[line["loss"], line["gradient_norm"], line.get("validation_loss", 0)] for line in lines])


def tensors(folder):
    return {name: read_tensor(tensor) for name, tensor in open_checkpoint(folder).tensors.items()}


def test_two_processes_have_the_losses_of_one(stories, one):
    assert found(stories, "both")[:2] == [[0, 0], [[], []]]
    np.testing.assert_allclose(losses(stories / "both"), losses(one / "run"), rtol=2e-4)


def test_two_processes_export_what_one_does(stories, one, start):
    together, alone, before = tensors(stories / "out"), tensors(one / "out"), tensors(start / "base")
    assert together.keys() == alone.keys()
    for name in together:
        np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-3, err_msg=name)
        if not any(f".layers.{layer}." in name for layer in (2, 3)):
            assert together[name].tobytes() == before[name].tobytes()
    config, params = tli_jax.load_hf(stories / "out")
    assert np.isfinite(tli_jax.forward(config, params, np.zeros((1, 8), np.int32))).all()
    assert not [path for path in stories.iterdir() if "partial" in path.name]


def test_signal_to_one_stops_both_at_the_same_step(stories):
    codes, errors, _, saved = found(stories, "SIGTERM")
    assert codes == [75, 75]
    (first,), (second,) = errors
    assert first == second and f"stopped at step {saved}, which is saved" in first
    assert 6 <= saved < STEPS


def test_kill_of_one_ends_the_other_soon(stories):
    codes, errors, took, saved = found(stories, "SIGKILL")
    assert codes == [-9, 69]
    assert errors == [[], [f"error: {processes.LOST}"]]
    assert took < 30
    assert saved == 20


def test_one_goes_on_with_what_two_began(stories, one):
    assert found(stories, "alone")[:2] == [[0], [[]]]
    np.testing.assert_allclose(losses(stories / "killed"), losses(one / "run"), rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_disk_that_is_full_for_one_ends_both(stories, start, compiled, tmp_path, index):
    """The limit on file sizes stands for the disk: it is of one process alone."""
    run = shutil.copytree(stories / "early", tmp_path / "run")
    group = Group(compiled, run, usual(start), since=21).wait_for(22)
    supervisor = group.started[index].pid
    (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    log = (run / "metrics.jsonl").stat().st_size
    resource.prlimit(int(child), resource.RLIMIT_FSIZE, (log + 8000, log + 8000))  # the log has room, a step has not
    codes, errors, took = group.end()
    assert (codes[index], codes[1 - index]) in [(74, 69), (74, 74)]
    assert "writing a checkpoint failed" in errors[index][0]
    assert took < 60  # from step 22 on, slowed down, and 30 s from the save
    assert newest(run) == 20
    assert Group(compiled, run, {}).end()[0] == [0, 0]
    np.testing.assert_allclose(losses(run), losses(stories / "both"), rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_failure_of_one_ends_the_other(stories, start, compiled, tmp_path, index):
    """SIGKILL to the second process, and to the child of the first, which its supervisor tells of; two go on."""
    run = shutil.copytree(stories / "early", tmp_path / "run")
    group = Group(compiled, run, usual(start), since=21).wait_for(24)
    victim = group.started[index].pid
    if index == 0:
        (child,) = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()
        victim = int(child)
    os.kill(victim, signal.SIGKILL)
    codes, _, took = group.end()
    assert codes == ([137, 69] if index == 0 else [69, -9])
    assert took < 30
    assert Group(compiled, run, {}).end()[0] == [0, 0]
    np.testing.assert_allclose(losses(run), losses(stories / "both"), rtol=2e-4)
