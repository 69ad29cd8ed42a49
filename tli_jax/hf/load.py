"""Load a Hugging Face folder as layer-stacked params, on one device or sharded."""

import concurrent.futures
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tli_jax.hf.checkpoint import TensorStack, open_checkpoint
from tli_jax.hf.shards import OutputTensor
from tli_jax.hf.tensors import read_rows
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest, pick

if TYPE_CHECKING:
    import jax

    from tli_jax.distributed.spread import Spread

# Bytes that a process reads before they move to the devices, and that one thread reads at a time.
_GROUP, _PIECE = 2**28, 2**25
_THREADS = 4


def load_hf(
    model: Path | str, dtype: Any = None, shardings: Any = None, *, revision: str | None = None
) -> "tuple[LlamaConfig, dict[str, Any]]":
    """Load a Llama or Mixtral as layer-stacked params with Hugging Face's names.

    ``params["layers"]["mlp"]["up_proj"]["weight"]`` is ``[L, F, D]``: the tensors of all layers, stacked.

    Args:
        model: a folder, a GGUF file, a hub id, or ``"embedded"`` for the small base model in this package.
        dtype: dtype of all params; by default, the stored one.
        shardings: one ``jax.sharding.Sharding`` for all params, or a tree of them with the structure of the params.
            With ``NamedSharding``, the processes of the mesh must load together, and read each byte once. The default
            is the default device.
        revision: branch, tag or commit of a hub id.

    Returns:
        ``(config, params)``.

    Raises:
        MissingInputError: the model does not exist or is incomplete.
        UnavailableError: the hub does not answer.
        DataError: the folder is damaged or not supported, see ``open_checkpoint``.

    Warns:
        UserWarning: layers are stored in different dtypes and no dtype is given: the param is float32.

    Example::

        import jax.numpy as jnp
        import tli_jax

        config, params = tli_jax.load_hf("embedded", dtype=jnp.bfloat16)
        logits_BTV = tli_jax.forward(config, params, jnp.array([[1, 2, 3]]))
    """
    import jax

    from tli_jax.hf import hub

    checkpoint = open_checkpoint(hub.resolve(model, revision))
    config, layers = checkpoint.config, range(checkpoint.config.num_hidden_layers)
    stacks = {name: checkpoint.stack(name) for name in config.outer_tensors}
    stacks |= {f"layers.{name}": checkpoint.stack(name, layers) for name in config.layer_tensors}
    mixed = [name for name, stack in stacks.items() if stack.is_mixed] if dtype is None else []
    if mixed:
        warnings.warn(
            f"{checkpoint.folder}: {mixed[0]} is stored in different dtypes: it is loaded as float32", stacklevel=2
        )
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, nest(dict.fromkeys(stacks, 0)))
    chosen = {name: pick(shardings, name) for name in stacks}
    named = {name: one for name, one in chosen.items() if isinstance(one, jax.sharding.NamedSharding)}
    params = load_arrays({name: stacks[name] for name in named}, named, dict.fromkeys(named, dtype))
    params |= {name: load_array(stacks[name], dtype, chosen[name]) for name in stacks if name not in named}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=np.dtype(dtype).name)
    return config, nest(params)


def load_array(stack: TensorStack, dtype: Any = None, sharding: "jax.sharding.Sharding | None" = None) -> "jax.Array":
    """Load one array in ``dtype``, by default ``stack.dtype``. This process reads all of it."""
    import jax

    whole = np.empty(stack.shape, stack.dtype if dtype is None else dtype)
    _read(stack, [(tuple(slice(0, size) for size in stack.shape), whole)])
    return jax.device_put(whole, sharding)


