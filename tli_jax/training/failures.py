"""What went wrong with a checkpoint: is it damaged, or did the system refuse to read it?

Orbax and TensorStore report both as whatever exception is at hand. The difference matters: a damaged checkpoint is set
aside, but nothing may be given up because a disk was unplugged or a permission is missing.
"""

import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tli_jax.errors import StorageError

# Error numbers of a file that is missing, or replaced by something else. All others come from the system.
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
# Status codes of TensorStore, XLA and Google Cloud Storage that say nothing about the content of a file.
_STATUS = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

_T = TypeVar("_T")


class DamagedError(Exception):
    """A checkpoint cannot be restored; the message says why."""


def together(what: str, action: Callable[[], _T]) -> _T:
    """The result of ``action``, if it succeeds in every process; otherwise the same error in every process.

    Raises:
        DamagedError: what was read is damaged or missing.
        StorageError: the system refused to read, or is out of memory.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # a damaged file shows as whatever its reader stumbles over
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
        raise DamagedError(f"{what}: {line(failure) if failure else f'process {codes.index(1)} cannot read it'}") from (
            failure
        )
    return result  # pyright: ignore[reportReturnType]


def system_error(error: BaseException) -> str | None:
    """Why the system refused, if that caused the error; None if the error says something about the content."""
    for one in _causes(error):
        text = str(one)
        code = one.errno if isinstance(one, OSError) else None
        if code is None and (found := _OS_ERROR.search(text)):
            code = int(found[1])
        if code is not None and code not in _MISSING:
            return os.strerror(code)
        if isinstance(one, MemoryError):
            return "out of memory"
        if code is None and (found := _STATUS.search(text)):
            return f"{found[1]}: {_short(text)}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    inner = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for one in [*inner, *([before] if before else [])]:
        yield from _causes(one)


def line(error: BaseException) -> str:
    """An exception in one line."""
    if code := _OS_ERROR.search(str(error)):  # at the end of pages from TensorStore
        return os.strerror(int(code[1]))
    text = _short(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def first(value: int) -> int:
    """The value that the first process has."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


@functools.cache
def hush_orbax() -> None:
    """Keep Orbax's tracebacks off stderr, where the user gets one line: what matters in them is raised too.

    On the first error it also closes its event loop under everything that is still reading or writing; each of those
    would then leave a traceback of its own, some of them much later.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: "orbax" not in record.pathname + record.getMessage())
    hook = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        code = getattr(problem.object, "cr_code", None)  # of a coroutine
        if "orbax" not in getattr(code, "co_filename", "") and str(problem.exc_value) != "Event loop is closed":
            hook(problem)

    sys.unraisablehook = unraisable
