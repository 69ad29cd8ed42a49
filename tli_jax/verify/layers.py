"""A model on disk run a layer at a time: only one layer's tensors are in memory, whatever the depth."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.hf.checkpoint import Checkpoint, load_array, read_tensor
from tli_jax.models.attention import make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Block
from tli_jax.models.modules import RMSNorm
from tli_jax.models.tree import nest


def read_layer(checkpoint: Checkpoint, layer: int, dtype: Any = None) -> dict[str, Any]:
    """The params of one layer, as stored or in another dtype."""
    # Moved to the device one by one, so that only one tensor is ever held twice.
    return nest(
        {name: load_array(checkpoint.stored(name, [layer]), dtype=dtype)[0] for name in checkpoint.config.layer_tensors}
    )


def embed(checkpoint: Checkpoint, tokens_BT: np.ndarray) -> jax.Array:
    """Hidden states before the first layer, ``[B, T, D]`` as stored; only the rows that are needed are read."""
    table = checkpoint.tensors["model.embed_tokens.weight"]
    used, inverse = np.unique(tokens_BT, return_inverse=True)
    rows = np.concatenate([read_tensor(table, slice(token, token + 1)) for token in used.tolist()])
    return jnp.asarray(rows[inverse.reshape(tokens_BT.shape)])


@functools.partial(jax.jit, static_argnums=0)
def run_layer(config: LlamaConfig, params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """One layer of whatever model: the one compiled program that all go through."""
    return Block.from_params(config, params)(x_BTD, rope=make_rope(config, x_BTD.shape[1], x_BTD.dtype))[0]


def head_name(config: LlamaConfig) -> str:
    """The tensor that makes logits."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


@functools.partial(jax.jit, static_argnums=0)
def normalise(eps: float, weight_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """The final norm."""
    return RMSNorm.from_params({"weight": weight_D}, eps)(x_BTD)
