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


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Refuse an output that would harm the base or somebody's files, before anything is read or written.

    Raises:
        UsageError: the output is the base's folder, or one of the two lies in the other.
        OutputError: something is there that must not be replaced.
    """
    new, base = output.resolve(), None if model is None else model.resolve()
    if base is not None and (new == base or base in new.parents or new in base.parents):
        raise UsageError(
            f"output {output} and model {model} must not be the same or lie in each other: choose another output"
        )
    with _refusing(output):
        if new.exists() and not new.is_dir():
            raise OutputError(f"{output}: is a file: choose another output")
        if new.is_mount():
            raise OutputError(f"{output}: is a mount point, which cannot be replaced: choose a folder in it")
        _recover(new)
        if _is_filled(new):
            if not overwrite:
                raise OutputError(f"{output}: exists and is not empty: choose another output, or add --overwrite")
            if not (new / "config.json").is_file():
                raise OutputError(
                    f"{output}: is not a model folder (no config.json), so it is not overwritten: remove it yourself"
                )


@contextlib.contextmanager
def _refusing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise OutputError(f"{output}: cannot be created ({why}): choose another output") from error


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
    with _refusing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _recover(output)
        _clear_abandoned(output.parent, prefix)
        free = shutil.disk_usage(output.parent).free
        if free < nbytes + _SPARE:
            raise OutputError(
                f"{output}: {nbytes + _SPARE:,} bytes are needed, {free:,} are free: make room or go elsewhere"
            )
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    try:
        with _locked(folder):
            yield folder
            folder.chmod(0o777 & ~_umask())
            _sync(folder)
            # The old output is set aside first, and removed only after the new one is there.
            if _is_filled(output):
                output.rename(_previous(output))
            folder.rename(output)
            _fsync(output.parent)
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        raise StorageError(
            f"{output}: writing failed ({error.strerror}), nothing half-written is left: make room"
        ) from error
    finally:
        _recover(output)
        shutil.rmtree(folder, ignore_errors=True)


def _previous(output: Path) -> Path:
    return output.with_name(f".{output.name}.previous")


def _recover(output: Path) -> None:
    """Finish a replacement, or undo one that was stopped between its two renames."""
    previous = _previous(output)
    if previous.exists():
        if _is_filled(output):
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(output)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _clear_abandoned(parent: Path, prefix: str) -> None:
    for folder in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with contextlib.suppress(OSError), _locked(folder):  # or else it is in use by another process
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
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
