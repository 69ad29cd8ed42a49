"""Run a model on disk one layer at a time: memory holds the tensors of one layer, whatever the depth."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.load import load_array
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.attention import causal, make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Block
from tli_jax.models.modules import RMSNorm
from tli_jax.models.tree import nest


def read_layer(checkpoint: Checkpoint, layer: int, dtype: Any = None) -> dict[str, Any]:
    """The params of one layer, in the stored dtype or another."""
    # Moved to the device one by one, so only one tensor is held twice.
    return nest(
        {name: load_array(checkpoint.stack(name, [layer]), dtype=dtype)[0] for name in checkpoint.config.layer_tensors}
    )


def embed(checkpoint: Checkpoint, tokens_BT: np.ndarray) -> jax.Array:
    """Hidden states before the first layer, ``[B, T, D]`` in the stored dtype. Reads only the rows it needs."""
    table = checkpoint.tensors["model.embed_tokens.weight"]
    used, inverse = np.unique(tokens_BT, return_inverse=True)
    rows = np.concatenate([read_tensor(table, slice(token, token + 1)) for token in used.tolist()])
    return jnp.asarray(rows[inverse.reshape(tokens_BT.shape)])


@functools.partial(jax.jit, static_argnums=0)
def run_layer(config: LlamaConfig, params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """Run one layer. All layers of all models go through this one compiled program."""
    T = x_BTD.shape[1]
    rope = make_rope(config, T, x_BTD.dtype)._replace(attend=causal(T, None))
    return Block.from_params(config, params)(x_BTD, rope=rope)[0]


def head_name(config: LlamaConfig) -> str:
    """The name of the tensor that computes the logits."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


@functools.partial(jax.jit, static_argnums=0)
def normalise(eps: float, weight_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """Apply the final norm."""
    return RMSNorm.from_params({"weight": weight_D}, eps)(x_BTD)
