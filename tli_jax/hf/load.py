"""Load a Hugging Face folder as layer-stacked params, on one device or sharded."""

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tli_jax.hf.checkpoint import TensorStack, open_checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest, pick

if TYPE_CHECKING:
    import jax


def load_hf(
    model: Path | str, dtype: Any = None, shardings: Any = None, *, revision: str | None = None
) -> "tuple[LlamaConfig, dict[str, Any]]":
    """Load a Llama or Mixtral as layer-stacked params with Hugging Face's names.

    ``params["layers"]["mlp"]["up_proj"]["weight"]`` is ``[L, F, D]``: the tensors of all layers, stacked.

    Args:
        model: a folder, a hub id, or ``"embedded"`` for the small base model in this package.
        dtype: dtype of all params; by default, the stored one.
        shardings: one ``jax.sharding.Sharding`` for all params, or a tree of them with the structure of the params.
            Each device reads its shard from disk. The default is the default device.
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
    params = {name: load_array(stack, pick(shardings, name), dtype) for name, stack in stacks.items()}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=np.dtype(dtype).name)
    return config, nest(params)


def load_array(stack: TensorStack, sharding: "jax.sharding.Sharding | None" = None, dtype: Any = None) -> "jax.Array":
    """Load one array in ``dtype``, by default ``stack.dtype``. Each device reads only its shard from disk."""
    import jax

    leading, shape = stack.leading, stack.shape
    target = np.dtype(dtype) if dtype is not None else stack.dtype

    def read(index: Any) -> np.ndarray:
        rows, *rest = index[len(leading) :]
        ranges = [range(*part.indices(size)) for part, size in zip(index, leading, strict=False)]
        out = np.empty([len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)], target)
        positions = itertools.product(*ranges)
        for at, position in zip(np.ndindex(*map(len, ranges)), positions, strict=True):
            number = int(np.ravel_multi_index(position, leading)) if leading else 0
            out[at] = read_tensor(stack.tensors[number], rows)[:, *rest]
        return out

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)
