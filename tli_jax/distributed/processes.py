"""One process or several: they start together, agree when to stop, and none outlives a peer that is gone.

JAX's own answer to a lost peer is to abort the process from C++, with a page of text; no public setting changes that,
and code in the dying process comes too late. So where there are several, each training process is the child of a small
supervisor, which turns that death into one line and exit code 69. Lost peers reach us in two ways:

- a collective fails at once with a Python exception (Gloo), which `joined` turns into `UnavailableError`;
- the coordination service of process 0 goes, misses a peer's heartbeats, or waits in vain for a peer to leave, and JAX
  aborts. That also frees a process that hangs in a collective.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from tli_jax.errors import OutputError, StorageError, UnavailableError, UsageError

if TYPE_CHECKING:
    import jax

LOST = "a peer process is gone, its own messages say why: run the same command again to go on"
_HEARTBEAT = 10  # seconds without a sign of life until a peer counts as gone
_LEAVE = 10  # seconds in which processes that leave for the same reason meet; after them those that did not are aborted
_SAME = 1  # second in which signals are one request: Slurm, systemd and ^C reach whoever passes a signal on, too
_AT_ONCE = b"error: stopped at once, nothing was saved: run the same command again to go on\n"
_SAYS = 2**16  # bytes that a process may say to all
_JOINED = 255  # what a child tells its supervisor, besides the exit code that it leaves with
# How Gloo, gRPC and the coordination service word it when the other end is gone. There is one exception class for all.
_LOST = re.compile(r"gloo|closed by peer|reset by peer|socket closed|coordination|heartbeat|barrier|UNAVAILABLE", re.I)
_C_ERROR = re.compile(rb"^[EF]\d{4} .*(coordination_service|JAX distributed service)")
_C_ABORT = b"JAX distributed service detected fatal errors"

_supervisor: socket.socket | None = None


def start(distributed: bool, process: str | None, timeout: int | None = None, heartbeat: int = _HEARTBEAT) -> None:
    """Join the other processes; before any computation, and before threads. With neither option nothing is done.

    Args:
        distributed: let JAX find the others: on Cloud TPU, GKE and Slurm it can. The environment's JAX_COORDINATOR_PORT
            is where process 0 then listens, if set.
        process: ``INDEX/COUNT@HOST:PORT`` of process 0, where it cannot.
        timeout: seconds to wait for all to come, by default 1800 where a cluster starts them, which may take its time,
            and 120 where they are started by hand. Whoever waits in vain leaves with 69.
        heartbeat: seconds without a sign of life until a peer counts as gone.

    Raises:
        UsageError: `process` does not read so, its port is taken, or JAX finds no cluster.
    """
    found = re.fullmatch(r"(\d+)/(\d+)@(.+:(\d+))", process or "")
    if process is not None and not (found and int(found[1]) < int(found[2]) and int(found[4]) < 2**16):
        raise UsageError(f"process {process}: write INDEX/COUNT@HOST:PORT, e.g. 0/2@10.0.0.1:1234; INDEX counts from 0")
    if not (distributed or found):
        return
    timeout = timeout or (120 if found else 1800)
    if found and int(found[1]) == 0:
        try:  # jax 0.10 crashes where this fails
            socket.create_server(("", int(found[4]))).close()
        except OSError as error:
            raise UsageError(f"process {process}: cannot listen on this port ({error}): take another one") from error
    _supervise(LOST, f"the other processes did not come within {timeout} s: start all of them, with the same HOST:PORT")
    import jax

    if distributed:
        print(f"waiting for the others, {timeout} s at most: does every worker start?", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler is in C++ and would hide ours
    try:
        jax.distributed.initialize(
            coordinator_address=found[3] if found else None,
            num_processes=int(found[2]) if found else None,
            process_id=int(found[1]) if found else None,
            cluster_detection_method="deactivate" if found else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_LEAVE,
        )
    except ValueError as error:
        raise UsageError(f"distributed: no cluster found ({error}): give --process INDEX/COUNT@HOST:PORT") from error
    _tell(_JOINED)


@contextlib.contextmanager
def joined(
    distributed: bool, process: str | None, timeout: int | None = None, heartbeat: int = _HEARTBEAT
) -> Iterator[None]:
    """`start`, and the loss of a peer inside becomes `UnavailableError`."""
    start(distributed, process, timeout, heartbeat)
    try:
        yield
    except Exception as error:
        if is_peer_lost(error):
            raise UnavailableError(LOST) from error
        raise


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that another process is gone."""
    if error is None or _supervisor is None:
        return False
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
        return True
    return is_peer_lost(error.__cause__ or error.__context__)


def leave(code: int) -> NoReturn:
    """End this process. Of several, those that leave within the same seconds keep their codes; the others get 69."""
    if _supervisor is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:  # whoever is done first waits, however long
        try:
            barrier("end")
        except Exception:
            code = UnavailableError.exit_code
            print("error:", LOST, file=sys.stderr, flush=True)
    _tell(code)
    if code != UnavailableError.exit_code:
        import jax

        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # meets the others, or has all aborted: the supervisor knows our code
    os._exit(code)  # what Python would do at its end, some of it waits for the peers


