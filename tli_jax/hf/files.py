"""Replace files atomically, lock files and folders, and report what the system refuses in one line."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tli_jax.errors import StorageError


@contextlib.contextmanager
def replace_file(file: Path, suffix: str = "partial") -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``file`` when the block succeeds.

    Readers see the old content or the new, never a part of it, and the new content is on disk before it is visible.
    If the block fails, ``file`` is untouched and the temporary file is deleted.

    Args:
        suffix: the temporary file is ``.NAME.SUFFIX`` in the same folder. A killed process leaves it behind; the next
            call with the same suffix overwrites it.

    Example::

        with replace_file(folder / "run.json") as temporary:
            temporary.write_text("{}")
    """
    temporary = file.with_name(f".{file.name}.{suffix}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def lock(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a folder or on a file, which is created if it does not exist.

    The system releases the lock when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds the lock and ``blocking`` is false.
    """
    # Read and write: opening a FIFO for writing only would wait for a reader.
    flags = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        flock(descriptor, blocking=blocking)
        yield
    finally:
        os.close(descriptor)


def flock(descriptor: int, *, blocking: bool = True) -> None:
    """Lock an open file or folder until its descriptor is closed; see ``lock``."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The folder for what can be made again: ``tli_jax`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tli_jax"


def sha256_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` raised in the block into a ``StorageError`` that names its file, or else ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}): free space or fix permissions,"
            " then run the same command again"
        ) from error
