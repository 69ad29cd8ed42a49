"""Checkpoints of a training run: written in the background by Orbax, proved by digests of our own when read.

::

    RUN/checkpoints/frozen/          the tensors that do not train, written once a run
    RUN/checkpoints/STEP/state/      the arrays of a step, by Orbax
    RUN/checkpoints/STEP/meta/       a JSON document: what the caller gave, and a digest of every array
    RUN/checkpoints/STEP.damaged     a step that was given up; removed when a later one is complete

Orbax makes a folder visible only when it is complete, but hands out flipped bits without a word, and zeros for some
files that are gone. On several processes every method but ``check`` is called by all of them at the same point.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tli_jax.checkpoint.digest import digests
from tli_jax.errors import DataError, OutputError, StorageError

_FROZEN, _META_FILE = "frozen", "meta.json"
_DAMAGED, _REMOVED = ".damaged", ".removed"

_T = TypeVar("_T")


class _DamagedError(Exception):
    """What was saved cannot be had back; the message says why."""


class Checkpoints:
    """The checkpoints of a run in a folder, which a lock of the caller keeps for this run alone."""

    def __init__(self, folder: epath.Path | Path, keep: int, *, read_only: bool = False) -> None:
        """Open or create the folder, and clear away what a killed run left half-written.

        Args:
            folder: local, or ``gs://…``.
            keep: how many steps are kept. One more is there while the next is being written.
            read_only: change nothing in the folder, which may be another run's that is being written to.

        Raises:
            OutputError: the folder cannot be created.
        """
        _hush_orbax()
        path = epath.Path(folder)
        self._folder = path if path.is_absolute() else path.resolve()  # a gs:// path would lose its scheme
        self._is_remote = "://" in str(self._folder)
        self._keep = keep
        self._read_only = read_only
        self._saving = False
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._clear()
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be used for checkpoints ({_line(error)}): choose another run"
            ) from error
        # Weights do not compress, and the processors have other work.
        self._arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        # Not ocp.CheckpointManager: it keeps the error of a failed save until the next save.
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=self._arrays, meta=ocp.JsonCheckpointHandler(_META_FILE))
        )

    def save_frozen(self, frozen: Any) -> None:
        """Write the tensors that do not train, and wait for it. If they are there, only compare.

        Raises:
            DataError: those that are there are others, or their metadata is damaged.
            StorageError: the disk is full, or failed.
        """
        flat = _flat(frozen)
        if not flat:
            return
        self.finish()
        path = self._folder / _FROZEN
        if not _first(path.exists()):
            self._write(path, flat, {})
            self.finish()
            return
        with _as_data_error(path):
            recorded = _read(path)["arrays"]
        _compare(path, recorded, flat)
        if changed := _changed(recorded, flat):
            raise DataError(f"{path}: {changed} is not what this run started with: use another run folder")

    def restore_frozen(self, abstract: Any) -> Any | None:
        """The tensors that do not train, or None where none were saved.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct`` with shardings, which may differ from the saved ones.

        Raises:
            DataError: damaged, or not those of ``abstract``; a tensor is named.
        """
        if not _flat(abstract):
            return abstract
        self.finish()
        path = self._folder / _FROZEN
        if not _first(path.exists()):
            return None
        with _as_data_error(path):
            return self._restore(path, abstract)[0]

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Begin to write a step; when this returns, the arrays may be donated.

        Waits for the step before, if it is still being written, and removes the steps that are no longer kept.

        Args:
            state: a pytree of ``jax.Array`` on one mesh; across processes none may be of one process alone.
            meta: JSON, such as the position in the data.

        Returns:
            False where this step is there already, which is left as it is.

        Raises:
            StorageError: the step before could not be written, or this one not be begun.
        """
        self.finish()
        if _first(step in self.steps()):
            return False
        self._write(self._folder / str(step), _flat(state), meta)
        return True

    def check(self) -> None:
        """Cheap, for every step of training: whether the save in the background has failed.

        Raises:
            StorageError: it has. What the folder showed before is as it was.
        """
        with self._as_storage_error():
            self._writer.check_for_errors()

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            StorageError: it could not be written.
        """
        with self._as_storage_error():
            self._writer.wait_until_finished()
            if self._saving:
                self._saving = False
                self._retain()

    def steps(self) -> list[int]:
        """The complete steps, in order.

        Raises:
            StorageError: the folder cannot be read.
        """
        with self._as_storage_error("reading"):
            if self._is_remote and not self._folder.exists():  # as long as nothing is in it
                return []
            return sorted(int(path.name) for path in self._folder.iterdir() if _is_step(path))

    def read_meta(self) -> dict[str, Any] | None:
        """The metadata of the newest step where it can be read, or None where there is no step. Reads no arrays.

        Raises:
            DataError: it can be read of no step.
        """
        why = None
        for step in self._newest_first():
            try:
                return _read(self._folder / str(step))["meta"]
            except _DamagedError as error:
                why = f"{self._folder / str(step)}: {error}"
        return self._none_is_good(why)

    def restore_newest(self, abstract: Any, report: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step that is whole, as (step, state, metadata), or None where there is no step.

        Those newer than it are set aside, once an older one is restored: a run that starts anew for want of a good
        step must be its user's decision.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct`` with shardings, which may differ from the saved ones.
            report: gets one line for each step that is given up.

        Raises:
            DataError: none is whole, or one that is whole does not have the paths, shapes and dtypes of ``abstract``.
        """
        self.finish()
        given_up: list[int] = []
        why = None
        for step in self._newest_first():
            try:
                state, meta = self._restore(self._folder / str(step), abstract)
            except _DamagedError as error:
                why = f"{self._folder / str(step)}: {error}"
            else:
                with self._as_storage_error():
                    self._set_aside(given_up)
                return step, state, meta
            report(f"{why}: going on from the step before")
            given_up.append(step)
            gc.collect()  # or else the arrays of this try may fill the device during the next
        return self._none_is_good(why)

    def close(self) -> None:
        """Wait for what is being written, and remove what failed saves left.

        After the death of another process leave with ``os._exit`` instead: this would wait for it.

        Raises:
            StorageError: what was being written could not be.
        """
        try:
            self.finish()
        finally:
            self._writer.close()
            with self._as_storage_error():
                self._clear()

    def _write(self, path: epath.Path, flat: dict[str, jax.Array], meta: Mapping[str, Any]) -> None:
        arrays = {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "digest": digest}
            for (name, array), digest in zip(flat.items(), digests(list(flat.values())), strict=True)
        }
        if self._read_only:
            raise ValueError(f"{self._folder} was opened to be read only")
        content = {"meta": dict(meta), "arrays": arrays}
        document = {"sha256": _sha256(content), "content": content}
        stored = {name: array for name, array in flat.items() if array.size}  # Orbax refuses arrays of size zero
        with self._as_storage_error(only=OSError):
            self._saving = path.name != _FROZEN
            self._writer.save(
                path, args=ocp.args.Composite(state=ocp.args.PyTreeSave(stored), meta=ocp.args.JsonSave(document))
            )

    def _restore(self, path: epath.Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _flat(abstract).items()
        }
        content = _read(path)
        _compare(path, content["arrays"], wanted)
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        arguments = ocp.args.PyTreeRestore(stored, ocp.checkpoint_utils.construct_restore_args(stored))
        # By the handler, not the checkpointer, which has a barrier behind it: a process that fails would not come.
        restored = _together("state", lambda: self._arrays.restore(path / "state", args=arguments))
        flat = {name: restored[name] if leaf.size else _empty(leaf) for name, leaf in wanted.items()}
        if changed := _changed(content["arrays"], flat):
            raise _DamagedError(f"{changed} is not what was saved")
        return jax.tree.unflatten(jax.tree.structure(abstract), flat.values()), content["meta"]

    def _newest_first(self) -> Iterator[int]:
        """As the first process sees them, since the others may see a network folder later."""
        steps = self.steps()
        while (step := _first(max(steps, default=-1))) >= 0:
            yield step
            steps = [other for other in steps if other < step]

    def _none_is_good(self, why: str | None) -> None:
        if why is not None:
            raise DataError(
                f"{why}; no other step is whole: restore {self._folder} from a copy, or use another run folder"
            )

    def _retain(self) -> None:
        if jax.process_index() == 0:
            steps = self.steps()
            for path in [self._folder / str(step) for step in steps[: -self._keep]]:
                # Its name or its mark goes first, so that a kill in between leaves no half of a step that looks whole.
                # In object storage a rename would copy all of it.
                if self._is_remote:
                    (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).unlink()
                else:
                    path = path.rename(path.with_name(path.name + _REMOVED))
                path.rmtree()
            for path in list(self._folder.glob(f"*{_DAMAGED}")):
                name = path.name.removesuffix(_DAMAGED)
                if name.isdecimal() and int(name) <= max(steps, default=-1):
                    path.rmtree()

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0 and not self._read_only:
            for path in [self._folder / str(step) for step in steps]:
                aside = path.with_name(path.name + _DAMAGED)
                if aside.exists():
                    aside.rmtree()
                path.rename(aside)

    def _clear(self) -> None:
        if jax.process_index() == 0 and not self._read_only:
            for temporary in ocp.path.step.all_temporary_paths(self._folder):
                temporary.get().rmtree()
            for path in list(self._folder.glob(f"*{_REMOVED}")):
                path.rmtree()

    @contextlib.contextmanager
    def _as_storage_error(self, doing: str = "writing", only: type[Exception] = Exception) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except only as error:
            raise StorageError(
                f"{self._folder}: {doing} a checkpoint failed ({_line(error)}): make room if the disk is full; "
                "run again to go on from the last complete step"
            ) from error


