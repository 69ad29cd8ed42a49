"""Launch scripts that really train: two processes on this machine, by hand and as Slurm starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def work(tmp_path, start):
    (tmp_path / "train.yaml").write_text(
        f"model: {start}/base\nrun: {tmp_path}/run\ntext: {start}/ids.npy\nsequence_length: 16\nbatch_size: 8\n"
        "steps: 12\nsave_every: 4\nvalidate_every: 12\ndtypes: {compute: float32}\nonly: last_n(1)\n"
    )
    return tmp_path


def environment(**more):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    return os.environ | {"PATH": path, "XLA_FLAGS": devices} | more


def steps(folder):
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_local_trains_with_two_processes_stops_and_goes_on(work):
    call = [LAUNCH / "local.sh", "--config", work / "train.yaml", "--processes", "2", "--"]
    first = subprocess.Popen(
        [*call, "--steps", "100000"], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not steps(work):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=600)
    assert first.returncode == 75, said
    done = steps(work)[-1]
    second = subprocess.run(
        [*call, "--steps", str(done + 3)], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert second.returncode == 0, second.stderr
    assert steps(work) == list(range(1, done + 4))
    assert "of 8 × cpu" in second.stderr


def wait_until(happened, processes=()):
    until = time.monotonic() + 300
    while not happened():
        assert all(process.poll() is None for process in processes) and time.monotonic() < until
        time.sleep(0.05)


def below(pid):
    """All that a process started, and what these did."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(other for child in children for other in below(child))]


@pytest.mark.long
def test_local_goes_on_after_75_by_itself_and_stops_at_control_c(work):
    """One process alone is told to stop: all leave with 75, and their workers start them again."""
    call = [LAUNCH / "local.sh", "--config", work / "train.yaml", "--", "--steps", "100000", "--save-every", "50000"]
    with (work / "err").open("w") as err:
        local = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
    wait_until(lambda: steps(work), [local])
    first, _ = (int(word) for word in Path(f"/proc/{local.pid}/task/{local.pid}/children").read_text().split())
    os.kill(below(first)[0], signal.SIGTERM)
    wait_until(lambda: (work / "err").read_text().count("going on") == 2, [local])
    saved = steps(work)[-1]
    wait_until(lambda: len(steps(work)) > saved + 2, [local])
    os.killpg(local.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert local.wait(300) == 75
    said = (work / "err").read_text()
    assert said.count("which is saved") == 4 and "stopped at once" not in said
    done = steps(work)
    assert done == list(range(1, done[-1] + 1)) and (work / "run" / "checkpoints" / str(done[-1])).is_dir()


@pytest.mark.long
def test_a_tpu_worker_trains_on_by_itself_until_it_is_stopped(work):
    """gcloud as it would, with a folder and a shell here for the worker, and one process, by Slurm's variables."""
    machine = work / "machine"
    (machine / "tli_jax").mkdir(parents=True)
    (machine / "tli_jax" / "launch").symlink_to(LAUNCH)
    (machine / "tli_jax" / ".venv").symlink_to(sys.prefix)
    (work / "bin").mkdir()
    (work / "bin" / "gcloud").write_text(
        f"""#!{sys.executable}
import shutil, subprocess, sys
action, *words = sys.argv[4:]
if action == "scp":
    shutil.copy(words[1], "{machine}/" + words[2].partition(":")[2])
else:
    sys.exit(subprocess.run(["bash", "-c", words[-1].removeprefix("--command=")], cwd="{machine}").returncode)
"""
    )
    (work / "bin" / "gcloud").chmod(0o755)
    slurm = {"JOB_ID": "4712", "NTASKS": "1", "STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0"}
    slurm |= {"STEP_NODELIST": "127.0.0.1", "NODELIST": "127.0.0.1", "JOB_NUM_NODES": "1"}
    clean = environment(**{f"SLURM_{name}": value for name, value in slurm.items()})
    clean["PATH"] = f"{work / 'bin'}:{clean['PATH']}"
    where = ["--name", "r", "--zone", "z"]
    log = machine / "tli_jax" / "r.log"

    def vm(action, *more, code=0):
        call = [LAUNCH / "tpu_vm.sh", action, *where, *more]
        done = subprocess.run(call, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr

    def is_over():
        try:
            os.kill(int((machine / "tli_jax" / "r.pid").read_text()), 0)
        except ProcessLookupError:
            return True
        return False

    run = ["--slice", "v5e-8", "--config", work / "train.yaml", "--", "--steps"]
    vm("run", *run, "100000")
    try:
        wait_until(lambda: steps(work) or is_over())
        assert not is_over(), log.read_text()
        assert "r runs already" in vm("run", *run, "100000", code=73)
    finally:
        vm("stop")
    wait_until(is_over)
    assert "which is saved" in log.read_text() and "going on" not in log.read_text()
    done = steps(work)[-1]
    vm("run", *run, str(done + 3))
    wait_until(is_over)
    assert steps(work) == list(range(1, done + 4)), log.read_text()


def test_slurm_starts_processes_that_find_each_other(work):
    """srun as it would: one process a task, told by SLURM_* who it is; then the job leaves with their code."""
    (work / "bin").mkdir()
    (work / "bin" / "srun").write_text(
        f"""#!{sys.executable}
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--kill")]
started = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}}) for i in range(2)
]
sys.exit(max(process.wait() for process in started))
"""
    )
    (work / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{work}/requeued\n')
    for name in ("srun", "scontrol"):
        (work / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    slurm |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODELIST": "127.0.0.1"}
    clean = environment(**slurm)
    clean["PATH"] = f"{work / 'bin'}:{clean['PATH']}"
    # The flags for GPUs come in front of XLA_FLAGS, and are known to the compiler for CPUs too.
    words = ["python", "-m", "tli_jax.train", "--config", str(work / "train.yaml"), "--distributed"]
    call = [LAUNCH / "slurm_job.sh", LAUNCH, *words]
    done = subprocess.run(call, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert steps(work) == list(range(1, 13)) and "of 8 × cpu" in done.stderr
    assert done.stderr.count("waiting up to 1800 s for the other processes to start") == 2
    assert not (work / "requeued").exists()


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (0, False), (69, False)])
def test_slurm_queues_again_after_75_alone(tmp_path, code, is_requeued):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    call = [LAUNCH / "slurm_job.sh", LAUNCH, "true"]
    done = subprocess.run(call, env=os.environ | {"PATH": path, "SLURM_JOB_ID": "4711"})
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() is is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
