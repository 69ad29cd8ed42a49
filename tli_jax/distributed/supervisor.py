"""The supervisor of a training process: it turns JAX's abort after the loss of a peer into one line and an exit code.

When a peer is lost, JAX aborts the process from C++ with a page of text. No public setting changes that, and code in
the dying process runs too late. So in a distributed run, each training process is the child of a small supervisor.
"""

import contextlib
import io
import os
import re
import signal
import socket
import sys
import threading
import time
from types import FrameType

from tli_jax.errors import UnavailableError

# Signals within this many seconds are one request: Slurm, systemd and ^C also reach processes that forward them.
REPEAT_WINDOW = 1
STOPPED_NOW = b"error: stopped at once, nothing was saved: run the same command again to resume\n"
_JOINED = 255  # the child reports this to its supervisor once it has joined, and later the exit code that it ends with
_CPP_ERROR = re.compile(rb"^[EF]\d{4} .*(coordination_service|JAX distributed service)")
_CPP_ABORT = b"JAX distributed service detected fatal errors"

_parent: socket.socket | None = None  # in a supervised child


def is_supervised() -> bool:
    return _parent is not None


def report_joined() -> None:
    """Tell the supervisor that the other processes are there."""
    report_exit(_JOINED)


def report_exit(code: int) -> None:
    """Tell the supervisor, if any, which exit code to use, however this process ends."""
    if _parent is not None:
        with contextlib.suppress(OSError):
            _parent.send(bytes([code]))


def supervise(peer_lost: str, never_joined: str, leave_timeout: float) -> None:
    """Fork. Return in the child; in the parent, wait for the child, report why it ended, and exit with its code.

    Call this before any I/O and before starting threads.

    Args:
        peer_lost: the error message if JAX aborts the child.
        never_joined: the same, if the child has not called ``report_joined``.
        leave_timeout: seconds that the child gets to exit after ``report_exit``. It is killed 5 seconds later.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = socket.socketpair()
    errors, errors_of_child = os.pipe()
    child = os.fork()
    if child == 0:
        ours.close()
        os.close(errors)
        _start_child(theirs, errors_of_child)
        return
    theirs.close()
    os.close(errors_of_child)
    ours.setblocking(False)
    held: list[bytes] = []
    pump = threading.Thread(target=_forward_errors, args=(errors, held), daemon=True)
    pump.start()
    reports = bytearray()
    _forward_signals(child, reports)
    code = _wait(child, ours, reports, held, leave_timeout + 5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    pump.join(1)
    if exit_codes := reports.strip(bytes([_JOINED])):
        code = exit_codes[0]
    elif _has_aborted(held):
        code = UnavailableError.exit_code
        print("error:", peer_lost if reports else never_joined, file=sys.stderr)
    else:
        sys.stderr.buffer.write(b"".join(held))
        if code < 0:
            print(f"error: the process was killed by {signal.Signals(-code).name}", file=sys.stderr)
            code = 128 - code
    sys.stderr.flush()
    os._exit(code)


def _start_child(supervisor: socket.socket, errors: int) -> None:
    global _parent
    # In its own group, ^C reaches only the supervisor, which forwards it; and helpers of the child end with the child.
    os.setpgid(0, 0)
    # Python keeps its stdout and stderr, C++ writes to the pipe. What C++ prints to stdout would break the JSON of a
    # command: reports of Gloo on every connection, in pieces from several threads. NCCL prints only if asked to.
    out = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "line_buffering": sys.stdout.line_buffering}
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(os.dup(1), "w")), **out)
    sys.stderr = io.TextIOWrapper(io.FileIO(os.dup(2), "w"), errors="backslashreplace", write_through=True)
    os.dup2(errors if "NCCL_DEBUG" in os.environ else os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    os.close(errors)
    _parent = supervisor

    def end_with_supervisor() -> None:
        supervisor.recv(1)  # nothing is ever sent: this returns when the supervisor has ended
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_supervisor, daemon=True).start()


def _forward_errors(errors: int, held: list[bytes]) -> None:
    """Forward what C++ writes, but hold back everything from the first line about a lost peer."""
    with open(errors, "rb") as lines:
        for line in lines:
            if held or _CPP_ERROR.match(line):
                held.append(line)
            else:
                os.write(2, line)


def _has_aborted(held: list[bytes]) -> bool:
    return any(_CPP_ABORT in line for line in held)


def _forward_signals(child: int, reports: bytearray) -> None:
    last: float | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if last is not None and time.monotonic() - last <= REPEAT_WINDOW:
            return
        is_repeated, last = last is not None, time.monotonic()
        if is_repeated or not reports:  # not joined yet: the child is in C++, where no Python handler runs
            os.write(2, STOPPED_NOW)
            reports.append(75)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if 75 in reports else number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _wait(child: int, connection: socket.socket, reports: bytearray, held: list[bytes], timeout: float) -> int:
    """Wait for the child, and collect its reports; kill it ``timeout`` seconds after it has begun to leave."""

    def receive() -> None:
        with contextlib.suppress(OSError):
            reports.extend(connection.recv(16))

    deadline = None
    while True:
        time.sleep(0.05)
        receive()
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            receive()
            return os.waitstatus_to_exitcode(status)
        if deadline is None and (reports.strip(bytes([_JOINED])) or _has_aborted(held)):
            deadline = time.monotonic() + timeout
        elif deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
