"""What each layer of a base does to the hidden states, and how large its weights are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tli_jax.models.llama import Params
from tli_jax.verify.scan import Scanner, base_steps


def layer_facts(scanner: Scanner) -> dict[str, list[float]]:
    """Facts of each layer, on the tokens of a scanner.

    Returns:
        ``cosine`` of the hidden states before and after the layer, and ``change``, the norm of their difference over
        the norm before, both as means over tokens; and ``weight_norm``, the Frobenius norm of all weights together.
    """
    x_BTD, cosines, changes = scanner.embedded_BTD, [], []
    for step in base_steps(scanner.config.num_hidden_layers):
        after_BTD = scanner.run([step], x_BTD)
        cosine, change = _compare(x_BTD, after_BTD, scanner.tokens_BT)
        cosines.append(float(cosine))
        changes.append(float(change))
        x_BTD = after_BTD
    return {"cosine": cosines, "change": changes, "weight_norm": _weight_norms(scanner.params["layers"]).tolist()}


@jax.jit
def _compare(x_BTD: jax.Array, y_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    cosine_BT = (x_BTD * y_BTD).sum(-1) / (norm(x_BTD) * norm(y_BTD))
    is_token = tokens_BT[:, :-1] >= 0
    return cosine_BT.mean(where=is_token), (norm(y_BTD - x_BTD) / norm(x_BTD)).mean(where=is_token)


@jax.jit
def _weight_norms(layers: Params) -> Any:
    squares = [jnp.square(leaf.astype(jnp.float32)).sum(range(1, leaf.ndim)) for leaf in jax.tree.leaves(layers)]
    return jnp.sqrt(sum(squares))
