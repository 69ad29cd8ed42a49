"""A trained model back to a Hugging Face folder, a tensor at a time, written by the first process."""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tli_jax.cli.progress import progress
from tli_jax.distributed.mesh import replicated
from tli_jax.distributed.processes import barrier, is_first
from tli_jax.errors import OutputError
from tli_jax.hf import sidecar
from tli_jax.hf.card import trained_card
from tli_jax.hf.checkpoint import hf_name
from tli_jax.hf.headers import CODES, read_json
from tli_jax.hf.output import check_output, staged
from tli_jax.hf.stream import Piece, parse_size, split_shards, write_safetensors
from tli_jax.hf.training_record import RECORD
from tli_jax.training.freezing import Arrays, ParamSpec
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.trainer import Trainer


def check_export(path: Path, run: RunDirectory, model: str, run_id: str, overwrite: bool) -> None:
    """Refuse, before a long training, a folder that may not be written; this run's own export may be replaced.

    Args:
        model: what the run began with; not to be replaced, where it is a folder.

    Raises:
        UsageError, OutputError: see ``checkpoint.output.check_output``.
    """
    nearest = next(one for one in path.absolute().parents if one.exists())
    if not nearest.is_dir():
        raise OutputError(f"export {path}: {nearest} is not a folder: choose another export")
    for taken in (run.path, Path(model)):
        if taken.is_dir():
            check_output(path, taken, overwrite or _exported(path).get("run") == run_id)


def _exported(path: Path) -> dict[str, Any]:
    return read_json(path / RECORD) if (path / RECORD).is_file() else {}


def export(
    trainer: Trainer, arrays: Arrays, dtypes: Mapping[str, str], run: RunDirectory, path: Path, facts: dict[str, Any]
) -> None:
    """Write all tensors in the dtype that they were stored in, configuration, tokenizer, plan, ``training.json`` and a
    model card.

    To be called by every process: a tensor is brought together from all of them, and lies whole on each for a moment.

    Args:
        arrays: what trains and what does not.
        dtypes: by leaf, as stored in the model that the run began with.
        facts: for ``training.json``, see ``training.record.describe_training``.

    Raises:
        OutputError, StorageError: it cannot be written. What was there before is untouched.
    """
    pieces = list(_pieces(trainer, arrays, dtypes))
    shards = split_shards(pieces, parse_size(trainer.config.max_shard_size))
    if not is_first():
        for piece in (piece for shard in shards.values() for piece in shard):
            assert piece.make is not None
            list(piece.make())
        barrier("export")
        return
    total = sum(piece.nbytes for piece in pieces)
    with staged(path, total, overwrite=True) as partial, progress("export", total) as advance:
        digests, _ = write_safetensors(partial, shards, {}, advance)
        sidecar.write_json(partial / "config.json", read_json(run.model / "config.json"))
        sidecar.copy_allowed(run.model, partial)
        growth = None if run.growth is None else _of_trained(run.growth, digests, facts)
        if growth is not None:
            sidecar.write_json(partial / "growth.json", growth)
        sidecar.write_json(partial / RECORD, facts)
        card = trained_card(Path(os.path.abspath(path)).name, facts, growth)  # noqa: PTH100
        (partial / "README.md").write_text(card, encoding="utf-8")
    barrier("export")


def _of_trained(growth: dict[str, Any], digests: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The growth of a model that has been trained since: a proof belongs to the weights that it was run on."""
    base = (growth.get("digests") or {}).get("base")
    return growth | {
        "digests": {"algorithm": "sha256", "base": base, "grown": digests},
        "proof": None,
        "proof_before_training": growth.get("proof") or growth.get("proof_before_training"),
        "training": facts,
    }


def _pieces(trainer: Trainer, arrays: Arrays, dtypes: Mapping[str, str]) -> Iterator[Piece]:
    """In the order in which Hugging Face writes a Llama."""
    in_layers = {
        (layer, leaf.tensor): (leaf, row) for leaf in trainer.param_specs for row, layer in enumerate(leaf.layers)
    }
    outside = {leaf.tensor: leaf for leaf in trainer.param_specs if not leaf.layers}
    first, *rest = trainer.model.outer_tensors

    def piece(name: str, leaf: ParamSpec, *at: int) -> Piece:
        array, dtype = arrays[leaf.name], np.dtype(dtypes[leaf.name])
        shape = array.shape[len(at) :]

        def make() -> Iterator[Any]:
            whole = _gather(replicated(trainer.mesh), dtype.name)(array, at)
            yield np.ascontiguousarray(whole.addressable_data(0)).reshape(-1).view(np.uint8).data

        return Piece(name, CODES[dtype], shape, int(np.prod(shape)) * dtype.itemsize, make=make)

    yield piece(hf_name(first), outside[first])
    for layer in range(trainer.model.num_hidden_layers):
        for tensor, dims in trainer.model.layer_tensors.items():
            leaf, row = in_layers[layer, tensor]
            for expert, stored in enumerate(trainer.model.stored_tensors(tensor)):
                yield piece(hf_name(stored, layer), leaf, row, *([expert] if len(dims) == 3 else []))
    yield from (piece(hf_name(name), outside[name]) for name in rest)


@functools.cache  # or every tensor would be compiled for anew
def _gather(everywhere: Any, dtype: str) -> Any:
    """Jitted: what lies at a place in an array, one layer of a stack, say, of that dtype on every device."""
    return jax.jit(lambda array, at: array[at].astype(dtype), out_shardings=everywhere)
