"""The frame that every command runs in: errors become one line and an exit code, signals unwind, progress is shown."""

import argparse
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from tli_jax.cli.console import printable
from tli_jax.errors import MissingInputError, StorageError, TliError, UsageError

# Seconds between two plain lines of progress where there is no terminal.
_LINE_EVERY = 5.0
# What the system says of a path that leads nowhere; everything else it refuses is a matter of storage.
_BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# How Python and the dynamic linker word it when memory runs out.
_NO_MEMORY = re.compile("can't start new thread|cannot allocate memory|failed to map segment", re.I)


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that a wrong argument is shown like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _Stopped(BaseException):
    """SIGTERM or SIGINT: unwinds, so that what is half-written is removed."""


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; its exit code. One line on stderr says what is wrong, the traceback comes with ``--debug``."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # clearing up takes a moment, and is not to be stopped
        raise _Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without "→" must not end a growth
            stream.reconfigure(errors="backslashreplace")
    try:
        main(arguments)
        sys.stdout.flush()
    except _Stopped as stopped:
        return _say(f"stopped by {stopped}: run the same command again", 75)
    except BrokenPipeError:
        # Whoever read our output has left; what Python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TliError, OSError, MemoryError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, TliError):
            return _say(str(error), error.exit_code)
        if isinstance(error, OSError):
            kind = MissingInputError if error.errno in _BAD_PATH else StorageError
            return _say(f"{error.filename or 'the system'}: {error.strerror or error}", kind.exit_code)
        return _say("out of memory", StorageError.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if _NO_MEMORY.search(str(error)):
            return _say("out of memory", StorageError.exit_code)
        if isinstance(error, ValueError) and "embedded null" in str(error):
            return _say("a path holds a null byte: give another path", UsageError.exit_code)
        return _say(f"internal error, {type(error).__name__}: {error}; --debug shows where", TliError.exit_code)
    return 0


def _say(message: str, code: int) -> int:
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
    return code
