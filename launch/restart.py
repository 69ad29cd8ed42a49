"""Runs a command and restarts it whenever it exits with 75, unless this process was asked to stop; see worker.sh.

Bash cannot do this reliably: if a signal arrives while the command exits, ``wait`` can lose its exit code.
"""

import signal
import subprocess
import sys
from types import FrameType

_PREEMPTED = 75  # everything is saved; the same command resumes


def main(command: list[str]) -> int:
    stopping, child = False, None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child is not None:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while True:
        child = subprocess.Popen(command)
        if stopping:  # the signal arrived before there was a child to pass it on to
            child.terminate()
        code = child.wait()
        if code != _PREEMPTED or stopping:
            return code if code >= 0 else 128 - code
        print("exited with 75, everything is saved: restarting", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
