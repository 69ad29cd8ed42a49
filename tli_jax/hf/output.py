"""Output folders that are complete or not there: written to a temporary folder, synced, then renamed.

While ``NAME`` is written, a work folder ``.NAME.partial-HASH`` exists beside it. It contains the new output and, for a
moment, the one that is replaced (``old``). Its name depends only on the output's, so a lock on it decides who writes.
The hash distinguishes it from a folder that a user happens to call ``.NAME.partial-1``. The lock ends with its process:
a work folder that can be locked was abandoned, and the next run removes it.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tli_jax.errors import OutputError, StorageError, TliError, UsageError
from tli_jax.hf.files import flock, fsync

_SPARE = 16 * 2**20  # bytes that must stay free
# A file of every output that may be replaced, and what such a folder is.
_KINDS = {"config.json": "model folder", "00000.ids": "folder of prepared data"}
# What to do about a failed write, unless the disk itself fails.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write smaller files with --max-shard-size",
}
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def check_output(output: Path, source: Path | None, overwrite: bool, marker: str = "config.json") -> None:
    """Check that writing an output would not harm its source or other files. Cleans up after an interrupted run.

    Args:
        source: the base model or the text.
        marker: a file that an output must contain to be replaced, see ``_KINDS``.

    Raises:
        UsageError: the output is the source, or one of the two contains the other.
        OutputError: the output exists and must not, or cannot, be replaced; or another process is writing it.
    """
    with _output_errors(output):
        new, base = _real(output), None if source is None else _real(source)
        if base is not None and (new == base or base in new.parents or new in base.parents):
            raise UsageError(
                f"output {output} and {source} must not be the same folder, and neither may contain the other:"
                " choose another output"
            )
        if new.is_symlink():
            raise OutputError(f"{output}: is a loop of symbolic links: choose another output")
        if new.exists() and not new.is_dir():
            raise OutputError(f"{output}: is a file: choose another output")
        if new.is_mount():
            raise OutputError(f"{output}: is a mount point, which cannot be replaced: choose a folder in it")
        if _work_folder(new).exists():
            with _claimed(new):
                pass  # removes an abandoned work folder
        if _is_filled(new):
            _check_overwrite(new, overwrite, marker)


@contextlib.contextmanager
def staged(output: Path, nbytes: int, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """Yield a temporary folder that replaces ``output``, complete and synced, when the block succeeds.

    If the block fails, the temporary folder is deleted; if the process is killed, the next run deletes it.

    Args:
        nbytes: bytes that will be written. The free space is checked first.
        overwrite: replace an existing output.
        marker: see ``check_output``.

    Raises:
        OutputError: too little space, no permission, or another process is writing or has written this output.
        StorageError: the disk filled up or failed meanwhile.
    """
    with contextlib.ExitStack() as stack:
        with _output_errors(output):
            output = _real(output)
            output.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(_claimed(output))
            if _is_filled(output):
                _check_overwrite(output, overwrite, marker)
            needed, free = nbytes + _SPARE, shutil.disk_usage(output.parent).free
            if free < needed:
                raise OutputError(
                    f"{output}: {needed:,} bytes are needed, {free:,} are free: free some, or choose another output"
                )
            folder = Path(tempfile.mkdtemp(prefix="new-", dir=work))
        try:
            yield folder
            folder.chmod(0o777 & ~_umask())
            for path in (*folder.rglob("*"), folder):
                fsync(path)
            _replace(output, folder, work, overwrite)
            fsync(output.parent)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise StorageError(
                f"{output}: writing failed ({error.strerror}), the unfinished output was deleted:"
                f" {_ADVICE.get(error.errno, 'check the disk')}"
            ) from error


def _check_overwrite(output: Path, overwrite: bool, marker: str) -> None:
    if not overwrite:
        raise OutputError(f"{output}: exists and is not empty: choose another output, or add --overwrite")
    if not (output / marker).is_file():
        raise OutputError(f"{output}: is not a {_KINDS[marker]} (no {marker}), so it is not replaced: delete it first")
    for folder, _, _ in os.walk(output):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise OutputError(f"{output}: cannot be replaced, {folder} is not writable: choose another output")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on circular links


@contextlib.contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except TliError:
        raise
    except (OSError, ValueError) as error:  # a ValueError if the name contains a NUL
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        raise OutputError(f"{output}: cannot be created ({reason}): choose another output") from error


def _replace(output: Path, folder: Path, work: Path, overwrite: bool) -> None:
    """Move the old output aside and the new one into its place."""
    try:
        if overwrite and _is_filled(output):
            output.rename(work / "old")
        folder.rename(output)  # fails if something was created there meanwhile
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
    """The locked work folder of an output. A replacement that another process abandoned is completed or undone first.

    Raises:
        OutputError: another process holds the lock.
    """
    work = _work_folder(output)
    descriptor = _lock(work, output)
    try:
        _recover(output, work)
        yield work
    finally:
        try:
            # A file that cannot be removed now does not block the next run.
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
            continue  # its owner removed it in between
        except BaseException:
            with contextlib.suppress(OSError):
                work.rmdir()  # fails if another process uses it
            raise
        try:
            flock(descriptor, blocking=False)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), work.lstat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{output}: another process is writing it: wait until it finishes, or choose another output"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _recover(output: Path, work: Path) -> None:
    """Complete or undo a replacement that was interrupted between its two renames, and empty the work folder."""
    old = work / "old"
    if old.exists() and not _is_filled(output):
        old.rename(output)
    for path in list(work.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
    if old.exists():  # it could not be deleted: free its name
        old.rename(tempfile.mkdtemp(prefix="left-", dir=work))


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
