"""Read one checkpoint and verify it: Orbax returns flipped bits silently, and zeros for some missing files."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tli_jax.errors import DataError, StorageError, UsageError
from tli_jax.training.digest import digests
from tli_jax.training.failures import DamagedError, ForeignError, on_all_processes, one_line, system_error

META_FILE = "meta.json"


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Return Orbax's handler of arrays. Weights do not compress."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


class CheckpointReader:
    """Reads checkpoints of one run."""

    def __init__(self, run: Mapping[str, str], is_remote: bool) -> None:
        self._run, self._is_remote, self._arrays = run, is_remote, array_handler()

    def read(self, path: epath.Path) -> dict[str, Any]:
        """Return the content of ``meta.json``, see ``make_document``.

        Raises:
            DamagedError, StorageError: see ``on_all_processes``.
            ForeignError: the checkpoint belongs to another run.
            UsageError: the digests of this run have changed since.
        """
        file = f"meta/{META_FILE}"
        content = on_all_processes(file, lambda: self._parse(path / file))
        owner = content["run"]
        if owner.get("id") != self._run.get("id"):
            raise ForeignError(f"belongs to another run (id {owner.get('id', 'unknown')})")
        if changed := [name for name in {**self._run, **owner} if self._run.get(name) != owner.get(name)]:
            raise UsageError(
                f"{path}: the {', '.join(changed)} of this run changed after this checkpoint was saved: restore a copy,"
                " or use another run directory"
            )
        if content["name"] != path.name:
            raise DamagedError(f"is a copy of {content['name']}")
        return content

    def restore(self, path: epath.Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Return the arrays, with the structure and shardings of ``abstract``, and the caller's metadata.

        Raises like ``read`` and ``check_shapes``.
        """
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in flatten(abstract).items()
        }
        content = self.read(path)
        check_shapes(path, content["arrays"], wanted)
        if not self._is_remote:
            on_all_processes("state", lambda: _check_readable(path / "state"))
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        args = ocp.args.PyTreeRestore(stored, ocp.checkpoint_utils.construct_restore_args(stored))
        # Not by a Checkpointer, which ends with a barrier that a failed process would never reach.
        restored = on_all_processes("state", lambda: self._arrays.restore(path / "state", args=args))
        flat = {name: restored[name] if leaf.size else _empty(leaf) for name, leaf in wanted.items()}
        if changed := first_changed(content["arrays"], flat):
            raise DamagedError(f"{changed} does not match its digest")
        return jax.tree.unflatten(jax.tree.structure(abstract), flat.values()), content["meta"]

    def _parse(self, file: epath.Path) -> dict[str, Any]:
        if not self._is_remote and not stat.S_ISREG(Path(file).stat().st_mode):
            raise ValueError("is not a file")
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise
        except Exception as error:  # object storage has exceptions of its own
            raise StorageError(system_error(error) or one_line(error)) from error
        document = json.loads(data)
        content = document["content"]
        if _sha256(content) != document["sha256"]:
            raise ValueError("does not match its digest")
        if not isinstance(content["name"], str) or not all(
            isinstance(content[key], dict) for key in ("run", "meta", "arrays")
        ):
            raise ValueError("was saved by another version")
        return content


def make_document(
    name: str, run: Mapping[str, str], meta: Mapping[str, Any], flat: dict[str, jax.Array]
) -> dict[str, Any]:
    """Return the JSON document of a checkpoint.

    Its content is the name of the checkpoint, the run that it belongs to, the caller's metadata, and the shape, dtype
    and digest of each array.
    """
    arrays = {
        path: {"shape": list(array.shape), "dtype": str(array.dtype), "digest": digest}
        for (path, array), digest in zip(flat.items(), digests(list(flat.values())), strict=True)
    }
    content = {"name": name, "run": dict(run), "meta": dict(meta), "arrays": arrays}
    return {"sha256": _sha256(content), "content": content}


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path. So Orbax never sees our containers, some of which it cannot restore."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the state have one path: a key that contains a dot reads like two keys")
    return flat


def check_shapes(path: epath.Path, recorded: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ``DataError`` if paths, shapes or dtypes of a checkpoint differ from those that are wanted."""
    saved = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in recorded.items()}
    needed = {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in wanted.items()}
    differing = [name for name in {**needed, **saved} if needed.get(name) != saved.get(name)]
    if differing:
        name = differing[0]
        raise DataError(
            f"{path}: {_summarize(differing)} is {saved.get(name, 'absent')} in the checkpoint and "
            f"{needed.get(name, 'absent')} in this run: use another run directory, or the configuration of that run"
        )


def first_changed(recorded: dict[str, Any], flat: dict[str, jax.Array]) -> str:
    """Return the first array that does not match its digest and the number of others; empty if all match."""
    computed = zip(flat, digests(list(flat.values())), strict=True)
    return _summarize([name for name, digest in computed if digest != recorded[name]["digest"]])


def _summarize(names: list[str]) -> str:
    more = f" (with {len(names) - 1} more)" if len(names) > 1 else ""
    return names[0] + more if names else ""


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    )


def _check_readable(folder: epath.Path) -> None:
    """Find what Orbax and TensorStore report as damage (missing permissions) or hang on (a FIFO)."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        for file in (Path(parent, name) for name in names):
            if not stat.S_ISREG(file.stat().st_mode):
                raise ValueError(f"{file.name} is not a file")
            with file.open("rb"):
                pass


def _sha256(content: Any) -> str:
    # Through JSON first, which turns keys into strings and tuples into lists.
    restored = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(restored, sort_keys=True).encode()).hexdigest()