def load_arrays(
    stacks: Mapping[str, TensorStack], shardings: "Mapping[str, jax.sharding.NamedSharding]", dtypes: Mapping[str, Any]
) -> "dict[str, jax.Array]":
    """Load sharded arrays. All processes of their mesh must call this together; each byte is read by one of them.

    A process holds ``_GROUP`` bytes at a time, or its share of one layer's tensor if that is more. Arrays smaller than
    that are resharded together, because each program takes time to compile.

    Args:
        dtypes: of the arrays; None is the dtype of the stack.
    """
    from tli_jax.distributed.spread import Spread, reshard

    arrays: dict[str, jax.Array] = {}
    waiting: dict[str, Spread] = {}
    size = 0

    def finish() -> None:
        nonlocal waiting, size
        arrays.update(reshard({name: arrays[name] for name in waiting}, waiting))
        waiting, size = {}, 0

    for name, stack in stacks.items():
        dtype = np.dtype(stack.dtype if dtypes[name] is None else dtypes[name])
        spread = Spread(shardings[name], stack.shape, len(stack.leading))
        share = math.prod(stack.shape) * dtype.itemsize // spread.processes
        if share > _GROUP and _has_groups(spread):
            arrays[name] = _load_groups(stack, spread, dtype, -(-share // _GROUP))
            continue
        if size + share > _GROUP:
            finish()
        arrays[name] = _read_spread(stack, spread, dtype)
        waiting[name], size = spread, size + share
    finish()
    return arrays


def _has_groups(spread: "Spread") -> bool:
    """Whether an array can be loaded in groups of layers, and whether that saves memory."""
    # On CPUs, what is read is not copied, unless it has to move.
    is_kept = spread.is_direct and next(iter(spread.sharding.device_set)).platform == "cpu"
    return spread.has_layers and not is_kept


def _load_groups(stack: TensorStack, spread: "Spread", dtype: np.dtype, groups: int) -> "jax.Array":
    from tli_jax.distributed.spread import empty, insert

    L, *others = stack.leading
    size = -(-L // min(groups, L))
    array = empty(spread.sharding, stack.shape, dtype)()
    for start in range(0, L, size):
        layers = min(size, L - start)
        first, last = (layer * math.prod(others) for layer in (start, start + layers))
        group = TensorStack(stack.tensors[first:last], (layers, *others))
        part = dataclasses.replace(spread, shape=group.shape)
        array = insert(part)(array, _read_spread(group, part, dtype), np.int32(start))
        array.block_until_ready()  # or groups would queue up in host memory
    return array


def _read_spread(stack: TensorStack, spread: "Spread", dtype: np.dtype) -> "jax.Array":
    """Read the rows of the devices of this process."""
    import jax

    shape, sharding = spread.read_shape, spread.read_sharding
    indices = sharding.addressable_devices_indices_map(shape)
    shards = []
    for device, index in indices.items():
        assert index is not None
        ranges = [slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True)]
        shards.append((device, ranges, np.empty([one.stop - one.start for one in ranges], dtype)))
    _read(stack, [(ranges, out) for _, ranges, out in shards])
    arrays = [jax.device_put(out, device) for device, _, out in shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(stack: TensorStack, parts: Sequence[tuple[Sequence[slice], np.ndarray]]) -> None:
    """Fill arrays with parts of a stack, each given by one range per dim; later dims than the rows are complete."""
    dim = len(stack.leading)
    pieces = []
    for source, position in zip(stack.tensors, np.ndindex(*stack.leading), strict=True):
        tensor = source.copy_of or source if isinstance(source, OutputTensor) else source
        made = None
        for ranges, out in parts:
            place = tuple(at - one.start for at, one in zip(position, ranges, strict=False))
            if not all(0 <= at < size for at, size in zip(place, out.shape, strict=False)):
                continue
            rows = out[place][: max(0, tensor.shape[0] - ranges[dim].start)]  # the others are padding
            if isinstance(tensor, OutputTensor) and len(rows):
                made = tensor.to_array() if made is None else made
                rows[...] = made[ranges[dim].start :][: len(rows)]
                continue
            step = max(1, _PIECE * len(rows) // max(1, rows.nbytes))
            pieces += [(tensor, ranges[dim].start + at, rows[at : at + step]) for at in range(0, len(rows), step)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda piece: read_rows(*piece), pieces))
