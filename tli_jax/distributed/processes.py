"""The processes of a run: they start together, agree on when to stop, and end together when one of them is lost.

A lost peer shows in three ways:

- A collective fails with a Python exception (Gloo), which ``joined`` turns into ``UnavailableError``.
- The peer's connection closes, see ``watch``.
- The coordination service notices (process 0 is gone, heartbeats are missing, a peer never leaves), and JAX aborts the
  process, even one that hangs in a collective. ``supervisor`` turns that into the same error.
"""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from tli_jax.distributed import supervisor, watch
from tli_jax.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import jax

LOST = "another process of this run has ended, see its output: run the same command again to resume"
# In seconds. All but the last are JAX's defaults.
_TIMEOUTS = {"start": 300, "heartbeat": 100, "leave": 10}
_MAX_JSON = 2**16  # bytes
# How Gloo, gRPC and the coordination service report a lost peer. They share one exception class with all other errors.
_LOST = re.compile(r"gloo|closed by peer|reset by peer|socket closed|coordination|heartbeat|barrier|UNAVAILABLE", re.I)


def start(distributed: bool, process: str | None, timeouts: Mapping[Any, int] | None = None) -> None:
    """Join the other processes of a run. Call this before any computation, and before starting threads.

    Without either option, this does nothing.

    Args:
        distributed: let JAX find the other processes, as it can on Cloud TPU, GKE and Slurm. Process 0 listens on the
            port in the environment variable JAX_COORDINATOR_PORT, if set.
        process: ``INDEX/COUNT@HOST:PORT``, for other clusters. HOST:PORT is where process 0 listens.
        timeouts: in seconds. ``start``, 300 by default: when not all processes have started by then, they exit with 69.
            ``heartbeat``, 100: a peer without a heartbeat for so long counts as lost. ``leave``, 10: processes that
            leave for the same reason wait so long for each other, then JAX aborts those that are left.

    Raises:
        UsageError: ``process`` is malformed, its port is in use, or JAX finds no cluster.
    """
    match = re.fullmatch(r"(\d+)/(\d+)@(.+:(\d+))", process or "")
    if process is not None and not (match and int(match[1]) < int(match[2]) and int(match[4]) < 2**16):
        raise UsageError(f"process {process}: write INDEX/COUNT@HOST:PORT, e.g. 0/2@10.0.0.1:1234; INDEX starts at 0")
    if not (distributed or match):
        return
    seconds = _TIMEOUTS | dict(timeouts or {})
    if match and int(match[1]) == 0:
        try:  # jax 0.10 crashes if it cannot listen
            socket.create_server(("", int(match[4]))).close()
        except OSError as error:
            raise UsageError(f"process {process}: cannot listen on this port ({error}): choose another port") from error
    never_joined = f"not all processes started within {seconds['start']} s: start all of them, with the same HOST:PORT"
    supervisor.supervise(LOST, never_joined, seconds["leave"])
    import jax

    if distributed:
        print(f"waiting up to {seconds['start']} s for the other processes to start", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler, in C++, would replace ours
    try:
        jax.distributed.initialize(
            coordinator_address=match[3] if match else None,
            num_processes=int(match[2]) if match else None,
            process_id=int(match[1]) if match else None,
            cluster_detection_method="deactivate" if match else None,
            initialization_timeout=seconds["start"],
            heartbeat_timeout_seconds=seconds["heartbeat"],
            shutdown_timeout_seconds=seconds["leave"],
        )
    except ValueError as error:
        raise UsageError(f"distributed: no cluster found ({error}): use --process INDEX/COUNT@HOST:PORT") from error
    supervisor.report_joined()


def _watch_peers(process: str | None) -> None:
    import jax

    host = process.partition("@")[2].rpartition(":")[0] if process else socket.gethostname()
    watch.watch(jax.process_index(), jax.process_count(), host, gather_json, _end_without_peer)


def _end_without_peer() -> NoReturn:
    print("error:", LOST, file=sys.stderr, flush=True)
    supervisor.report_exit(UnavailableError.exit_code)
    os._exit(UnavailableError.exit_code)


@contextlib.contextmanager
def joined(distributed: bool, process: str | None, timeouts: Mapping[Any, int] | None = None) -> Iterator[None]:
    """Call ``start``, and turn the loss of a peer in the block into an error.

    Raises:
        UnavailableError: a peer is lost.
    """
    start(distributed, process, timeouts)
    try:
        if supervisor.is_supervised():
            _watch_peers(process)
        yield
    except Exception as error:
        if is_peer_lost(error):
            raise UnavailableError(LOST) from error
        raise


def is_distributed() -> bool:
    """Return whether ``jax.distributed`` is initialized, by ``start`` or by the caller. Does not import JAX."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_first() -> bool:
    """Return whether this is process 0, which writes everything that is written once."""
    return not is_distributed() or sys.modules["jax"].process_index() == 0


def is_peer_lost(error: BaseException | None) -> bool:
    """Return whether an exception, or one of its causes, reports that another process is gone."""
    if error is None or not is_distributed():
        return False
    is_lost = isinstance(error, sys.modules["jax"].errors.JaxRuntimeError) and _LOST.search(str(error))
    return bool(is_lost) or is_peer_lost(error.__cause__ or error.__context__)


def leave(code: int) -> NoReturn:
    """Exit. Processes of a run that exit at about the same time keep their exit codes; the others get 69."""
    if not supervisor.is_supervised():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:  # wait for the others, however long they take
        try:
            barrier("end")
        except Exception:
            code = UnavailableError.exit_code
            print("error:", LOST, file=sys.stderr, flush=True)
    supervisor.report_exit(code)
    watch.say_goodbye()
    if code != UnavailableError.exit_code:
        import jax

        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # waits for the others, or aborts: the supervisor knows the exit code
    os._exit(code)  # Python's own shutdown may wait for the peers


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name."""
    if is_distributed():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather_json(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the values of all processes, by process index. Each may have up to 64 KiB of JSON."""
    if not is_distributed():
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    assert len(text) <= _MAX_JSON
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(_MAX_JSON), np.uint8))
    return [json.loads(bytes(row)) for row in np.asarray(rows).reshape(-1, _MAX_JSON)]


def share(data: bytes) -> bytes:
    """Return the bytes that process 0 has, in every process."""
    if not is_distributed():
        return data
    import numpy as np
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    row = np.frombuffer(data if is_first() else bytes(size), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(row)))


@contextlib.contextmanager
def first(name: str = "first") -> Iterator[None]:
    """Run the block in process 0, then in the others, which can use its results. If it fails, all processes end."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


@functools.cache  # at most two arrays per mesh, made once. They must not be donated
def flag_array(mesh: "jax.sharding.Mesh", requested: bool) -> "jax.Array":
    """Return int32 flags, one per device, all of them set or unset on this process.

    Their maximum says whether any process has requested to stop.
    """
    import jax
    import numpy as np

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    flag = np.full(1, requested, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: flag)


class StopSignal:
    """In the block, SIGTERM and SIGINT only set ``requested``. A second signal exits at once, with 75.

    If the block ends without an exception, it came too late for it, and is delivered again.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._number = signal.SIGTERM

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            signal.raise_signal(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._since > supervisor.REPEAT_WINDOW:
            os.write(2, supervisor.STOPPED_NOW)
            supervisor.report_exit(75)
            os._exit(75)
        elif not self.requested:
            self.requested, self._since, self._number = True, time.monotonic(), signal.Signals(number)
