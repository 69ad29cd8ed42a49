"""Export a trained model as a Hugging Face folder, one tensor of each process at a time."""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tli_jax.distributed.mesh import replicated
from tli_jax.distributed.processes import barrier, is_first
from tli_jax.errors import OutputError
from tli_jax.hf.card import trained_card
from tli_jax.hf.checkpoint import tensor_names
from tli_jax.hf.inputs import read_json
from tli_jax.hf.output import check_output
from tli_jax.hf.records import TRAINING
from tli_jax.hf.shards import OutputTensor, as_chunks, parse_size, split_shards
from tli_jax.hf.tensors import CODES
from tli_jax.hf.write import write_model
from tli_jax.training.export_files import write_together
from tli_jax.training.freezing import Arrays
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.trainer import Trainer


def check_export(path: Path, run: RunDirectory, model: str, run_id: str, overwrite: bool) -> None:
    """Check, before a long training run, that the export can be written. A run may replace its own export.

    Args:
        model: the model that the run starts from; if it is a folder, it is never replaced.

    Raises:
        UsageError, OutputError: see ``hf.output.check_output``.
    """
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise OutputError(f"export {path}: {nearest} is not a folder: choose another export")
    record = read_json(path / TRAINING) if (path / TRAINING).is_file() else {}
    for protected in (run.path, Path(model)):
        if protected.is_dir():
            check_output(path, protected, overwrite or record.get("run") == run_id)


def export(
    trainer: Trainer, arrays: Arrays, dtypes: Mapping[str, str], run: RunDirectory, path: Path, facts: dict[str, Any]
) -> None:
    """Write the tensors in the dtypes of the original model, with its configuration and sidecar files, the plan,
    ``training.json`` and a model card.

    Every process must call this: each tensor is all-gathered, and is replicated on every device for a moment. Processes
    that share the output's file system write in parallel; the first one publishes the folder.

    Args:
        arrays: trainable and frozen arrays.
        dtypes: the stored dtype of each array in the model that the run started from.
        facts: the content of ``training.json``, see ``training.record.describe_training``.

    Raises:
        OutputError, StorageError: the folder cannot be written. An existing one is untouched.
    """
    tensors = list(_output_tensors(trainer, arrays, dtypes))
    limit = parse_size(trainer.config.max_shard_size)
    if not is_first():
        write_together(tensors, limit, None)
        barrier("export")
        return
    trainable = (arrays[spec.name] for spec in trainer.param_specs if spec.trains)
    facts = facts | {"trainable_parameters": sum(int(np.prod(array.shape)) for array in trainable)}
    config = read_json(run.model / "config.json")
    shards, write = split_shards(tensors, limit), functools.partial(write_together, tensors, limit)
    with write_model(path, shards, config, source=run.model, overwrite=True, write=write, title="export") as model:
        growth = None if run.growth is None else _trained_growth(run.growth, model.digests, facts)
        if growth is not None:
            model.write_record("growth.json", growth)
        model.write_record(TRAINING, facts)
        name = Path(os.path.abspath(path)).name  # noqa: PTH100  # Path.absolute keeps ".."
        model.write_card(trained_card(name, facts, growth, config.get("model_type", "llama")))
    barrier("export")


def _trained_growth(growth: dict[str, Any], digests: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The growth record of a trained model: its proof is of the weights before training, and is labelled so."""
    base = (growth.get("digests") or {}).get("base")
    return growth | {
        "digests": {"algorithm": "sha256", "base": base, "grown": digests},
        "proof": None,
        "proof_before_training": growth.get("proof") or growth.get("proof_before_training"),
        "training": facts,
    }


def _output_tensors(trainer: Trainer, arrays: Arrays, dtypes: Mapping[str, str]) -> Iterator[OutputTensor]:
    in_layers = {
        (layer, spec.tensor): (spec, row) for spec in trainer.param_specs for row, layer in enumerate(spec.layers)
    }
    outer = {spec.tensor: spec for spec in trainer.param_specs if not spec.layers}
    for stored, tensor, index in tensor_names(trainer.model, trainer.model.num_hidden_layers):
        spec = outer.get(tensor)
        if index:
            spec, row = in_layers[index[0], tensor]
            index = (row, *index[1:])
        assert spec is not None
        array, dtype = arrays[spec.name], np.dtype(dtypes[spec.name])
        gather = functools.partial(_gather(replicated(trainer.mesh), dtype.name), array, index)
        make = as_chunks(lambda gather=gather: gather().addressable_data(0))
        yield OutputTensor(stored, CODES[dtype], array.shape[len(index) :], make=make)


@functools.cache  # or every tensor would be compiled again
def _gather(sharding: Any, dtype: str) -> Any:
    """A jitted function that takes one layer, say, from an array and replicates it on every device."""
    return jax.jit(lambda array, index: array[index].astype(dtype), out_shardings=sharding)