def is_first() -> bool:
    """Whether this is process 0, the one that writes what there is only once."""
    if _supervisor is None:
        return True
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if _supervisor is not None:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather_json(value: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has to say, by process index; at most 64 KiB of JSON each."""
    if _supervisor is None:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    assert len(text) <= _SAYS
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(_SAYS), np.uint8))
    return [json.loads(bytes(row)) for row in np.asarray(rows)]


@contextlib.contextmanager
def first(name: str = "first") -> Iterator[None]:
    """The body runs in process 0 first, then in the others, which find what it left. If it fails, all leave."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


@functools.cache  # two arrays a mesh: nothing is left to do in a step. They must not be donated
def flag_array(mesh: "jax.sharding.Mesh", requested: bool) -> "jax.Array":
    """int32, one element a device, all of this process' elements set or not: their maximum says whether any asked."""
    import jax
    import numpy as np

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    one = np.full(1, requested, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: one)


class StopSignal:
    """While entered, SIGTERM and SIGINT only set `requested`. The second one leaves at once, with 75."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._since > _SAME:
            os.write(2, _AT_ONCE)
            if _supervisor is not None:
                _tell(75)
            os._exit(75)
        elif not self.requested:
            self.requested, self._since = True, time.monotonic()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``, in process 0. The system releases it with the process, however that ends.

    Raises:
        OutputError: another process holds it.
        StorageError: the system refused to open it.
    """
    if not is_first():
        yield
        return
    try:  # to read and write: to open a FIFO for writing alone would wait for its reader
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{folder / 'lock'}: cannot be opened ({error.strerror}): fix its permissions") from error
    with os.fdopen(file, "rb", buffering=0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"run {folder} is in use by another process: wait for it, or take another run") from None
        yield


def _tell(byte: int) -> None:
    assert _supervisor is not None
    with contextlib.suppress(OSError):
        _supervisor.send(bytes([byte]))


def _supervise(lost: str, alone: str) -> None:
    """Return in a new child; here wait for it, say what ended it, and end with its code."""
    global _supervisor
    sys.stdout.flush()
    sys.stderr.flush()
    here, there = socket.socketpair()
    errors, written = os.pipe()
    child = os.fork()
    if child == 0:
        here.close()
        os.setpgid(0, 0)  # ^C reaches the supervisor alone, which passes it on; and helpers of the child end with it
        # Python keeps its terminal, C++ writes into the pipe.
        sys.stderr = io.TextIOWrapper(io.FileIO(os.dup(2), "w"), errors="backslashreplace", write_through=True)
        os.dup2(written, 2)
        os.close(errors)
        os.close(written)
        _supervisor = there
        threading.Thread(target=_end_with, args=(there,), daemon=True).start()
        return
    there.close()
    os.close(written)
    here.setblocking(False)
    held: list[bytes] = []
    pump = threading.Thread(target=_pump, args=(errors, held), daemon=True)
    pump.start()
    told, asked, deadline, ended = bytearray(), None, None, (0, 0)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is not None and time.monotonic() - asked <= _SAME:
            return
        again, asked = asked is not None, time.monotonic()
        if again or not told:  # the second time, or while it waits for the others: C++ lets no signal through
            os.write(2, _AT_ONCE)
            told.append(75)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if 75 in told else number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while not ended[0]:
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            told.extend(here.recv(16))
        ended = os.waitpid(child, os.WNOHANG)
        if deadline is None and (told.strip(bytes([_JOINED])) or any(_C_ABORT in line for line in held)):
            deadline = time.monotonic() + _LEAVE + 5  # it is leaving, and gets no longer for that
        elif deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
    with contextlib.suppress(OSError):
        told.extend(here.recv(16))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    pump.join(1)
    code = os.waitstatus_to_exitcode(ended[1])
    if left := told.strip(bytes([_JOINED])):
        code = left[0]
    elif any(_C_ABORT in line for line in held):
        code = UnavailableError.exit_code
        print("error:", lost if told else alone, file=sys.stderr)
    else:
        sys.stderr.buffer.write(b"".join(held))
        if code < 0:
            print(f"error: the process was ended by {signal.Signals(-code).name}", file=sys.stderr)
            code = 128 - code
    sys.stderr.flush()
    os._exit(code)


def _end_with(supervisor: socket.socket) -> None:
    supervisor.recv(1)  # nothing is ever sent: it returns when the supervisor is gone, however that ended
    os.killpg(0, signal.SIGKILL)


def _pump(errors: int, held: list[bytes]) -> None:
    """Pass on what C++ writes, up to the page about a lost peer, which is held back until it is known what it meant."""
    with open(errors, "rb") as lines:
        for line in lines:
            if held or _C_ERROR.match(line):
                held.append(line)
            else:
                os.write(2, line)
