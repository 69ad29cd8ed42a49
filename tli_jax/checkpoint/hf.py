"""Hugging Face folders of a Llama or a Mixtral: opened and checked, and loaded as layer-stacked params."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tli_jax.checkpoint.headers import DTYPES, Tensor, check_names, read_folder, read_json
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest, pick

if TYPE_CHECKING:
    import jax

# Buffers that old checkpoints carry and no Llama needs.
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
CHUNK = 4 * 2**20  # bytes that pass through memory at a time


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that has been checked: its configuration and, by Hugging Face name, where each tensor lies."""

    folder: Path
    config: LlamaConfig
    tensors: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    growth: dict[str, Any] | None = None

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
        """Of the first; see ``load_array`` for what others may be."""
        return DTYPES[self.tensors[0].dtype]


def hf_name(name: str, layer: int | None = None) -> str:
    """Hugging Face's name of a tensor: of a layer's (``mlp.up_proj.weight``), or of one outside the layers."""
    if layer is not None:
        return f"model.layers.{layer}.{name}"
    return name if name.startswith("lm_head") else f"model.{name}"


def grown_config(config: LlamaConfig, plan: Plan) -> LlamaConfig:
    """What a plan makes of a model of that configuration.

    Raises:
        UsageError: it makes experts, and there are some already, or the feed-forward cannot be cut as it says.
    """
    grown, experts = config.with_layers(len(plan)), plan.experts
    if experts is None:
        return grown
    if config.num_experts:
        raise UsageError(
            f"{plan.method}: the base has {config.num_experts} experts a layer: only a dense one gets some"
        )
    return dataclasses.replace(
        grown,
        num_experts=experts.total,
        experts_per_token=experts.top_k,
        intermediate_size=experts.cut(config.intermediate_size),
    )


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
    raw = read_json(folder / "config.json")
    warnings = []
    if "auto_map" in raw:
        warnings.append(f"{folder / 'config.json'}: auto_map asks for code of the model's own, which is never run")
    config = LlamaConfig.from_hf(raw, str(folder / "config.json"))
    tensors = read_folder(folder)
    buffers = [name for name in tensors if _BUFFERS.fullmatch(name)]
    if buffers:
        warnings.append(f"{folder}: {len(buffers)} rotary buffers (inv_freq) are dropped, they are computed")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is None or not same_bytes(head, embedding):
            raise DataError(
                f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it:"
                " set tie_word_embeddings to false"
            )
        warnings.append(f"{folder}: lm_head.weight equals the embedding it is tied to, and is stored once")
    layers = config.num_hidden_layers
    if layers > len(tensors):
        raise DataError(f"{folder}: config.json has num_hidden_layers {layers:,}, the weights {len(tensors)} tensors")
    check_names(tensors, expected_shapes(config), folder)
    return Checkpoint(folder, config, tensors, tuple(warnings), _read_growth(folder, config))


def _read_growth(folder: Path, config: LlamaConfig) -> dict[str, Any] | None:
    file = folder / "growth.json"
    if not file.is_file():
        return None
    record = read_json(file)
    plan = Plan.from_json(record, str(file))
    if not len(plan) == len(plan.layer_map) == config.num_hidden_layers:
        raise DataError(
            f"{file}: is about {len(plan)} layers, config.json about {config.num_hidden_layers}: mend or remove it"
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
        MissingInputError, DataError: see ``open_checkpoint``; DataError too if layers differ in dtype.
    """
    import jax

    from tli_jax.checkpoint import hub

    checkpoint = open_checkpoint(hub.resolve(model, revision))
    config, layers = checkpoint.config, range(checkpoint.config.num_hidden_layers)
    flat = {name: checkpoint.stored(name) for name in config.outer_tensors}
    flat |= {f"layers.{name}": checkpoint.stored(name, layers) for name in config.layer_tensors}
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, nest(dict.fromkeys(flat, 0)))

    leaves = {name: load_array(stored, name, pick(shardings, name), dtype) for name, stored in flat.items()}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=np.dtype(dtype).name)
    return config, nest(leaves)


def load_array(
    stored: Stored, name: str, sharding: "jax.sharding.Sharding | None" = None, dtype: Any = None
) -> "jax.Array":
    """One array from its tensors.

    Each device's share is read from disk by itself: nothing is whole anywhere that is not meant to be.

    Raises:
        DataError: the tensors differ in dtype, or a file has become shorter.
    """
    import jax

    dtypes = {tensor.dtype for tensor in stored.tensors}
    if len(dtypes) > 1:
        raise DataError(
            f"{stored.tensors[0].file.parent}: {name} has dtypes {', '.join(sorted(dtypes))} in different layers,"
            " one is needed to stack"
        )
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
