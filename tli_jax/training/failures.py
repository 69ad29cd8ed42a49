"""Classify errors of a checkpoint: is the checkpoint damaged, or did the system refuse to read it?

Orbax and TensorStore raise all kinds of exceptions for both. The difference matters: a damaged checkpoint is set aside,
but an unplugged disk or a missing permission is no reason to give one up.
"""

import errno
import functools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tli_jax.errors import DataError, StorageError, UsageError

# The file is missing, or replaced by something else. All other error numbers are the system's.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# Status codes of TensorStore, XLA and Google Cloud Storage that do not depend on the content of a file.
_STATUS = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

_T = TypeVar("_T")


class DamagedError(Exception):
    """A checkpoint cannot be restored; the message says why."""

    kind, lack, suffix = DataError, "is intact", ".damaged"


class ForeignError(Exception):
    """A checkpoint belongs to another run; the message says to which."""

    kind, lack, suffix = UsageError, "is of this run", ".foreign"


def on_all_processes(what: str, action: Callable[[], _T]) -> _T:
    """Return the result of ``action``, or raise the same error on every process if it fails on any.

    Raises:
        DamagedError: the content is damaged or missing.
        StorageError: the system refused to read, or is out of memory.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # readers raise anything for a damaged file
        failure = error
    refusal = failure and system_error(failure)
    codes = [0 if failure is None else 2 if refusal else 1]
    if jax.process_count() > 1:
        codes = multihost_utils.process_allgather(np.array(codes)).ravel().tolist()
    worst = max(codes)
    if worst == 2:
        why = refusal or f"process {codes.index(2)} cannot read it"
        raise StorageError(
            f"{what}: {why}: nothing was changed; make it readable, then run the same command again"
        ) from failure
    if worst == 1:
        why = one_line(failure) if failure else f"process {codes.index(1)} cannot read it"
        raise DamagedError(f"{what}: {why}") from failure
    return result  # pyright: ignore[reportReturnType]


def system_error(error: BaseException) -> str | None:
    """Return why the system refused, or None if the error is about the content."""
    for cause in _causes(error):
        text = str(cause)
        code = cause.errno if isinstance(cause, OSError) else None
        if code is None and (match := _OS_ERROR.search(text)):
            code = int(match[1])
        if code is not None and code not in _MISSING:
            return os.strerror(code)
        if isinstance(cause, MemoryError):
            return "out of memory"
        if code is None and (match := _STATUS.search(text)):
            return f"{match[1]}: {_shorten(text)}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    causes = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []
    if cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        causes.append(cause)
    for cause in causes:
        yield from _causes(cause)


def one_line(error: BaseException) -> str:
    """Describe an exception in one line."""
    if code := _OS_ERROR.search(str(error)):  # at the end of a page from TensorStore
        return os.strerror(int(code[1]))
    text = _shorten(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shorten(text: str) -> str:
    return " ".join(text.split())[:300]


def broadcast(value: int) -> int:
    """Return process 0's value on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """A filter for log records. asyncio reports the errors of Orbax's files (etils) with nothing but a traceback."""
    text = record.pathname + record.getMessage()
    if record.exc_info:
        text += "".join(traceback.format_exception(*record.exc_info))
    return not re.search("orbax|etils", text)


@functools.cache
def silence_orbax() -> None:
    """Keep Orbax's tracebacks off stderr: it also raises the errors, and the user gets them in one line.

    On its first error, Orbax also closes its event loop under everything that is still reading or writing. Each of
    those would leave a traceback, some of them much later.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_from_orbax)
    # Coroutines that Orbax drops then; the warning names whatever line runs when they are collected.
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    hook = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        code = getattr(problem.object, "cr_code", None)  # of a coroutine
        if "orbax" not in getattr(code, "co_filename", "") and str(problem.exc_value) != "Event loop is closed":
            hook(problem)

    sys.unraisablehook = unraisable
