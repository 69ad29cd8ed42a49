"""One of several processes freezes, as on a paused machine: the others exit, and it exits when it wakes up."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tli_jax.distributed import processes

# Runs collectives over both processes until something happens.
SCRIPT = """
import os, sys, time
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes

def main(arguments):
    with processes.joined(False, sys.argv[1], {"start": 60, "heartbeat": 5, "leave": 5}):
        import jax
        from jax.sharding import NamedSharding, PartitionSpec
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        step = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        for number in range(100_000):
            int(step(processes.flag_array(mesh, False)))
            if number == 10:
                print("running", os.getpid(), flush=True)
            time.sleep(0.01)

processes.leave(run_command(main, []))
"""


def start(call, folder):
    """Start two processes that write their output to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(2):
        devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
        with (folder / f"{index}.out").open("w") as out, (folder / f"{index}.err").open("w") as err:
            process = subprocess.Popen(call(f"{index}/2@{where}"), env=os.environ | devices, stdout=out, stderr=err)
        started.append(process)
    return started


def child(process):
    """The child of a supervisor process."""
    (found,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found)


def freeze(started, index, folder):
    """Freeze one process; return the other's exit code and seconds until exit, and the exit code after waking up."""
    stopped = [started[index].pid, child(started[index])]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        since = time.monotonic()
        code = started[1 - index].wait(timeout=90)
        took = time.monotonic() - since
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
        woken = started[index].wait(timeout=60)
    finally:
        for process in started:
            process.kill()
    errors = [(folder / f"{number}.err").read_text() for number in range(2)]
    assert not any("Traceback" in text for text in errors), errors
    assert [line for line in errors[1 - index].splitlines() if "error:" in line] == [f"error: {processes.LOST}"]
    return code, took, woken


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.long)])
def test_frozen_peer_counts_as_lost(index, tmp_path):
    started = start(lambda process: [sys.executable, "-c", SCRIPT, process], tmp_path)
    until = time.monotonic() + 120
    while not all("running" in (tmp_path / f"{number}.out").read_text() for number in range(2)):
        assert all(process.poll() is None for process in started) and time.monotonic() < until
        time.sleep(0.05)
    code, took, woken = freeze(started, index, tmp_path)
    assert code == 69 and took < 30
    assert woken in (69, 137)


@pytest.mark.long
def test_training_with_a_frozen_peer_exits(start_folder, tmp_path):
    flags = ["--model", start_folder / "grown", "--text", start_folder / "ids.npy", "--run", tmp_path / "run"]
    flags += ["--only", "injected", "--batch-size", 8, "--sequence-length", 16, "--dtypes", "compute=float32"]
    flags += ["--steps", 100_000, "--save-every", 10, "--validation-fraction", 0, "--timeouts", "heartbeat=10"]
    words = [sys.executable, "-m", "tli_jax.train", *map(str, flags)]
    started = start(lambda process: [*words, "--process", process], tmp_path)
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "10").is_dir():
        assert all(process.poll() is None for process in started) and time.monotonic() < until
        time.sleep(0.05)
    code, took, woken = freeze(started, 1, tmp_path)
    assert code == 69 and took < 30
    assert woken in (69, 137)


@pytest.fixture
def start_folder(request):
    return request.getfixturevalue("start")
