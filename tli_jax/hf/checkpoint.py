"""Open the Hugging Face folder of a Llama or Mixtral: check everything that can be checked without its weights."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.errors import DataError, MissingInputError
from tli_jax.hf.headers import check_names, read_folder, strip_prefix
from tli_jax.hf.inputs import inside, read_json
from tli_jax.hf.records import read_growth, read_trainings
from tli_jax.hf.tensors import Tensor, common_dtype, read_chunks, same_bytes
from tli_jax.models.config import LlamaConfig

# Buffers that old checkpoints store; the model computes them.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_SAMPLE = 4096  # bytes of each tensor that model_digest reads
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class TensorStack:
    """An array of the params as it is stored: its tensors in order, and the leading dims that stacking them adds.

    The tensors are ``Tensor``, or ``OutputTensor`` if the model is grown while it is read.
    """

    tensors: tuple[Any, ...]
    leading: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.leading, *self.tensors[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return common_dtype(self.tensors)

    @property
    def is_mixed(self) -> bool:
        """Whether the tensors differ in dtype."""
        return len({tensor.dtype for tensor in self.tensors}) > 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked model folder.

    Attributes:
        tensors: location of each tensor, by Hugging Face name.
        growth: the content of ``growth.json``, if any.
        stamps: size, modification time and inode of each file before it was read.
    """

    folder: Path
    config: LlamaConfig
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    growth: dict[str, Any] | None = None
    stamps: Mapping[Path, tuple[int, ...]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def raw(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return json.loads(self.config.source)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The records of all training runs since the last growth, see ``read_trainings``."""
        return read_trainings(self.folder)

    @property
    def sources(self) -> Mapping[str, Any]:
        """What params are loaded from, by Hugging Face name."""
        return self.tensors

    def stack(self, name: str, layers: Sequence[int] = ()) -> TensorStack:
        """The tensors of one array of the params: of these layers, or without layers, of one outside them."""
        if not layers:
            return TensorStack((self.sources[hf_name(name)],))
        parts = self.config.stored_tensors(name)
        leading = (len(layers),) + (len(parts),) * (len(self.config.layer_tensors[name]) == 3)
        return TensorStack(tuple(self.sources[hf_name(part, layer)] for layer in layers for part in parts), leading)


def hf_name(name: str, layer: int | None = None) -> str:
    """Hugging Face's name of a tensor of a layer (``mlp.up_proj.weight``), or of one outside the layers."""
    if layer is not None:
        return f"model.layers.{layer}.{name}"
    return name if name.startswith("lm_head") else f"model.{name}"


def tensor_names(config: LlamaConfig, layers: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of a model, in the order in which Hugging Face writes them.

    Yields:
        ``(hf_name, name, index)``: ``index`` is where the tensor is in the stacked param ``name``: ``(layer,)``,
        ``(layer, expert)``, or ``()`` outside the layers.
    """
    first, *rest = config.outer_tensors
    yield hf_name(first), first, ()
    for layer in range(layers):
        for name, dims in config.layer_tensors.items():
            for expert, part in enumerate(config.stored_tensors(name)):
                yield hf_name(part, layer), name, (layer, expert) if len(dims) == 3 else (layer,)
    yield from ((hf_name(name), name, ()) for name in rest)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model stores, by Hugging Face name."""
    shapes = {hf_name(name): config.shape(dims) for name, dims in config.outer_tensors.items()}
    layer = {
        part: config.shape(dims[-2:])  # each expert is stored separately
        for name, dims in config.layer_tensors.items()
        for part in config.stored_tensors(name)
    }
    return shapes | {hf_name(n, i): shape for i in range(config.num_hidden_layers) for n, shape in layer.items()}


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Read the configuration and the headers of a folder, and check that it is a complete, plain Llama or Mixtral.

    No weights are read, except a head that is stored although it is tied.

    Raises:
        MissingInputError: the folder, its configuration, weights or shards do not exist.
        DataError: something in the folder is damaged, contradictory or not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder: give the folder of a model, with its config.json")
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "run.json").is_file():
            export = f"tli-jax train --run {folder} --export-only --export DIR"
            raise MissingInputError(f"{folder}: is a run directory, not a model folder: export its model: {export}")
        raise MissingInputError(f"{folder}: no config.json, so it is not a model folder")
    inside(folder, file.name)
    # Before anything is read, or a change during the reading would go unnoticed.
    stamps = {path: _stamp(path) for path in [file, *folder.glob("*.safetensors")] if path.exists()}
    raw = read_json(file)
    config = LlamaConfig.from_hf(raw, str(file))
    notes = list(_config_notes(config, raw, file))
    tensors = _open_tensors(folder, config, notes)
    checkpoint = Checkpoint(folder, config, tensors, growth=_read_growth(folder, config), stamps=stamps)
    layers = range(config.num_hidden_layers)
    mixed = [name for name in config.layer_tensors if checkpoint.stack(name, layers).is_mixed]
    if mixed:
        names = f"{mixed[0]} and {len(mixed) - 1} more" if len(mixed) > 1 else mixed[0]
        notes.append(
            f"{folder}: layers are stored in different dtypes ({names}): growth keeps them, everything else reads"
            " float32 unless a dtype is given"
        )
    return dataclasses.replace(checkpoint, warnings=tuple(notes))


def _config_notes(config: LlamaConfig, raw: Mapping[str, Any], file: Path) -> Iterator[str]:
    if "auto_map" in raw:
        yield f"{file}: auto_map refers to Python code of the model, which is never run"
    if not config.is_runnable:
        yield (
            f"{file}: RoPE type {config.rope_type!r} is not supported: the model can be grown with --no-proof, but not"
            " run"
        )
    factors = dict(config.rope_factors)
    if config.rope_type == "llama3" and factors["original_max_position_embeddings"] >= config.max_position_embeddings:
        yield (
            f"{file}: RoPE type llama3 has an original context of"
            f" {factors['original_max_position_embeddings']:,.0f}, not less than max_position_embeddings"
            f" {config.max_position_embeddings:,}; transformers uses these values too, but one may be missing"
        )


def _open_tensors(folder: Path, config: LlamaConfig, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of the model, without those that it does not need; ``notes`` gets a line about each kind."""
    is_tied = config.tie_word_embeddings
    tensors, absent = read_folder(folder, lambda name: _is_optional(name, is_tied))
    if absent:
        notes.append(
            f"{folder}: the index lists {len(absent)} tensors that no shard contains and the model does not need,"
            f" such as {absent[0]}"
        )
    tensors, prefix = strip_prefix(tensors)
    if prefix:
        notes.append(f"{folder}: all tensor names start with {prefix!r}, which is dropped")
    buffers = [name for name in tensors if _BUFFERS.fullmatch(name)]
    if buffers:
        notes.append(f"{folder}: {len(buffers)} rotary buffers (inv_freq) are dropped: the model computes them")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    if is_tied and _HEAD in tensors:
        head, embedding = tensors.pop(_HEAD), tensors.get(_EMBEDDING)
        if embedding is None or not same_bytes(head, embedding):
            raise DataError(
                f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it:"
                " set tie_word_embeddings to false"
            )
        notes.append(f"{folder}: lm_head.weight equals the embedding that it is tied to, and is stored once")
    layers, experts, count = config.num_hidden_layers, config.num_experts, len(tensors)
    # Before expected_shapes makes a name for each of them.
    if layers > count:
        raise DataError(f"{folder}: config.json has num_hidden_layers {layers:,}, the weights {count} tensors")
    if experts > count or layers * experts > 2 * count:
        raise DataError(f"{folder}: config.json has num_local_experts {experts:,}, the weights {count} tensors")
    check_names(tensors, expected_shapes(config), folder)
    return tensors


def _is_optional(name: str, is_tied: bool) -> bool:
    """Whether an index may list a tensor that no shard contains: the model does not need it."""
    short = name[name.find("model.layers.") if "model.layers." in name else 0 :]
    return bool(_BUFFERS.fullmatch(short) or name.endswith("model.rotary_emb.inv_freq")) or (
        is_tied and name.endswith(_HEAD)
    )


def _read_growth(folder: Path, config: LlamaConfig) -> dict[str, Any] | None:
    file = folder / "growth.json"
    if not file.is_file():
        return None
    record = read_growth(inside(folder, file.name))
    if len(record["rows"]) != config.num_hidden_layers:
        raise DataError(
            f"{file}: describes {len(record['rows'])} layers, config.json {config.num_hidden_layers}: fix or delete it"
        )
    return record


def _stamp(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Check that no file was written to or replaced since the folder was opened.

    Compares sizes, modification times and inodes; a change that keeps all three goes unnoticed.

    Raises:
        DataError: a file was changed or deleted.
    """
    for file, stamp in checkpoint.stamps.items():
        if not file.is_file() or _stamp(file) != stamp:
            raise DataError(f"{file}: changed while it was read: run the command again when nothing writes to it")


def model_digest(checkpoint: Checkpoint) -> str:
    """Hash the configuration, the plan, and the name, dtype, shape and first bytes of every tensor."""
    digest = hashlib.sha256(json.dumps([checkpoint.raw, checkpoint.growth], sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(next(read_chunks(tensor, _SAMPLE)))
    return digest.hexdigest()
