"""Several processes start, stop and die together: real ones, two with four devices each."""

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
from tli_jax.errors import OutputError, UsageError

LOST = f"error: {processes.LOST}\n"
OWN = "error: my own error\n"

# What a training is to these tests: steps over all devices, until something happens.
SCRIPT = """
import os, sys, time
from tli_jax.cli.frame import run_command
from tli_jax.errors import DataError
from tli_jax.distributed import processes

processes._LEAVE = 5
process, timeout, what, written = sys.argv[1:]
if what == "wait":
    print("running", os.getpid(), flush=True)

def main(arguments):
    with processes.joined(False, process, int(timeout), heartbeat=5):
        train()

def train():
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    index = jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    step = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    with processes.first():
        print("found" if os.path.exists(written) else "missing", flush=True)
        if index == 0:
            if what == "first fails":
                raise DataError("my own error")
            open(written, "w").close()
    with processes.StopSignal() as stop:
        for number in range(20 if what == "end" else 100_000):
            if int(step(processes.flag_array(mesh, stop.requested))):
                print("stopped at", number, flush=True)
                processes.leave(75)
            if number == 10:
                print("running", os.getpid(), flush=True)
                if what == f"{index} raises":
                    raise DataError("my own error")
                if what == "all raise":
                    time.sleep(2 * index)
                    raise DataError("my own error")
                if what == f"{index} busy":
                    time.sleep(1000)
            time.sleep(0.01)

assert "jax" not in sys.modules
processes.leave(run_command(main, []))
"""


class Pair:
    """Processes of the script, each with files of what it says."""

    def __init__(self, folder, what, count, timeout):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
        self.files = folder / where
        self.files.mkdir()
        self.started = []
        devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
        for index in range(count):
            command = [sys.executable, "-W", "error", "-c", SCRIPT, f"{index}/2@{where}", str(timeout), what]
            with (self.files / f"{index}.out").open("w") as out, (self.files / f"{index}.err").open("w") as err:
                self.started.append(
                    subprocess.Popen(
                        [*command, str(self.files / "written")],
                        env=os.environ | devices,
                        stdout=out,
                        stderr=err,
                    )
                )

    def printed(self):
        """Lines of each, without those in which Gloo tells who connected."""
        texts = [(self.files / f"{index}.out").read_text() for index in range(len(self.started))]
        return [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in texts]

    def running(self):
        """Wait until both are in the middle of it; the pids of the children that compute."""
        while True:
            found = [line.split()[1] for lines in self.printed() for line in lines if line.startswith("running")]
            if len(found) == len(self.started):
                return [int(pid) for pid in found]
            assert all(process.poll() is None for process in self.started), self.printed()
            time.sleep(0.02)

    def end_after(self, frozen):
        """Wake up what was frozen; exit codes and stderr of all."""
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        return self.end()

    def end(self):
        """Exit codes and stderr of all."""
        try:
            codes = [process.wait(timeout=50) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        errors = [(self.files / f"{index}.err").read_text() for index in range(len(self.started))]
        return codes, errors


def case(folder, what="", do=None, index=0, count=2, timeout=60):
    """Run the script in two processes, do something to one of them while they run, and see how they end."""
    pair = Pair(folder, what, count, timeout)
    children = pair.running() if do is not None else []
    since = time.monotonic()
    if do is not None:
        do(pair.started[index].pid, children[index])
    codes, errors = pair.end()
    return codes, errors, pair.printed(), time.monotonic() - since


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
    # Who started the supervisor passes on what all of them got, and the supervisor has it twice.
    terminate_all(process, child)
    time.sleep(0.1)
    os.kill(process, signal.SIGTERM)


def terminate_twice(process, child):
    os.kill(process, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(process, signal.SIGTERM)


def wait_gone(pid):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, and whoever adopted it takes its time to notice
            return
        time.sleep(0.01)
    raise AssertionError(f"the child {pid} outlived its supervisor")


NOW = "error: stopped at once, nothing was saved: run the same command again to resume\n"
KILLED = "error: the process was killed by SIGKILL\n"
CASES = {
    "kill 1": ({"do": kill, "index": 1}, [69, -9], [LOST, ""]),
    "kill 0": ({"do": kill, "index": 0}, [-9, 69], ["", LOST]),
    "kill 1 while 0 is not in a collective": ({"what": "0 busy", "do": kill, "index": 1}, [69, -9], [LOST, ""]),
    "kill 0 while 1 is not in a collective": ({"what": "1 busy", "do": kill, "index": 0}, [-9, 69], ["", LOST]),
    "kill the child of 1": ({"do": kill_child, "index": 1}, [69, 137], [LOST, KILLED]),
    "1 raises": ({"what": "1 raises"}, [69, 65], [LOST, OWN]),
    "0 raises": ({"what": "0 raises"}, [65, 69], [OWN, LOST]),
    "0 raises while 1 waits for it": ({"what": "first fails"}, [65, 69], [OWN, LOST]),
    "all raise, not at once": ({"what": "all raise"}, [65, 65], [OWN, OWN]),
    "stop 0": ({"do": terminate, "index": 0}, [75, 75], ["", ""]),
    "stop 1, as Slurm does": ({"do": terminate_all, "index": 1}, [75, 75], ["", ""]),
    "stop 0, as Slurm does through a script": ({"do": terminate_through_a_script, "index": 0}, [75, 75], ["", ""]),
    "stop 1 twice while it is busy": ({"what": "1 busy", "do": terminate_twice, "index": 1}, [69, 75], [LOST, NOW]),
    "stop 0 while it waits for 1": ({"what": "wait", "do": terminate, "count": 1}, [75], [NOW]),
    "end": ({"what": "end"}, [0, 0], ["", ""]),
    "0 alone": ({"count": 1, "timeout": 3}, [69], None),
}


QUICK = ["kill 0", "1 raises", "stop 1, as Slurm does", "stop 0, as Slurm does through a script", "end"]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in CASES if name not in QUICK], marks=pytest.mark.long)]
)
def test_several_processes_end_together(names, tmp_path):
    cases = {name: CASES[name] for name in names}
    with ThreadPoolExecutor(4) as pool:
        runs = {name: pool.submit(case, tmp_path, **options) for name, (options, _, _) in cases.items()}
    wrong = []
    for name, (_, codes, errors) in cases.items():
        *found, printed, took = runs[name].result()
        print(f"{name}: {took:.1f} s")
        if found != [codes, errors or found[1]] or took > 30:
            wrong.append((name, *found, printed, took))
        if codes == [75, 75] and not (printed[0][-1] == printed[1][-1] and printed[0][-1].startswith("stopped at")):
            wrong.append((name, printed))
    assert not wrong
    if "end" in names:
        assert [lines[0] for lines in runs["end"].result()[2]] == ["missing", "found"]
        return
    (alone,) = runs["0 alone"].result()[1]
    assert alone.startswith("error: not all processes started within 3 s") and alone.count("\n") == 1


