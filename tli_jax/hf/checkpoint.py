"""Hugging Face folders of a Llama or a Mixtral: opened and checked, and loaded as layer-stacked params."""

import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tli_jax.errors import DataError, MissingInputError
from tli_jax.hf.headers import DTYPES, Tensor, check_names, inside, read_folder, read_json, strip_prefix
from tli_jax.hf.record import read_growth_record
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest, pick

if TYPE_CHECKING:
    import jax

# Buffers that old checkpoints carry and no Llama needs.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
CHUNK = 4 * 2**20  # bytes that pass through memory at a time


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that has been checked: its configuration and, by Hugging Face name, where each tensor lies."""

    folder: Path
    config: LlamaConfig
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    growth: dict[str, Any] | None = None
    stamps: Mapping[Path, "Stamp"] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def raw(self) -> dict[str, Any]:
        """``config.json`` as it was read."""
        return json.loads(self.config.source)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stored(self, name: str, layers: Sequence[int] = ()) -> "Stored":
        """The tensors that make up one array: of those layers, or without any, one outside the layers."""
        if not layers:
            return Stored((self.tensors[hf_name(name)],), ())
        parts = self.config.stored_tensors(name)
        lead = (len(layers),) + (len(parts),) * (len(self.config.layer_tensors[name]) == 3)
        return Stored(tuple(self.tensors[hf_name(part, layer)] for layer in layers for part in parts), lead)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where an array lies: tensors in the order in which they are stacked, and the dims that stacking puts in front."""

    tensors: tuple[Tensor, ...]
    lead: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.tensors[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds the values of all tensors: their own, or float32 where they differ."""
        return widest(self.tensors)

    @property
    def is_mixed(self) -> bool:
        """Whether the tensors differ in dtype."""
        return len({tensor.dtype for tensor in self.tensors}) > 1


def widest(tensors: Sequence[Tensor]) -> np.dtype:
    """The dtype that holds the values of all: their own, or float32 where they differ."""
    codes = {tensor.dtype for tensor in tensors}
    return DTYPES[codes.pop() if len(codes) == 1 else "F32"]


def hf_name(name: str, layer: int | None = None) -> str:
    """Hugging Face's name of a tensor: of a layer's (``mlp.up_proj.weight``), or of one outside the layers."""
    if layer is not None:
        return f"model.layers.{layer}.{name}"
    return name if name.startswith("lm_head") else f"model.{name}"


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor that such a model stores."""
    shapes = {hf_name(name): config.shape(dims) for name, dims in config.outer_tensors.items()}
    layer = {
        stored: config.shape(dims[-2:])  # without the dim of experts, each of which is stored by itself
        for name, dims in config.layer_tensors.items()
        for stored in config.stored_tensors(name)
    }
    return shapes | {hf_name(n, i): shape for i in range(config.num_hidden_layers) for n, shape in layer.items()}


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Read configuration and headers of a folder, and refuse what is not a whole, plain Llama. Reads no weights,
    but for a head that claims to be tied.

    Raises:
        MissingInputError: the folder, its configuration, weights or shards are not there.
        DataError: anything in it is damaged, contradictory or not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder: give the folder of a model, with config.json in it")
    if not (folder / "config.json").is_file():
        raise MissingInputError(f"{folder}: no config.json, so not a model folder")
    # Before anything is read, so that no change goes unseen.
    inside(folder, "config.json")  # refuses a link out of the folder before anything is read
    stamps = {file: Stamp.of(file) for file in [folder / "config.json", *folder.glob("*.safetensors")] if file.exists()}
    raw = read_json(folder / "config.json")
    notes = []
    if "auto_map" in raw:
        notes.append(f"{folder / 'config.json'}: auto_map asks for code of the model's own, which is never run")
    config = LlamaConfig.from_hf(raw, str(folder / "config.json"))
    notes += _notes(config, raw, folder / "config.json")
    is_tied = config.tie_word_embeddings
    found = read_folder(folder, lambda name: _is_spare(name, is_tied))
    if found.absent:
        notes.append(
            f"{folder}: the index names {len(found.absent)} tensors that no shard holds and the model does not need,"
            f" like {found.absent[0]}"
        )
    tensors, prefix = strip_prefix(found.tensors)
    if prefix:
        notes.append(f"{folder}: all tensor names start with {prefix!r}, which is dropped")
    buffers = [name for name in tensors if _BUFFERS.fullmatch(name)]
    if buffers:
        notes.append(f"{folder}: {len(buffers)} rotary buffers (inv_freq) are dropped, they are computed")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    if is_tied and _HEAD in tensors:
        head, embedding = tensors.pop(_HEAD), tensors.get("model.embed_tokens.weight")
        if embedding is None or not same_bytes(head, embedding):
            raise DataError(
                f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it:"
                " set tie_word_embeddings to false"
            )
        notes.append(f"{folder}: lm_head.weight equals the embedding it is tied to, and is stored once")
    layers, experts = config.num_hidden_layers, config.num_experts
    # Before a name is made for each.
    if layers > len(tensors):
        raise DataError(f"{folder}: config.json has num_hidden_layers {layers:,}, the weights {len(tensors)} tensors")
    if experts > len(tensors) or layers * experts > 2 * len(tensors):
        raise DataError(f"{folder}: config.json has num_local_experts {experts:,}, the weights {len(tensors)} tensors")
    check_names(tensors, expected_shapes(config), folder)
    checkpoint = Checkpoint(folder, config, tensors, growth=_read_growth(folder, config), stamps=stamps)
    mixed = [name for name in config.layer_tensors if checkpoint.stored(name, range(layers)).is_mixed]
    if mixed:
        what = f"{mixed[0]} and {len(mixed) - 1} more" if len(mixed) > 1 else mixed[0]
        notes.append(
            f"{folder}: layers are stored in different dtypes ({what}): growth keeps the dtype of each, all else reads"
            " them as float32 where no other dtype is asked for"
        )
    return dataclasses.replace(checkpoint, warnings=tuple(notes))


def _is_spare(name: str, is_tied: bool) -> bool:
    """Whether a tensor that an index names is one that a Llama can do without."""
    short = name[name.find("model.layers.") if "model.layers." in name else 0 :]
    return bool(_BUFFERS.fullmatch(short) or name.endswith("model.rotary_emb.inv_freq")) or (
        is_tied and name.endswith(_HEAD)
    )


def _notes(config: LlamaConfig, raw: Mapping[str, Any], file: Path) -> Iterator[str]:
    """What to know of a configuration that is read all the same."""
    if not config.is_runnable:
        yield (
            f"{file}: RoPE type {config.rope_type!r} is not supported, so the model can be grown (--no-proof), not run"
        )
    factors = dict(config.rope_factors)
    if config.rope_type == "llama3" and factors["original_max_position_embeddings"] >= config.max_position_embeddings:
        yield (
            f"{file}: RoPE type llama3 with an original context of"
            f" {factors['original_max_position_embeddings']:,.0f}, not below max_position_embeddings"
            f" {config.max_position_embeddings:,}, as transformers reads it: the original context may be missing"
        )


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What changes about a file when it is written to or replaced."""

    size: int
    mtime_ns: int
    inode: tuple[int, int]

    @classmethod
    def of(cls, file: Path) -> "Stamp":
        stat = file.stat()
        return cls(stat.st_size, stat.st_mtime_ns, (stat.st_dev, stat.st_ino))


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a folder whose configuration or weights were written to or replaced since it was opened.

    Compares size, modification time and inode: a change that keeps all three is not seen.

    Raises:
        DataError: a file has changed, or is gone.
    """
    for file, stamp in checkpoint.stamps.items():
        if not file.is_file() or Stamp.of(file) != stamp:
            raise DataError(f"{file}: changed while it was read: run the same command again, on a model at rest")


def _read_growth(folder: Path, config: LlamaConfig) -> dict[str, Any] | None:
    file = folder / "growth.json"
    if not file.is_file():
        return None
    record = read_growth_record(inside(folder, file.name))
    if len(record["rows"]) != config.num_hidden_layers:
        raise DataError(
            f"{file}: is about {len(record['rows'])} layers, config.json about {config.num_hidden_layers}:"
            " fix or delete it"
        )
    return record


def read_chunks(tensor: Tensor, size: int = CHUNK) -> Iterator[memoryview]:
    """The bytes of a tensor in order, through one buffer that the next chunk overwrites.

    Raises:
        DataError: the file has become shorter.
    """
    buffer = memoryview(bytearray(min(size, tensor.nbytes)))
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.nbytes
        while left:
            count = stream.readinto(buffer[: min(size, left)])
            # A short read would split an element: fill the chunk up.
            while count < min(size, left):
                more = stream.readinto(buffer[count : min(size, left)])
                if not more:
                    raise DataError(
                        f"{tensor.file}: ends within tensor {tensor.name!r}: the file was cut while it was read"
                    )
                count += more
            left -= count
            yield buffer[:count]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal byte for byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(read_chunks(a), read_chunks(b), strict=True))


