"""Processes start, stop and end together: real ones, two with four devices each."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from tli_jax.distributed import processes
from tli_jax.errors import StoppedError, UsageError

LOST = f"error: {processes.LOST}\n"
OWN = "error: my own error\n"

# Stands for a training run: steps over all devices, until something happens.
SCRIPT = """
import os, sys, time
from tli_jax.cli.frame import run_command
from tli_jax.errors import DataError
from tli_jax.distributed import processes

process, timeout, heartbeat, scenario, written, said = sys.argv[1:]

def say(*words):  # not on stdout, where Gloo's threads print into our lines
    with open(said, "a") as file:
        print(*words, file=file)

if scenario == "wait":
    say("running", os.getpid())

def main(arguments):
    with processes.joined(False, process, {"start": int(timeout), "heartbeat": int(heartbeat), "leave": 5}):
        train()

def train():
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    index = jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    step = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    with processes.first():
        say("found" if os.path.exists(written) else "missing")
        if index == 0:
            if scenario == "first fails":
                raise DataError("my own error")
            open(written, "w").close()
    with processes.StopSignal() as stop:
        for number in range(20 if scenario == "end" else 100_000):
            if int(step(processes.flag_array(mesh, stop.requested))):
                say("stopped at", number)
                processes.leave(75)
            if number == 10:
                say("running", os.getpid())
                if scenario == f"{index} raises":
                    raise DataError("my own error")
                if scenario == "all raise":
                    time.sleep(2 * index)
                    raise DataError("my own error")
                if scenario == f"{index} busy":
                    time.sleep(1000)
            time.sleep(0.01)

