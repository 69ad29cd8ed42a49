"""An output folder that is whole or not there: written in a folder beside it, synced, then renamed.

While an output is written there is a work folder ``.NAME.partial-HASH`` beside it, with the new output in it, and for
a moment what it replaces, under ``old``. Its name follows from that of the output, so that a lock on it decides who
writes; the hash tells it from a folder that somebody happens to call ``.NAME.partial-1``. The lock dies with its
process: a work folder that can be locked was abandoned, and is cleared away by the next try.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tli_jax.errors import OutputError, StorageError, TliError, UsageError

_SPARE = 16 * 2**20
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Refuse an output that would harm the base or somebody's files, before anything is read or written.

    Raises:
        UsageError: the output is the base's folder, or one of the two lies in the other.
        OutputError: something is there that must not, or cannot, be replaced; or another process is writing it.
    """
    with _refusing(output):
        new, base = _real(output), None if model is None else _real(model)
        if base is not None and (new == base or base in new.parents or new in base.parents):
            raise UsageError(
                f"output {output} and model {model} must not be the same or lie in each other: choose another output"
            )
        if new.is_symlink():
            raise OutputError(f"{output}: is a loop of symbolic links: choose another output")
        if new.exists() and not new.is_dir():
            raise OutputError(f"{output}: is a file: choose another output")
        if new.is_mount():
            raise OutputError(f"{output}: is a mount point, which cannot be replaced: choose a folder in it")
        if _work_folder(new).exists():
            with _claimed(new):
                pass  # what was abandoned has been cleared away
        if _is_filled(new):
            _check_overwrite(new, overwrite)


def _check_overwrite(output: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{output}: exists and is not empty: choose another output, or add --overwrite")
    if not (output / "config.json").is_file():
        raise OutputError(
            f"{output}: is not a model folder (no config.json), so it is not overwritten: remove it yourself"
        )
    for folder, _, _ in os.walk(output):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise OutputError(
                f"{output}: cannot be replaced, no permission to write to {folder}: choose another output"
            )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises where links go in circles


@contextlib.contextmanager
def _refusing(output: Path) -> Iterator[None]:
    try:
        yield
    except TliError:
        raise
    except (OSError, ValueError) as error:  # a ValueError where the name has a NUL
        why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        raise OutputError(f"{output}: cannot be created ({why}): choose another output") from error


@contextlib.contextmanager
def staged(output: Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place, complete and synced, when the block ends well.

    If the block fails, nothing is left of it; what was killed is cleared away by the next try.

    Args:
        nbytes: how much is going to be written, checked against the free space first.
        overwrite: whether an output that is there by then is replaced.

    Raises:
        OutputError: there is no room, or no permission; or another process writes, or has written, this output.
        StorageError: the disk filled up or failed on the way.
    """
    with contextlib.ExitStack() as stack:
        with _refusing(output):
            output = _real(output)
            output.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(_claimed(output))
            if _is_filled(output):
                _check_overwrite(output, overwrite)
            free = shutil.disk_usage(output.parent).free
            if free < nbytes + _SPARE:
                raise OutputError(
                    f"{output}: {nbytes + _SPARE:,} bytes are needed, {free:,} are free: make room or go elsewhere"
                )
            folder = Path(tempfile.mkdtemp(prefix="new-", dir=work))
        try:
            yield folder
            folder.chmod(0o777 & ~_umask())
            _sync(folder)
            _replace(output, folder, work, overwrite)
            _fsync(output.parent)
        except OSError as error:
            if error.errno not in _DISK_TROUBLE:
                raise
            raise StorageError(
                f"{output}: writing failed ({error.strerror}), nothing half-written is left: make room"
            ) from error


def _replace(output: Path, folder: Path, work: Path, overwrite: bool) -> None:
    """Put the folder in the place of the output, which is set aside first, and removed only after."""
    try:
        if overwrite and _is_filled(output):
            output.rename(work / "old")
        folder.rename(output)  # fails where there is something by now
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputError(f"{output}: was created by another process meanwhile: choose another output") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise OutputError(f"{output}: cannot be replaced ({error.strerror}): choose another output") from error
        raise


def _work_folder(output: Path) -> Path:
    name = os.fsencode(output.name)
    digest = hashlib.sha256(b"tli_jax output " + name).hexdigest()[:16]
    return output.with_name(f".{os.fsdecode(name[:200])}.partial-{digest}")


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[Path]:
    """The work folder of an output, locked. What another process abandoned is undone or finished first.

    Raises:
        OutputError: another process has it.
    """
    work = _work_folder(output)
    descriptor = _lock(work, output)
    try:
        _recover(output, work)
        yield work
    finally:
        try:
            # If not all can be removed, what is left does not stand in the way of the next try.
            _recover(output, work)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(work: Path, output: Path) -> int:
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                work.mkdir(mode=0o700)
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            if not work.parent.is_dir():
                raise
            continue  # removed by whoever had it
        except BaseException:
            with contextlib.suppress(OSError):
                work.rmdir()  # fails where somebody has begun to use it
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), work.lstat()):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EAGAIN:
                raise OutputError(f"{output}: another process is writing it: wait for it, or choose another") from None
            raise
        os.close(descriptor)


def _recover(output: Path, work: Path) -> None:
    """Finish a replacement, or undo one that was stopped between its two renames; and clear the work folder."""
    old = work / "old"
    if old.exists() and not _is_filled(output):
        old.rename(output)
    for path in list(work.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
    if old.exists():  # it cannot be removed: make way
        old.rename(tempfile.mkdtemp(prefix="left-", dir=work))


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


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
