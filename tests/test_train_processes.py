"""Runs of two and four real processes with two devices each: what they compute, and how they end together."""

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

pytestmark = [pytest.mark.usefixtures("_compile_once"), pytest.mark.all_cores]

# Few, because collectives between processes on a CPU take a third of a second per step.
STEPS, SAVE, VALIDATE = 12, 3, 6
# The command, slowed down after some step, so that there is time to act on it.
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


def flags(run, **options):
    return [f"--run={run}", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def options(start):
    basic = {"model": start / "base", "text": start / "ids.npy", "only": "last_n(2)", "dtypes": "compute=float32"}
    basic |= {"batch_size": 8, "sequence_length": 16, "learning_rate": 0.01, "warmup": 5}
    return basic | {"steps": STEPS, "save_every": SAVE, "validate_every": VALIDATE, "keep": 100}


def inode(file):
    return file.stat().st_ino if file.is_file() else None


class Group:
    """The processes of one run, with two devices each; a single one has four."""

    def __init__(self, environment, run, options, count=2, since=STEPS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.run, self.old_metrics = run, inode(run / "metrics.jsonl")
        self.processes = []
        for index in range(count):
            own = {"process": f"{index}/{count}@{address}"} if count > 1 else {}
            own_devices = 4 if count == 1 else 2
            flag = f"--xla_force_host_platform_device_count={own_devices}"
            devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
            # No compilation cache for several processes: on a CPU, a program that one process has compiled and another
            # loads from the cache may run its collectives in another order, and the two would deadlock.
            cached = environment if count == 1 else {}
            script = [sys.executable, "-W", "error", "-c", SLOW, str(since)]
            self.processes.append(
                subprocess.Popen(
                    [*script, *flags(run, **options, **own)],
                    env=os.environ | devices | cached,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_for(self, step):
        file = self.run / "metrics.jsonl"
        deadline = time.monotonic() + 600
        # A resumed run replaces the file.
        while inode(file) == self.old_metrics or file.read_bytes().count(b"\n") < step:
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended), [process.communicate()[1] for process in self.processes]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def end(self):
        """Return the exit codes, the error messages, and the seconds until all processes have ended."""
        since = time.monotonic()
        try:
            outputs = [process.communicate(timeout=600)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        seconds = time.monotonic() - since
        assert not any("Traceback" in text for text in outputs), outputs
        errors = [[line for line in text.splitlines() if line.startswith("error:")] for text in outputs]
        return [process.returncode for process in self.processes], errors, seconds


def newest(run):
    return max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def kill_and_resume(folder, start, environment):
    """Kill the first process; then one process alone resumes to the end."""
    run = folder / "killed"
    group = Group(environment, run, options(start), since=2 * SAVE + 1).wait_for(2 * SAVE + 2)
    while newest(run) < 2 * SAVE:
        time.sleep(0.01)
    group.processes[0].send_signal(signal.SIGKILL)
    results = {"SIGKILL": [*group.end(), newest(run)]}
    shutil.copytree(run, folder / "early")
    return results | {"alone": Group(environment, run, {}, count=1).end()}


@pytest.fixture(scope="session")
def pairs(once, one, start, compiled):
    """Two processes, stopped by SIGTERM to the second. Both resume to the end and export; in a copy, one is killed."""

    def make(folder):
        group = Group(compiled, folder / "both", options(start), since=2).wait_for(3)
        group.processes[1].send_signal(signal.SIGTERM)
        results = {"SIGTERM": [*group.end(), newest(folder / "both")]}
        shutil.copytree(folder / "both", folder / "killed")
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill_and_resume, folder, start, compiled)
            results["both"] = Group(compiled, folder / "both", options(start) | {"export": folder / "out"}).end()
            results |= killed.result()
        (folder / "results.json").write_text(json.dumps(results))

    return once("pairs", make)


@pytest.fixture(scope="session")
def one(once, start, compiled):
    """The same run in one process with eight devices."""

    def make(folder):
        assert run_command(train.main, flags(folder / "run", **options(start))) == 0
        assert run_command(train.main, flags(folder / "run", export=folder / "out")) == 0

    return once("one", make)


def result(folder, name):
    return json.loads((folder / "results.json").read_text())[name]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([[line["loss"], line["gradient_norm"], line.get("validation_loss", 0)] for line in lines])


def digests(run):
    """Checksums of the parameters and moments after the last step."""
    meta = json.loads((run / "checkpoints" / str(STEPS) / "meta" / "meta.json").read_text())
    return {name: array["digest"] for name, array in meta["content"]["arrays"].items()}


def tensors(folder):
    return {name: read_tensor(tensor) for name, tensor in open_checkpoint(folder).tensors.items()}


def test_two_processes_match_the_losses_of_one(pairs, one):
    assert result(pairs, "both")[:2] == [[0, 0], [[], []]]
    np.testing.assert_allclose(losses(pairs / "both"), losses(one / "run"), rtol=2e-4)


def test_two_processes_export_the_same_as_one(pairs, one, start):
    together, alone, before = tensors(pairs / "out"), tensors(one / "out"), tensors(start / "base")
    assert together.keys() == alone.keys()
    for name in together:
        np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-3, err_msg=name)
        if not any(f".layers.{layer}." in name for layer in (2, 3)):
            assert together[name].tobytes() == before[name].tobytes()
    config, params = tli_jax.load_hf(pairs / "out")
    assert np.isfinite(tli_jax.forward(config, params, np.zeros((1, 8), np.int32))).all()
    assert not [path for path in pairs.iterdir() if "partial" in path.name]


def test_a_signal_to_one_stops_both_at_the_same_step(pairs):
    codes, errors, _, saved = result(pairs, "SIGTERM")
    assert codes == [75, 75]
    (first,), (second,) = errors
    assert first == second and f"stopped at step {saved}, which is saved" in first
    assert 3 <= saved < 8  # soon after the signal, which follows step 3


def test_killing_one_ends_the_other(pairs):
    codes, errors, seconds, saved = result(pairs, "SIGKILL")
    assert codes == [-9, 69]
    assert errors == [[], [f"error: {processes.LOST}"]]
    assert seconds < 30
    assert saved == 2 * SAVE


def test_one_process_resumes_a_run_of_two(pairs, one):
    assert result(pairs, "alone")[:2] == [[0], [[]]]
    np.testing.assert_allclose(losses(pairs / "killed"), losses(one / "run"), rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_full_disk_of_one_ends_both(pairs, start, compiled, tmp_path, index):
    """A limit on file sizes, which applies to one process only, stands for the disk."""
    run = shutil.copytree(pairs / "early", tmp_path / "run")
    group = Group(compiled, run, options(start), since=2 * SAVE + 1).wait_for(2 * SAVE + 2)
    supervisor = group.processes[index].pid
    (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    log = (run / "metrics.jsonl").stat().st_size
    resource.prlimit(int(child), resource.RLIMIT_FSIZE, (log + 8000, log + 8000))  # enough for the log, not for a step
    codes, errors, seconds = group.end()
    assert (codes[index], codes[1 - index]) in [(74, 69), (74, 74)]
    assert "writing a checkpoint failed" in errors[index][0]
    assert seconds < 60  # of slowed-down steps, and 30 s after the save
    assert newest(run) == 2 * SAVE
    assert Group(compiled, run, {}).end()[0] == [0, 0]
    np.testing.assert_allclose(losses(run), losses(pairs / "both"), rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_the_failure_of_one_ends_the_other(pairs, start, compiled, tmp_path, index):
    """SIGKILL to the second process, or to the child of the first, as its supervisor reports. Then two resume."""
    run = shutil.copytree(pairs / "early", tmp_path / "run")
    group = Group(compiled, run, options(start), since=2 * SAVE + 1).wait_for(2 * SAVE + 3)
    victim = group.processes[index].pid
    if index == 0:
        (child,) = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()
        victim = int(child)
    os.kill(victim, signal.SIGKILL)
    codes, _, seconds = group.end()
    assert codes == ([137, 69] if index == 0 else [69, -9])
    assert seconds < 30
    assert Group(compiled, run, {}).end()[0] == [0, 0]
    np.testing.assert_allclose(losses(run), losses(pairs / "both"), rtol=2e-4)


# Meshes whose fsdp, tensor or both span processes.
MESHES = ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]


@pytest.fixture(scope="module")
def four(start, compiled, tmp_path_factory):
    """Four processes with two devices each, the third of which is told to stop after step 7."""
    run = tmp_path_factory.mktemp("four") / "run"
    group = Group(compiled, run, options(start), count=4, since=6).wait_for(7)
    group.processes[2].send_signal(signal.SIGTERM)
    return run, *group.end()


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
def test_four_processes_on_any_mesh_match_one(one, start, compiled, tmp_path, mesh):
    group = Group(compiled, tmp_path / "run", options(start) | {"mesh": mesh}, count=4)
    assert group.end()[:2] == ([0] * 4, [[]] * 4)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one / "run"), rtol=2e-4)


@pytest.mark.long
def test_a_signal_to_one_stops_all_four_at_the_same_step(four, start, compiled, tmp_path):
    """And with as many processes, the run ends bit for bit as if it had not been stopped."""
    run, codes, errors, seconds = four
    assert codes == [75] * 4 and seconds < 30
    assert len({error for (error,) in errors}) == 1 and f"stopped at step {newest(run)}" in errors[0][0]
    run = shutil.copytree(run, tmp_path / "run")
    straight = tmp_path / "straight"
    for folder, given in ((run, {}), (straight, options(start))):
        assert Group(compiled, folder, given, count=4).end()[:2] == ([0] * 4, [[]] * 4)
    np.testing.assert_array_equal(losses(run), losses(straight))
    assert digests(run) == digests(straight)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_losing_one_of_four_ends_the_others(four, one, start, compiled, tmp_path, number):
    """Then two processes resume."""
    run = shutil.copytree(four[0], tmp_path / "run")
    saved = newest(run)
    given = options(start) | {"timeouts": "heartbeat=10"}
    group = Group(compiled, run, given, count=4, since=saved).wait_for(saved + 1)
    victim = group.processes[2].pid
    (child,) = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()
    frozen = [victim, int(child)] if number == signal.SIGSTOP else []
    for pid in frozen or [victim]:
        os.kill(pid, number)
    others = [group.processes[index].wait(timeout=60) for index in (0, 1, 3)]
    for pid in reversed(frozen):
        os.kill(pid, signal.SIGCONT)
    codes, errors, seconds = group.end()
    assert others == [69] * 3 and codes[2] in (69, 137, -signal.SIGKILL) and seconds < 30
    assert errors[0] == [f"error: {processes.LOST}"]
    assert Group(compiled, run, {}).end()[:2] == ([0, 0], [[], []])
    np.testing.assert_allclose(losses(run), losses(one / "run"), rtol=2e-4)
