"""An output folder that is whole or not there: written under a temporary name beside it, synced, then renamed."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tli_jax.errors import OutputError, StorageError, UsageError

_SPARE = 16 * 2**20
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def check_output(output: Path, model: Path, overwrite: bool) -> None:
    """Refuse an output that would harm the base or somebody's files, before anything is read or written.

    Raises:
        UsageError: the output is the base's folder, or one of the two lies in the other.
        OutputError: something is there that must not be replaced.
    """
    new, base = output.resolve(), model.resolve()
    if new == base or base in new.parents or new in base.parents:
        raise UsageError(
            f"output {output} and model {model} must not be the same or lie in each other: choose another output"
        )
    if new.exists() and not new.is_dir():
        raise OutputError(f"{output}: is a file: choose another output")
    if new.is_dir() and any(new.iterdir()):
        if not overwrite:
            raise OutputError(f"{output}: exists and is not empty: choose another output, or add --overwrite")
        if not (new / "config.json").is_file():
            raise OutputError(
                f"{output}: is not a model folder (no config.json), so it is not overwritten: remove it yourself"
            )


@contextlib.contextmanager
def staged(output: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place, complete and synced, when the block ends well.

    If the block fails, nothing is left of it; what was killed is cleared away by the next try. The lock on the
    folder dies with its process, so a folder that can be locked belongs to nobody.

    Args:
        nbytes: how much is going to be written, checked against the free space first.

    Raises:
        OutputError: there is no room, or no permission.
        StorageError: the disk filled up or failed on the way.
    """
    output = output.resolve()
    prefix = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _recover(output)
        _clear_abandoned(output.parent, prefix)
        free = shutil.disk_usage(output.parent).free
        if free < nbytes + _SPARE:
            raise OutputError(
                f"{output}: {nbytes + _SPARE:,} bytes are needed, {free:,} are free: make room or go elsewhere"
            )
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be created ({error.strerror}): choose another output") from error
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _sync(folder)
        _replace(folder, output)
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        raise StorageError(
            f"{output}: writing failed ({error.strerror}), nothing was changed there: make room"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _replace(folder: Path, output: Path) -> None:
    """Rename into place. The old output is set aside first, and removed only after the new one is there."""
    previous = _previous(output)
    if output.is_dir() and any(output.iterdir()):
        output.rename(previous)
    folder.rename(output)
    _fsync(output.parent)
    if previous.exists():
        shutil.rmtree(previous)


def _previous(output: Path) -> Path:
    return output.with_name(f".{output.name}.previous")


def _recover(output: Path) -> None:
    """Finish or undo a replacement that was killed between its two renames."""
    previous = _previous(output)
    if previous.exists():
        if output.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(output)


def _clear_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        os.close(descriptor)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