def freeze(folder, index):
    """SIGSTOP to one of two; the exit code of the other, and then of both, once the first is woken up."""
    pair = Pair(folder, "", 2, 60)
    frozen = [pair.started[index].pid, pair.running()[index]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        return pair.started[1 - index].wait(timeout=30), *pair.end_after(frozen)
    finally:
        for process in pair.started:
            process.kill()


@pytest.mark.long
def test_a_frozen_process_counts_as_gone(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda index: freeze(tmp_path, index), (0, 1))) == [(69, [69, 69], [LOST, LOST])] * 2


def test_one_process_needs_nothing():
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
def test_process_that_does_not_read(process):
    with pytest.raises(UsageError, match="INDEX/COUNT@HOST:PORT"):
        processes.start(False, process)


def test_port_that_is_taken():
    with socket.create_server(("", 0)) as taken, pytest.raises(UsageError, match="cannot listen on this port"):
        processes.start(False, f"0/2@127.0.0.1:{taken.getsockname()[1]}")


def test_no_cluster(tmp_path):
    flags = ["--distributed", "--run", str(tmp_path / "run"), "--model", "embedded"]
    ended = subprocess.run([sys.executable, "-m", "tli_jax.train", *flags], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "no cluster found" in ended.stderr and "--process" in ended.stderr


@pytest.mark.parametrize("message", ["UNKNOWN: Gloo all-reduce failed: Connection closed by peer", "UNAVAILABLE: gone"])
def test_peer_lost_in_what_an_exception_came_from(monkeypatch, message):
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    outer = ValueError("could not save")
    outer.__cause__ = jax.errors.JaxRuntimeError(message)
    assert processes.is_peer_lost(outer)
    outer.__cause__ = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert not processes.is_peer_lost(outer)


def test_stop_signal_sets_a_flag_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with processes.StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_leaves_at_once():
    code = (
        "import os, signal, time\n"
        "from tli_jax.distributed import processes\n"
        "with processes.StopSignal():\n"
        "    for _ in range(3): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.6)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75
    assert done.stderr.startswith("error: stopped at once") and done.stderr.count("\n") == 1


def test_flag_array_has_one_element_a_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    raised, lowered = processes.flag_array(mesh, True), processes.flag_array(mesh, False)
    np.testing.assert_array_equal(raised, np.ones(8, np.int32))
    np.testing.assert_array_equal(lowered, np.zeros(8, np.int32))
    assert len(raised.sharding.device_set) == 8
    assert processes.flag_array(mesh, True) is raised


def test_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from tli_jax.distributed import processes\n"
        "assert 'jax' not in sys.modules\n"
        "with processes.lock(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        with pytest.raises(OutputError, match="in use by another process"), processes.lock(tmp_path):
            pass
        holder.kill()
    for _ in range(2):
        with processes.lock(tmp_path):
            pass
