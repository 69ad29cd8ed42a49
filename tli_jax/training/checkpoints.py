"""Checkpoints of a training run: written in the background by Orbax, proved by digests of our own when read.

::

    RUN/checkpoints/frozen/          the tensors that do not train, written once a run
    RUN/checkpoints/STEP/state/      the arrays of a step, by Orbax
    RUN/checkpoints/STEP/meta/       a JSON document: the run it belongs to, the caller's metadata, a digest per array
    RUN/checkpoints/STEP.damaged     a step that was given up; removed when a later one is complete
    RUN/checkpoints/STEP.foreign     a step of another run that was found here; never removed

Orbax makes a folder visible only when it is complete, but hands out flipped bits without a word, and zeros for some
files that are gone. With several processes all of them call every method but ``check`` at the same point.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tli_jax.errors import DataError, OutputError, StorageError, TliError, UsageError
from tli_jax.training.digest import digests
from tli_jax.training.failures import DamagedError, first, hush_orbax, line, system_error, together

_FROZEN, _META_FILE = "frozen", "meta.json"
_DAMAGED, _FOREIGN, _REMOVED = ".damaged", ".foreign", ".removed"
_STEP = re.compile(r"0|[1-9][0-9]{0,8}")


class _ForeignError(Exception):
    """A checkpoint belongs to another run; the message says to which."""


class Checkpoints:
    """The checkpoints of a run in a folder, which the caller has locked."""

    def __init__(
        self, folder: epath.Path | Path, keep: int, run: Mapping[str, str] | None = None, *, read_only: bool = False
    ) -> None:
        """Open or create the folder, and clear away what a killed run left half-written.

        Args:
            folder: local, or ``gs://…``.
            keep: how many steps are kept. There is one more while the next is being written.
            run: the run's ``id``, and digests of whatever makes it this run. Every checkpoint carries them, and one
                that carries others is not restored.
            read_only: change nothing in the folder; another process may be writing to it.

        Raises:
            OutputError: the folder cannot be created.
            StorageError: it cannot be read.
        """
        hush_orbax()
        path = epath.Path(folder)
        self._folder = path if path.is_absolute() else path.resolve()  # a gs:// path would lose its scheme
        self._is_remote = "://" in str(self._folder)
        self._keep = keep
        self._run = dict(run or {})
        self._read_only = read_only
        self._saving = False
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be used for checkpoints ({line(error)}): choose another run folder"
            ) from error
        with self._as_storage_error("reading"):
            self._clear()
        # Weights do not compress, and the processors have other work.
        self._arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        # Not ocp.CheckpointManager: it keeps the error of a failed save until the next save.
        # Its folders are made at once: if a background thread fails to, the threads that are to write into them wait
        # for its signal until they time out, minutes later, and keep the process alive.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            state=self._arrays,
            meta=ocp.JsonCheckpointHandler(_META_FILE),
        )
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

    def save_frozen(self, frozen: Any) -> None:
        """Write the tensors that do not train, and wait for it. If they exist, only compare.

        Raises:
            DataError: the existing ones differ, or their metadata is damaged.
            UsageError: the existing ones belong to another run.
            StorageError: the system refused to write or read.
        """
        flat = _flat(frozen)
        if not flat:
            return
        self.finish()
        path = self._folder / _FROZEN
        if not first(self._is_folder(path)):
            self._write(path, flat, {})
            self.finish()
            return
        with _as_refusal(path):
            recorded = self._read(path)["arrays"]
        _compare(path, recorded, flat)
        if changed := _changed(recorded, flat):
            raise DataError(f"{path}: {changed} is not what this run started with: use another run folder")

    def restore_frozen(self, abstract: Any) -> Any | None:
        """The tensors that do not train, or None where none were saved.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct`` with shardings, which may differ from the saved ones.

        Raises:
            DataError: damaged, or not those of ``abstract``; a tensor is named.
            UsageError: they belong to another run.
            StorageError: the system refused to read.
        """
        if not _flat(abstract):
            return abstract
        self.finish()
        path = self._folder / _FROZEN
        if not first(self._is_folder(path)):
            return None
        with _as_refusal(path):
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
        if first(step in self.steps()):
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
            return sorted(int(path.name) for path in self._folder.iterdir() if self._is_step(path))

    def read_meta(self) -> dict[str, Any] | None:
        """The metadata of the newest step whose metadata is whole, or None if there is no step. Reads no arrays.

        Raises:
            DataError, UsageError, StorageError: see ``restore_newest``.
        """
        refusal = None
        for step in self._newest_first():
            path = self._folder / str(step)
            try:
                return self._read(path)["meta"]
            except (DamagedError, _ForeignError) as error:
                refusal = self._refusal(path, error)
        if refusal is not None:
            raise refusal
        return None

    def restore_newest(self, abstract: Any, report: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step that is whole and belongs to this run, as (step, state, metadata), or None if there is none.

        The steps newer than it are set aside, but only once an older one is restored: to start anew for want of a good
        step is for the user to decide.

        Args:
            abstract: a pytree of ``jax.ShapeDtypeStruct`` with shardings, which may differ from the saved ones.
            report: gets one line for each step that is given up.

        Raises:
            DataError: no step is whole, or a whole one does not have the paths, shapes and dtypes of ``abstract``.
            UsageError: all steps belong to another run, or this run's own digests have changed since.
            StorageError: the system refused to read; nothing is set aside.
        """
        self.finish()
        given_up: dict[int, str] = {}
        refusal = None
        for step in self._newest_first():
            path = self._folder / str(step)
            try:
                state, meta = self._restore(path, abstract)
            except (DamagedError, _ForeignError) as error:
                refusal = self._refusal(path, error)
                given_up[step] = _FOREIGN if isinstance(error, _ForeignError) else _DAMAGED
                report(f"{path}: {error}: set aside, resuming from the step before")
            else:
                with self._as_storage_error():
                    self._set_aside(given_up)
                return step, state, meta
            gc.collect()  # or the arrays of this try may fill the device during the next
        if refusal is not None:
            raise refusal
        return None

    def close(self) -> None:
        """Wait for what is being written, and remove what failed saves left.

        After the death of another process leave with ``os._exit`` instead: this would wait for that process.

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
        content = {"name": path.name, "run": self._run, "meta": dict(meta), "arrays": arrays}
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
        content = self._read(path)
        _compare(path, content["arrays"], wanted)
        if not self._is_remote:
            together("state", lambda: _check_readable(path / "state"))
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        arguments = ocp.args.PyTreeRestore(stored, ocp.checkpoint_utils.construct_restore_args(stored))
        # By the handler, not the checkpointer, which has a barrier behind it: a process that fails would not come.
        restored = together("state", lambda: self._arrays.restore(path / "state", args=arguments))
        flat = {name: restored[name] if leaf.size else _empty(leaf) for name, leaf in wanted.items()}
        if changed := _changed(content["arrays"], flat):
            raise DamagedError(f"{changed} is not what was saved")
        return jax.tree.unflatten(jax.tree.structure(abstract), flat.values()), content["meta"]

    def _read(self, path: epath.Path) -> dict[str, Any]:
        """The document of a checkpoint, in every process.

        Raises:
            DamagedError, StorageError: see ``together``.
            _ForeignError: it belongs to another run.
            UsageError: it belongs to this run, whose digests have changed since.
        """
        file = f"meta/{_META_FILE}"
        content = together(file, lambda: self._parse(path / file))
        owner = content["run"]
        if owner.get("id") != self._run.get("id"):
            raise _ForeignError(f"belongs to another run (id {owner.get('id', 'unknown')})")
        if changed := [name for name in self._run | owner if self._run.get(name) != owner.get(name)]:
            raise UsageError(
                f"{path}: was saved with another {', '.join(changed)}: restore that from a copy, or use another run"
                " folder"
            )
        if content["name"] != path.name:
            raise DamagedError(f"is a copy of {content['name']}")
        return content

    def _parse(self, file: epath.Path) -> dict[str, Any]:
        if not self._is_remote and not stat.S_ISREG(Path(file).stat().st_mode):
            raise ValueError("is not a file")
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise
        except Exception as error:  # object storage has exceptions of its own
            raise StorageError(system_error(error) or line(error)) from error
        document = json.loads(data)
        content = document["content"]
        if _sha256(content) != document["sha256"]:
            raise ValueError("is not what was saved")
        if not isinstance(content["name"], str) or not all(
            isinstance(content[key], dict) for key in ("run", "meta", "arrays")
        ):
            raise ValueError("was saved by another version")
        return content

    def _refusal(self, path: epath.Path, error: Exception) -> TliError:
        kind, what = (DataError, "whole") if isinstance(error, DamagedError) else (UsageError, "of this run")
        return kind(
            f"{path}: {error}; no other step is {what}: restore {self._folder} from a copy, or use another run folder"
        )

    def _newest_first(self) -> Iterator[int]:
        """As the first process sees them, since the others may see a network folder later."""
        steps = self.steps()
        while (step := first(max(steps, default=-1))) >= 0:
            yield step
            steps = [other for other in steps if other < step]

    def _is_step(self, path: epath.Path) -> bool:
        return bool(_STEP.fullmatch(path.name)) and self._is_folder(path) and ocp.path.step.is_path_finalized(path)

    def _is_folder(self, path: epath.Path) -> bool:
        """Unlike ``Path.is_dir``, raises if the system does not let us see."""
        if self._is_remote:
            return path.is_dir()
        try:
            return stat.S_ISDIR(Path(path).stat().st_mode)
        except FileNotFoundError:
            return False

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
                if _STEP.fullmatch(name) and int(name) <= max(steps, default=-1):
                    path.rmtree()

    def _set_aside(self, steps: Mapping[int, str]) -> None:
        """Rename steps; by step, what is added to its name."""
        if jax.process_index() == 0 and not self._read_only:
            for step, suffix in steps.items():
                path = self._folder / str(step)
                aside = path.with_name(path.name + suffix)
                if suffix == _DAMAGED and aside.exists():
                    aside.rmtree()
                elif aside.exists():  # someone else's, and none of ours to remove
                    names = (path.with_name(f"{path.name}{suffix}-{number}") for number in itertools.count(2))
                    aside = next(name for name in names if not name.exists())
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
                f"{self._folder}: {doing} a checkpoint failed ({line(error)}): free space or fix permissions, then run"
                " the same command again to resume from the last complete step"
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


def _check_readable(folder: epath.Path) -> None:
    """Find what Orbax and TensorStore take for damage, or wait for without end: no permission, a FIFO."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        for file in (Path(parent, name) for name in names):
            if not stat.S_ISREG(file.stat().st_mode):
                raise ValueError(f"{file.name} is not a file")
            with file.open("rb"):
                pass


def _sha256(content: Any) -> str:
    # Once through JSON, where keys become text and tuples lists.
    again = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(again, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _as_refusal(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except (DamagedError, _ForeignError) as error:
        kind = DataError if isinstance(error, DamagedError) else UsageError
        raise kind(f"{path}: {error}: restore it from a copy, or use another run folder") from error
