"""Checkpoints of a training run, written in the background by Orbax and verified by our own digests when read.

::

    RUN/checkpoints/frozen/          the frozen parameters, written once per run
    RUN/checkpoints/STEP/state/      the arrays of a step, by Orbax
    RUN/checkpoints/STEP/meta/       a JSON document, see ``checkpoint_reader.make_document``
    RUN/checkpoints/STEP.damaged     a damaged step; deleted once a later one is complete
    RUN/checkpoints/STEP.foreign     a step of another run; never deleted

Orbax makes a folder visible only when it is complete. With several processes, all of them call every method at the same
point, except ``check``.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tli_jax.errors import DataError
from tli_jax.training.checkpoint_folder import CheckpointFolder
from tli_jax.training.checkpoint_reader import (
    META_FILE,
    CheckpointReader,
    array_handler,
    check_shapes,
    first_changed,
    flatten,
    make_document,
)
from tli_jax.training.failures import DamagedError, ForeignError, broadcast, silence_orbax

_FROZEN = "frozen"


class Checkpoints:
    """The checkpoints of a run, in a folder that the caller has locked.

    All methods raise ``StorageError`` if the system refuses to read or write. Those that read raise ``DataError`` for
    damaged checkpoints, and ``UsageError`` for those of another run.
    """

    def __init__(
        self, folder: epath.Path | Path, keep: int, run: Mapping[str, str] | None = None, *, read_only: bool = False
    ) -> None:
        """Open or create the folder, and delete what a killed process has left behind.

        Args:
            folder: a local folder or ``gs://…``.
            keep: number of steps to keep. There is one more while the next one is written.
            run: the run's ``id``, and digests of what it was started with. Every checkpoint carries them and is only
                restored if they are the same.
            read_only: change nothing in the folder; another process may be writing to it.

        Raises:
            OutputError: the folder cannot be created.
        """
        silence_orbax()
        self._folder = CheckpointFolder(folder, read_only)
        self._keep = keep
        self._run = dict(run or {})
        self._read_only = read_only
        self._saving = False
        self._reader = CheckpointReader(self._run, self._folder.is_remote)
        # Not ocp.CheckpointManager: it reports the error of a failed save only at the next save.
        # Create directories synchronously: if a background thread fails to, the writers wait minutes for its signal
        # and keep the process alive.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            state=array_handler(),
            meta=ocp.JsonCheckpointHandler(META_FILE),
        )
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

    def save_frozen(self, frozen: Any) -> None:
        """Write the frozen parameters and wait for it. If they exist, only compare them.

        Raises:
            DataError: the existing ones are different.
        """
        flat = flatten(frozen)
        if not flat:
            return
        self.finish()
        path = self._folder / _FROZEN
        if not broadcast(self._folder.is_folder(path)):
            self._write(path, flat, {})
            self.finish()
            return
        with _user_errors(path):
            recorded = self._reader.read(path)["arrays"]
        check_shapes(path, recorded, flat)
        if changed := first_changed(recorded, flat):
            raise DataError(f"{path}: {changed} differs from the start of this run: use another run directory")

    def restore_frozen(self, abstract: Any) -> Any | None:
        """Return the frozen parameters, or None if none were saved.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct``. Its shardings may differ from the saved ones.

        Raises:
            DataError: they do not match ``abstract``. The message names a tensor.
        """
        if not flatten(abstract):
            return abstract
        self.finish()
        path = self._folder / _FROZEN
        if not broadcast(self._folder.is_folder(path)):
            return None
        with _user_errors(path):
            return self._reader.restore(path, abstract)[0]

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Start to write a step. The arrays may be donated as soon as this returns.

        First waits for the previous step, and deletes the steps that are no longer kept.

        Args:
            state: a pytree of ``jax.Array`` on one mesh, which spans all processes.
            meta: a JSON object, such as the position in the data.

        Returns:
            False if this step already exists. It is left unchanged.
        """
        self.finish()
        if broadcast(step in self.steps()):
            return False
        self._write(self._folder / str(step), flatten(state), meta)
        return True

    def check(self) -> None:
        """Raise ``StorageError`` if the save in the background has failed. Cheap enough for every step."""
        with self._folder.storage_errors():
            self._writer.check_for_errors()

    def finish(self) -> None:
        """Wait for the save in the background."""
        with self._folder.storage_errors():
            self._writer.wait_until_finished()
            if self._saving:
                self._saving = False
                self._folder.delete_old(self._keep)

    def steps(self) -> list[int]:
        """Return the complete steps, sorted."""
        return self._folder.steps()

    def restore_newest(self, abstract: Any, report: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]] | None:
        """Return the newest intact step of this run, as (step, state, metadata), or None if there are no steps.

        Newer steps are set aside, but only once an older one is restored. If none can be, the user decides.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct``. Its shardings may differ from the saved ones.
            report: called with one line for each step that is set aside.

        Raises:
            DataError: no step is intact, or an intact one does not have the paths, shapes and dtypes of ``abstract``.
            UsageError: all steps belong to another run, or this run's digests have changed since.
        """
        self.finish()
        suffixes: dict[int, str] = {}
        refusal = None
        for step in self._folder.newest_first():
            path = self._folder / str(step)
            try:
                state, meta = self._reader.restore(path, abstract)
            except (DamagedError, ForeignError) as error:
                refusal = error.kind(
                    f"{path}: {error}; no other step {error.lack}: restore {self._folder} from a copy, or use another"
                    " run directory"
                )
                suffixes[step] = error.suffix
                report(f"{path}: {error}: set aside, resuming from the previous checkpoint")
            else:
                self._folder.set_aside(suffixes)
                return step, state, meta
            gc.collect()  # else the arrays of this attempt might fill the device during the next one
        if refusal is not None:
            raise refusal
        return None

    def close(self) -> None:
        """Wait for the save in the background, and delete what failed saves have left behind.

        If another process has died, exit with ``os._exit`` instead: this would wait for it.
        """
        try:
            self.finish()
        finally:
            self._writer.close()
            self._folder.delete_leftovers()

    def _write(self, path: epath.Path, flat: dict[str, jax.Array], meta: Mapping[str, Any]) -> None:
        if self._read_only:
            raise ValueError(f"{self._folder} is opened as read-only")
        document = make_document(path.name, self._run, meta, flat)
        stored = {name: array for name, array in flat.items() if array.size}  # Orbax refuses arrays of size zero
        with self._folder.storage_errors(only=OSError):
            self._saving = path.name != _FROZEN
            self._writer.save(
                path, args=ocp.args.Composite(state=ocp.args.PyTreeSave(stored), meta=ocp.args.JsonSave(document))
            )


@contextlib.contextmanager
def _user_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except (DamagedError, ForeignError) as error:
        raise error.kind(f"{path}: {error}: restore it from a copy, or use another run directory") from error
