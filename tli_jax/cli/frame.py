"""Running a command: errors become one line and an exit code, and signals clean up."""

import argparse
import codecs
import errno
import gc
import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from tli_jax.cli.console import printable
from tli_jax.cli.libtpu import silence_libtpu
from tli_jax.errors import MissingInputError, StorageError, TliError, UsageError

# System errors for a path that does not exist; all others are storage errors.
_BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# How Python and the dynamic linker report that memory has run out.
_NO_MEMORY = re.compile("can't start new thread|cannot allocate memory|failed to map segment", re.I)
# For terminals and files whose encoding lacks these characters.
_ASCII = {
    "→": "->",
    "×": "x",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": "*",
    "±": "+-",
    "Δ": "d",
    "≈": "~",
    "⌈": "ceil(",
    "⌉": ")",
    "─": "-",
    "√": "sqrt ",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
}


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing and exiting; its help puts the examples before the options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    def format_help(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        formatter = argparse.HelpFormatter(self.prog, max_help_position=30, width=width)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        text = formatter.format_help() + (f"\n{self.epilog}\n" if self.epilog else "")
        for group in self._action_groups:
            formatter = argparse.HelpFormatter(self.prog, max_help_position=30, width=width)
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
            text += f"\n{section}" if (section := formatter.format_help()) else ""
        return text


class _Stopped(BaseException):
    """SIGTERM or SIGINT: unwinds the stack, so that partial output is removed."""


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. An error is one line on stderr; ``--debug`` adds the traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # cleaning up takes a moment and must not be interrupted
        raise _Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Tracing makes many long-lived objects. Searching them for garbage after every 700 takes a tenth of a short run.
    gc.set_threshold(50_000, 10, 10)
    silence_libtpu()
    codecs.register_error("tli_jax.ascii", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding without "→" must not end a growth
            stream.reconfigure(errors="tli_jax.ascii")
    try:
        main(arguments)
        sys.stdout.flush()
    except _Stopped as stopped:
        return _fail(f"stopped by {stopped}: run the same command again", 75)
    except BrokenPipeError:
        # stdout was closed, by head for example. Python would flush the rest into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(*_explain(error))
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """The message and the exit code for an error."""
    if isinstance(error, TliError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        kind = MissingInputError if error.errno in _BAD_PATH else StorageError
        return f"{error.filename or 'the system'}: {error.strerror or error}", kind.exit_code
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return "out of memory", StorageError.exit_code
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path contains a null byte: give another path", UsageError.exit_code
    return f"internal error, {type(error).__name__}: {error}; run with --debug to see where", TliError.exit_code


def _fail(message: str, code: int) -> int:
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
    return code


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for encoders: ASCII for common symbols, escapes for the rest."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    escaped = "".join(
        _ASCII.get(c, c.encode("ascii", "backslashreplace").decode()) for c in error.object[error.start : error.end]
    )
    return escaped, error.end