assert "jax" not in sys.modules
processes.leave(run_command(main, []))
"""


class Pair:
    """Processes of the script, each with a file for what it says and one for its stderr."""

    def __init__(self, folder, scenario, count, timeout, heartbeat=100):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.files = folder / address
        self.files.mkdir()
        self.processes = []
        devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
        for index in range(count):
            command = [sys.executable, "-W", "error", "-c", SCRIPT, f"{index}/2@{address}", str(timeout)]
            command += [str(heartbeat), scenario, str(self.files / "written"), str(self.files / f"{index}.said")]
            (self.files / f"{index}.said").touch()
            with (self.files / f"{index}.err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(command, env=os.environ | devices, stdout=subprocess.DEVNULL, stderr=err)
                )

    def said(self):
        """Return the lines that each process has said."""
        return [(self.files / f"{index}.said").read_text().splitlines() for index in range(len(self.processes))]

    def wait_until_running(self):
        """Wait until all processes are in their loop. Return the process ids of the children that compute."""
        while True:
            running = [line.split()[1] for lines in self.said() for line in lines if line.startswith("running")]
            if len(running) == len(self.processes):
                return [int(pid) for pid in running]
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)

    def end(self):
        """Return the exit codes and the stderr of all processes."""
        try:
            codes = [process.wait(timeout=50) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        errors = [(self.files / f"{index}.err").read_text() for index in range(len(self.processes))]
        return codes, errors


def run_case(folder, scenario="", action=None, index=0, count=2, timeout=60):
    """Run the script in two processes, act on one of them while they run, and return how they end."""
    pair = Pair(folder, scenario, count, timeout)
    children = pair.wait_until_running() if action is not None else []
    since = time.monotonic()
    if action is not None:
        action(pair.processes[index].pid, children[index])
    codes, errors = pair.end()
    return codes, errors, pair.said(), time.monotonic() - since


def kill(process, child):
    os.kill(process, signal.SIGKILL)
    wait_gone(child)


def kill_child(process, child):
    os.kill(child, signal.SIGKILL)


def terminate(process, child):
    time.sleep(0.5)
    os.kill(process, signal.SIGTERM)


def terminate_all(process, child):
    # As Slurm does.
    os.kill(process, signal.SIGTERM)
    os.kill(child, signal.SIGTERM)


def terminate_through_a_script(process, child):
    # A script that started the supervisor forwards a signal that both got, so the supervisor gets it twice.
    terminate_all(process, child)
    time.sleep(0.1)
    os.kill(process, signal.SIGTERM)


def terminate_twice(process, child):
    os.kill(process, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(process, signal.SIGTERM)


def wait_gone(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, but not yet reaped
            return
        time.sleep(0.01)
    raise AssertionError(f"the child {pid} outlived its supervisor")


NOW = "error: stopped at once, nothing was saved: run the same command again to resume\n"
KILLED = "error: the process was killed by SIGKILL\n"
CASES = {
    "kill 1": ({"action": kill, "index": 1}, [69, -9], [LOST, ""]),
    "kill 0": ({"action": kill, "index": 0}, [-9, 69], ["", LOST]),
    "kill 1 while 0 is outside a collective": (
        {"scenario": "0 busy", "action": kill, "index": 1},
        [69, -9],
        [LOST, ""],
    ),
    "kill 0 while 1 is outside a collective": (
        {"scenario": "1 busy", "action": kill, "index": 0},
        [-9, 69],
        ["", LOST],
    ),
    "kill the child of 1": ({"action": kill_child, "index": 1}, [69, 137], [LOST, KILLED]),
    "1 raises": ({"scenario": "1 raises"}, [69, 65], [LOST, OWN]),
    "0 raises": ({"scenario": "0 raises"}, [65, 69], [OWN, LOST]),
    "0 raises while 1 waits for it": ({"scenario": "first fails"}, [65, 69], [OWN, LOST]),
    "all raise, at different times": ({"scenario": "all raise"}, [65, 65], [OWN, OWN]),
    "stop 0": ({"action": terminate, "index": 0}, [75, 75], ["", ""]),
    "stop 1 as Slurm does": ({"action": terminate_all, "index": 1}, [75, 75], ["", ""]),
    "stop 0 as Slurm does through a script": ({"action": terminate_through_a_script, "index": 0}, [75, 75], ["", ""]),
    "stop 1 twice while it is busy": (
        {"scenario": "1 busy", "action": terminate_twice, "index": 1},
        [69, 75],
        [LOST, NOW],
    ),
    "stop 0 while it waits for 1": ({"scenario": "wait", "action": terminate, "count": 1}, [75], [NOW]),
    "end": ({"scenario": "end"}, [0, 0], ["", ""]),
    "0 alone": ({"count": 1, "timeout": 3}, [69], None),
}


QUICK = ["kill 0", "1 raises", "stop 1 as Slurm does", "stop 0 as Slurm does through a script", "end"]


@pytest.mark.all_cores
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in CASES if name not in QUICK], marks=pytest.mark.long)]
)
def test_processes_end_together(names, tmp_path):
    cases = {name: CASES[name] for name in names}
    with ThreadPoolExecutor(4) as pool:
        runs = {name: pool.submit(run_case, tmp_path, **options) for name, (options, _, _) in cases.items()}
    wrong = []
    for name, (_, codes, errors) in cases.items():
        *ended, stdout, seconds = runs[name].result()
        print(f"{name}: {seconds:.1f} s")
        if ended != [codes, errors or ended[1]] or seconds > 30:
            wrong.append((name, *ended, stdout, seconds))
        if codes == [75, 75] and not (stdout[0][-1] == stdout[1][-1] and stdout[0][-1].startswith("stopped at")):
            wrong.append((name, stdout))
    assert not wrong
    if "end" in names:
        assert [lines[0] for lines in runs["end"].result()[2]] == ["missing", "found"]
        return
    (alone,) = runs["0 alone"].result()[1]
    assert alone.startswith("error: not all processes started within 3 s") and alone.count("\n") == 1


def freeze(folder, index):
    """Stop one of two processes with SIGSTOP. Return the exit code of the other, and of both after SIGCONT."""
    pair = Pair(folder, "", 2, 60, heartbeat=5)
    frozen = [pair.processes[index].pid, pair.wait_until_running()[index]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        other = pair.processes[1 - index].wait(timeout=30)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        return other, *pair.end()
    finally:
        for process in pair.processes:
            process.kill()


@pytest.mark.long
def test_a_frozen_process_counts_as_lost(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda index: freeze(tmp_path, index), (0, 1))) == [(69, [69, 69], [LOST, LOST])] * 2


# The caller has initialized JAX, as a notebook or a launcher does.
INITIALIZED = """
import sys
from tli_jax.distributed import processes
assert processes.is_first() and processes.gather_json({}) == [{}] and "jax" not in sys.modules
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
indices = [value["index"] for value in processes.gather_json({"index": jax.process_index()})]
with processes.first(), open(sys.argv[3], "w") as report:  # not stdout, where Gloo's threads print into our lines
    print(processes.is_first(), indices, file=report)
