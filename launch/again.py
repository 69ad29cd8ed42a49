"""Runs a command, and again for as long as it leaves with 75, unless this process has been told to stop; see worker.sh.

Not in bash: there, a signal that comes while the command leaves can lose its exit code.
"""

import signal
import subprocess
import sys
from types import FrameType

_SAVED = 75


def main(words: list[str]) -> int:
    told, child = False, None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if child is not None:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while True:
        child = subprocess.Popen(words)
        if told:  # in between, when there was nobody to tell
            child.terminate()
        code = child.wait()
        if code != _SAVED or told:
            return code if code >= 0 else 128 - code
        print("left with 75, everything is saved: going on", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
