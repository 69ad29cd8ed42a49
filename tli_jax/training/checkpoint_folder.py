"""The folder of a run's checkpoints: which steps are complete, which are kept, and which are set aside."""

import contextlib
import itertools
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from tli_jax.errors import OutputError, StorageError
from tli_jax.training.failures import DamagedError, broadcast, one_line

_REMOVED = ".removed"
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")


class CheckpointFolder:
    """A local folder or ``gs://…``, with a sub-folder for each step."""

    def __init__(self, folder: epath.Path | Path, read_only: bool) -> None:
        """Open or create the folder, and delete what a killed process has left behind."""
        path = epath.Path(folder)
        self.path = path if path.is_absolute() else path.resolve()  # resolve() would drop the scheme of gs://
        self.is_remote = "://" in str(self.path)
        self._read_only = read_only
        try:
            if not read_only:
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be used for checkpoints ({one_line(error)}): choose another run directory"
            ) from error
        self.delete_leftovers("reading")

    def __truediv__(self, name: str) -> epath.Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def steps(self) -> list[int]:
        """Return the complete steps, sorted."""
        with self.storage_errors("reading"):
            if self.is_remote and not self.path.exists():  # an empty folder does not exist there
                return []
            return sorted(int(path.name) for path in self.path.iterdir() if self._is_step(path))

    def newest_first(self) -> Iterator[int]:
        """Yield the steps that process 0 sees. On a network file system the others may see them later."""
        steps = self.steps()
        while (step := broadcast(max(steps, default=-1))) >= 0:
            yield step
            steps = [other for other in steps if other < step]

    def _is_step(self, path: epath.Path) -> bool:
        return bool(_STEP.fullmatch(path.name)) and self.is_folder(path) and ocp.path.step.is_path_finalized(path)

    def is_folder(self, path: epath.Path) -> bool:
        """Unlike ``Path.is_dir``, raise if a permission is missing."""
        if self.is_remote:
            return path.is_dir()
        try:
            return stat.S_ISDIR(Path(path).stat().st_mode)
        except FileNotFoundError:
            return False

    def delete_old(self, keep: int) -> None:
        """Delete all but the newest steps, and damaged steps that a later one replaces."""
        if jax.process_index() == 0:
            steps = self.steps()
            for path in [self.path / str(step) for step in steps[:-keep]]:
                # First make the step invisible, so that a kill never leaves half of a step that looks complete.
                # In object storage a rename would copy it.
                if self.is_remote:
                    (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).unlink()
                else:
                    path = path.rename(path.with_name(path.name + _REMOVED))
                path.rmtree()
            for path in list(self.path.glob(f"*{DamagedError.suffix}")):
                name = path.name.removesuffix(DamagedError.suffix)
                if _STEP.fullmatch(name) and int(name) <= max(steps, default=-1):
                    path.rmtree()

    def set_aside(self, suffixes: Mapping[int, str]) -> None:
        """Rename steps: append a suffix to each name."""
        if jax.process_index() != 0 or self._read_only:
            return
        with self.storage_errors():
            for step, suffix in suffixes.items():
                path = self.path / str(step)
                aside = path.with_name(path.name + suffix)
                if suffix == DamagedError.suffix and aside.exists():
                    aside.rmtree()
                elif aside.exists():  # not ours to delete
                    names = (path.with_name(f"{path.name}{suffix}-{number}") for number in itertools.count(2))
                    aside = next(name for name in names if not name.exists())
                path.rename(aside)

    def delete_leftovers(self, doing: str = "writing") -> None:
        """Delete steps that were never completed, or not completely deleted."""
        if jax.process_index() == 0 and not self._read_only:
            with self.storage_errors(doing):
                for temporary in ocp.path.step.all_temporary_paths(self.path):
                    temporary.get().rmtree()
                for path in list(self.path.glob(f"*{_REMOVED}")):
                    path.rmtree()

    @contextlib.contextmanager
    def storage_errors(self, doing: str = "writing", only: type[Exception] = Exception) -> Iterator[None]:
        """Turn exceptions in the block into a one-line ``StorageError``."""
        try:
            yield
        except StorageError:
            raise
        except only as error:
            raise StorageError(
                f"{self.path}: {doing} a checkpoint failed ({one_line(error)}): free space or fix permissions, then"
                " run the same command again to resume from the last complete step"
            ) from error
