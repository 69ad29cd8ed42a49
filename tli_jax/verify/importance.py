"""How important each layer is for a text: Σ|θ·∂loss/∂θ| over its parameters (ADEPT, arXiv 2510.10071).

Forward and backward pass read one layer at a time from disk. Memory holds that layer and its gradient in fp32, and the
hidden states before every layer.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.hf import hub
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.config import LlamaConfig
from tli_jax.models.precision import fp32_einsum
from tli_jax.verify.layers import embed, head_name, normalise, read_layer, run_layer

TOKENS = 2048  # of the text, at most


def measure_importance(
    model: Path | str | Checkpoint, tokens_BT: np.ndarray, on_layer: Callable[[], object] = lambda: None
) -> list[float]:
    """The importance of each layer in nats: to first order, the sum of how far the mean loss would move if each of its
    parameters were set to zero.

    Args:
        model: a folder, a hub id, ``"embedded"``, or a checkpoint from ``open_checkpoint``.
        tokens_BT: token ids of the text, at least two a row.
        on_layer: called twice for every layer.

    Raises:
        TliError: the model cannot be opened, see ``load_hf``.

    Example::

        importance = tli_jax.measure_importance("embedded", np.arange(64).reshape(2, 32))
        plan = tli_jax.adept(len(importance), importance=importance)
    """
    base = model if isinstance(model, Checkpoint) else open_checkpoint(hub.resolve(model))
    config, layers = base.config, range(base.config.num_hidden_layers)
    x = embed(base, tokens_BT).astype(jnp.float32)
    inputs = []
    for layer in layers:
        inputs.append(x)
        # Wait before the next layer is read: layers must not queue up in memory.
        x = run_layer(config, read_layer(base, layer, jnp.float32), x).block_until_ready()
        on_layer()
    norm_D = jnp.asarray(read_tensor(base.tensors["model.norm.weight"]), jnp.float32)
    head_VD = jnp.asarray(read_tensor(base.tensors[head_name(config)]))
    gradient = _head_gradient(config.rms_norm_eps, norm_D, head_VD, x, jnp.asarray(tokens_BT))
    del head_VD
    importance = []
    for layer in reversed(layers):
        params = read_layer(base, layer, jnp.float32)
        value, gradient = jax.block_until_ready(_layer_importance(config, params, inputs.pop(), gradient))
        importance.append(float(value))
        on_layer()
    return importance[::-1]


@functools.partial(jax.jit, static_argnums=0)
def _head_gradient(
    eps: float, norm_D: jax.Array, head_VD: jax.Array, x_BTD: jax.Array, tokens_BT: jax.Array
) -> jax.Array:
    """The gradient of the mean loss with respect to the output of the last layer."""

    @jax.checkpoint
    def row_loss(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        h_TD, tokens_T = normalise(eps, norm_D, row[0]), row[1]
        # Precise also for a bf16 head, as the gradients are products of fp32 arrays.
        logits_TV = fp32_einsum(jnp.float32)("td,vd->tv", h_TD[:-1].astype(head_VD.dtype), head_VD)
        picked_T = jnp.take_along_axis(logits_TV, tokens_T[1:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits_TV, axis=1) - picked_T).mean()

    return jax.grad(lambda x: jax.lax.map(row_loss, (x, tokens_BT)).mean())(x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _layer_importance(config: LlamaConfig, params: dict[str, Any], x_BTD: jax.Array, gradient: jax.Array) -> Any:
    """The importance of a layer, and the gradient with respect to its input."""
    _, backward = jax.vjp(lambda params, x: run_layer(config, params, x), params, x_BTD)
    params_gradient, x_gradient = backward(gradient)
    products = jax.tree.map(lambda value, slope: jnp.abs(value * slope).sum(), params, params_gradient)
    return sum(jax.tree.leaves(products)), x_gradient