"""


@pytest.mark.all_cores
def test_identity_follows_jax_distributed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "error", "-c", INITIALIZED]
    pair = [
        subprocess.Popen(
            [*command, str(index), address, str(tmp_path / str(index))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    for index, (process, error) in enumerate(zip(pair, errors, strict=True)):
        assert process.returncode == 0, error
        assert (tmp_path / str(index)).read_text() == f"{index == 0} [0, 1]\n"


def test_single_process():
    processes.start(False, None)
    assert processes.is_first()
    processes.barrier("nothing")
    with processes.first():
        pass
    with pytest.raises(SystemExit) as left:
        processes.leave(66)
    assert left.value.code == 66
    assert not processes.is_peer_lost(jax.errors.JaxRuntimeError("Gloo all-reduce failed"))


@pytest.mark.parametrize("process", ["", "0", "2/2@host:1", "0/2@host", "-1/2@host:1", "0/2@:1", "0/2@host:65536"])
def test_malformed_process(process):
    with pytest.raises(UsageError, match="INDEX/COUNT@HOST:PORT"):
        processes.start(False, process)


def test_port_in_use():
    with socket.create_server(("", 0)) as server, pytest.raises(UsageError, match="cannot listen on this port"):
        processes.start(False, f"0/2@127.0.0.1:{server.getsockname()[1]}")


def test_no_cluster(tmp_path):
    flags = ["--distributed", "--run", str(tmp_path / "run"), "--model", "embedded"]
    ended = subprocess.run([sys.executable, "-m", "tli_jax.train", *flags], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "no cluster found" in ended.stderr and "--process" in ended.stderr


@pytest.mark.parametrize("message", ["UNKNOWN: Gloo all-reduce failed: Connection closed by peer", "UNAVAILABLE: gone"])
def test_peer_lost_in_the_cause_of_an_exception(monkeypatch, message):
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    outer = ValueError("could not save")
    outer.__cause__ = jax.errors.JaxRuntimeError(message)
    assert processes.is_peer_lost(outer)
    outer.__cause__ = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert not processes.is_peer_lost(outer)


def test_stop_signal_sets_a_flag_and_restores_the_handlers():
    outer = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: outer.append(number))
    try:
        with pytest.raises(StoppedError), processes.StopSignal() as stop:
            end_by_signal(stop)
        assert outer == []
        with processes.StopSignal():  # a signal that the block does not act on is not lost
            os.kill(os.getpid(), signal.SIGTERM)
            assert outer == []
        assert outer == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def end_by_signal(stop):
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    raise StoppedError("stopped")


def test_second_signal_exits_at_once():
    code = (
        "import os, signal, time\n"
        "from tli_jax.distributed import processes\n"
        "with processes.StopSignal():\n"
        "    for _ in range(3): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.6)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75
    assert done.stderr.startswith("error: stopped at once") and done.stderr.count("\n") == 1


def test_flag_array_has_one_element_per_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    raised, lowered = processes.flag_array(mesh, True), processes.flag_array(mesh, False)
    np.testing.assert_array_equal(raised, np.ones(8, np.int32))
    np.testing.assert_array_equal(lowered, np.zeros(8, np.int32))
    assert len(raised.sharding.device_set) == 8
    assert processes.flag_array(mesh, True) is raised