def read_tensor(tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
    """One tensor, or some of its leading rows, as stored.

    Raises:
        DataError: the file has become shorter.
    """
    first, last, _ = rows.indices(tensor.shape[0])
    row = tensor.nbytes // tensor.shape[0]
    part = dataclasses.replace(tensor, start=tensor.start + first * row, nbytes=(last - first) * row)
    out = np.empty((last - first, *tensor.shape[1:]), DTYPES[tensor.dtype])
    flat, at = out.reshape(-1).view(np.uint8), 0
    for chunk in read_chunks(part):
        flat[at : at + len(chunk)] = chunk
        at += len(chunk)
    return out


def load_hf(
    model: Path | str, dtype: Any = None, shardings: Any = None, *, revision: str | None = None
) -> "tuple[LlamaConfig, dict[str, Any]]":
    """Load a Llama folder as layer-stacked params, named as Hugging Face names them.

    ``params["layers"]["mlp"]["up_proj"]["weight"]`` is ``[L, F, D]``: the tensors of all layers, stacked byte for byte.

    Args:
        model: a folder, a hub id, or ``"embedded"``, the small base that the package carries.
        dtype: dtype of all params; as stored by default.
        shardings: where the params go: one ``jax.sharding.Sharding`` for all, or a tree of them like the params. Each
            device's share is read from disk by itself. The default device otherwise.
        revision: branch, tag or commit of a hub id.

    Raises:
        MissingInputError, UnavailableError: the model cannot be had.
        MissingInputError, DataError: see ``open_checkpoint``.

    Warns:
        UserWarning: layers are stored in different dtypes, and are loaded as float32 because no dtype is given.
    """
    import jax

    from tli_jax.hf import hub

    checkpoint = open_checkpoint(hub.resolve(model, revision))
    config, layers = checkpoint.config, range(checkpoint.config.num_hidden_layers)
    flat = {name: checkpoint.stored(name) for name in config.outer_tensors}
    flat |= {f"layers.{name}": checkpoint.stored(name, layers) for name in config.layer_tensors}
    mixed = [name for name, stored in flat.items() if stored.is_mixed] if dtype is None else []
    if mixed:
        warnings.warn(
            f"{checkpoint.folder}: {mixed[0]} has other dtypes in other layers: it is loaded as float32", stacklevel=2
        )
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, nest(dict.fromkeys(flat, 0)))

    leaves = {name: load_array(stored, pick(shardings, name), dtype) for name, stored in flat.items()}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=np.dtype(dtype).name)
    return config, nest(leaves)


def load_array(stored: Stored, sharding: "jax.sharding.Sharding | None" = None, dtype: Any = None) -> "jax.Array":
    """One array from its tensors, in ``dtype``, or in the one that holds the values of all (``Stored.dtype``).

    Each device's share is read from disk by itself: nothing is whole anywhere that is not meant to be.

    Raises:
        DataError: a file has become shorter.
    """
    import jax

    lead, shape = stored.lead, stored.shape
    target = np.dtype(dtype) if dtype is not None else stored.dtype

    def read(index: Any) -> np.ndarray:
        rows, *rest = index[len(lead) :]
        whole = [range(*part.indices(n)) for part, n in zip(index, lead, strict=False)]
        out = np.empty([len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)], target)
        places = itertools.product(*whole)
        for at, place in zip(np.ndindex(*map(len, whole)), places, strict=True):
            number = int(np.ravel_multi_index(place, lead)) if lead else 0
            out[at] = read_tensor(stored.tensors[number], rows)[:, *rest]
        return out

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)