def _changed(recorded: dict[str, Any], flat: dict[str, jax.Array]) -> str:
    """The first array that has another digest than recorded, and how many more; empty where there is none."""
    now = zip(flat, digests(list(flat.values())), strict=True)
    return _first_of([name for name, digest in now if digest != recorded[name]["digest"]])


def _compare(path: epath.Path, recorded: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    there = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in recorded.items()}
    needed = {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in wanted.items()}
    differing = [name for name in needed | there if needed.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise DataError(
            f"{path}: {_first_of(differing)} is {there.get(name, 'absent')} in the checkpoint and "
            f"{needed.get(name, 'absent')} in this run: use another run folder, or the configuration of that run"
        )


def _first_of(names: list[str]) -> str:
    more = f" (with {len(names) - 1} more)" if len(names) > 1 else ""
    return names[0] + more if names else ""


def _flat(tree: Any) -> dict[str, Any]:
    """By path: so Orbax never sees our containers, and an empty one or another class of tuple makes no difference."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the state have one path: no key may contain a dot that makes it another's path")
    return flat


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )


def _read(path: epath.Path) -> dict[str, Any]:
    file = f"meta/{_META_FILE}"

    def read() -> dict[str, Any]:
        document = json.loads((path / file).read_bytes())
        if _sha256(document["content"]) != document["sha256"]:
            raise ValueError("not what was saved")
        return document["content"]

    return _together(file, read)


def _sha256(content: Any) -> str:
    # Once through JSON, where keys become text and tuples lists.
    again = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(again, sort_keys=True).encode()).hexdigest()


def _is_step(path: epath.Path) -> bool:
    return path.name.isdecimal() and path.is_dir() and ocp.path.step.is_path_finalized(path)


def _together(what: str, action: Callable[[], _T]) -> _T:
    """What the action gives, if it succeeds in every process; or else _DamagedError in every process."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # a damaged file shows as whatever its reader stumbles over
        failure = error
    bad = [failure is not None]
    if jax.process_count() > 1:
        bad = multihost_utils.process_allgather(np.array(bad)).ravel().tolist()
    if any(bad):
        why = _line(failure) if failure else f"cannot be read by process {bad.index(True)}"
        raise _DamagedError(f"{what}: {why}") from failure
    return result  # pyright: ignore[reportReturnType]


def _first(value: int) -> int:
    """The value that the first process has."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


@contextlib.contextmanager
def _as_data_error(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except _DamagedError as error:
        raise DataError(f"{path}: {error}: restore it from a copy, or use another run folder") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):  # behind pages of TensorStore's
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@functools.cache
def _hush_orbax() -> None:
    """Keep the tracebacks of Orbax off stderr, where a user gets one line: what matters in them is raised too.

    On the first error it also closes its event loop under all that is still reading or writing, each of which would
    then leave a traceback of its own, some of them much later.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: "orbax" not in record.pathname + record.getMessage())
    hook = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        code = getattr(problem.object, "cr_code", None)  # of a coroutine
        if "orbax" not in getattr(code, "co_filename", "") and str(problem.exc_value) != "Event loop is closed":
            hook(problem)

    sys.unraisablehook = unraisable
