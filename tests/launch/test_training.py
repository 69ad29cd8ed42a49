"""Launch scripts with real training: two processes on this machine, started by local.sh and by Slurm."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.all_cores

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
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return os.environ | {"PATH": path, "XLA_FLAGS": devices} | more


def steps(folder):
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.long
def test_local_trains_with_two_processes_stops_and_resumes(work):
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
    assert "of 2 × cpu" in second.stderr


def wait_until(happened, processes=()):
    until = time.monotonic() + 300
    while not happened():
        assert all(process.poll() is None for process in processes) and time.monotonic() < until
        time.sleep(0.05)


def descendants(pid):
    """All descendants of a process."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(other for child in children for other in descendants(child))]


@pytest.mark.long
def test_local_restarts_after_75_and_stops_at_control_c(work):
    """SIGTERM to one process: all exit with 75, and their workers restart them."""
    call = [LAUNCH / "local.sh", "--config", work / "train.yaml", "--", "--steps", "100000", "--save-every", "50000"]
    with (work / "err").open("w") as err:
        local = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
    wait_until(lambda: steps(work), [local])
    first, _ = (int(word) for word in Path(f"/proc/{local.pid}/task/{local.pid}/children").read_text().split())
    os.kill(descendants(first)[0], signal.SIGTERM)
    wait_until(lambda: (work / "err").read_text().count("restarting") == 2, [local])
    saved = steps(work)[-1]
    wait_until(lambda: len(steps(work)) > saved + 2, [local])
    os.killpg(local.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    assert local.wait(300) == 75
    said = (work / "err").read_text()
    assert said.count("which is saved") == 4 and "stopped at once" not in said
    done = steps(work)
    assert done == list(range(1, done[-1] + 1)) and (work / "run" / "checkpoints" / str(done[-1])).is_dir()


@pytest.mark.long
def test_tpu_worker_trains_in_the_background_until_it_is_stopped(work):
    """A stand-in for gcloud uses a local folder and shell as the worker; Slurm's variables describe one process."""
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

    def has_exited():
        try:
            os.kill(int((machine / "tli_jax" / "r.pid").read_text()), 0)
        except ProcessLookupError:
            return True
        return False

    run = ["--slice", "v5e-8", "--config", work / "train.yaml", "--", "--steps"]
    vm("run", *run, "100000")
    try:
        wait_until(lambda: steps(work) or has_exited())
        assert not has_exited(), log.read_text()
        assert "r is already running" in vm("run", *run, "100000", code=73)
    finally:
        vm("stop")
    wait_until(has_exited)
    assert "which is saved" in log.read_text() and "restarting" not in log.read_text()
    done = steps(work)[-1]
    vm("run", *run, str(done + 3))
    wait_until(has_exited)
    assert steps(work) == list(range(1, done + 4)), log.read_text()


def test_slurm_processes_find_each_other(work):
    """A stand-in for srun starts one process per task with its SLURM_* variables; the job exits with their code."""
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
    words = ["python", "-m", "tli_jax.train", "--config", str(work / "train.yaml"), "--distributed"]
    call = [LAUNCH / "slurm_job.sh", LAUNCH, *words]
    done = subprocess.run(call, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert steps(work) == list(range(1, 13)) and "of 2 × cpu" in done.stderr
    assert done.stderr.count("waiting up to 300 s for the other processes to start") == 2
    assert not (work / "requeued").exists()


@pytest.mark.long
def test_the_command_for_a_cluster_grows_and_trains_on_two_nodes(work):
    """What sky.yaml runs on each node, with the variables that SkyPilot sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = yaml.safe_load((LAUNCH / "sky.yaml").read_text(encoding="utf-8"))["run"].replace("8482", str(port))
    recipe = (work / "train.yaml").read_text().splitlines()
    grown = [recipe[0], f"output: {work}/grown", "every: 2", "train:", *(f"  {line}" for line in recipe[1:])]
    (work / "grow.yaml").write_text("\n".join(grown))
    variables = {"CONFIG": str(work / "grow.yaml"), "FLAGS": "--train.only injected"}
    variables |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    nodes = [
        subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=LAUNCH.parent,
            env=environment(**variables, SKYPILOT_NODE_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert steps(work) == list(range(1, 13)) and "of 2 × cpu" in errors[0]


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (0, False), (69, False)])
def test_slurm_requeues_after_75_only(tmp_path, code, is_requeued):
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
