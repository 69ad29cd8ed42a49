"""Next-token cross-entropy of a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tli_jax.models.config import LlamaConfig
from tli_jax.models.cross_entropy import objective, token_cross_entropy
from tli_jax.models.llama import ForwardOptions, Llama, Params


def next_tokens(tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """Targets of all positions but the last, int ``[B, T-1]``. -1 is no target: in padding, and where the next token
    starts another document."""
    targets_BT = tokens_BT[:, 1:]
    if segments_BT is None:
        return targets_BT
    return jnp.where(segments_BT[:, 1:] == segments_BT[:, :-1], targets_BT, -1)


def token_losses(
    model: Llama,
    tokens_BT: jax.Array,
    chunk: int | None = None,
    segments_BT: jax.Array | None = None,
    options: ForwardOptions = ForwardOptions(),  # noqa: B008
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of each token given those before it. Its gradient computes the logits a second time.

    Args:
        tokens_BT: int token ids ``[B, T]``; -1 is padding.
        chunk: tokens whose logits are held at a time, on each device; see ``chunked_cross_entropy``.
        segments_BT: the document of each token; None if there is a single one.

    Returns:
        The losses in nats, fp32 ``[B, T-1]``; the log of the softmax denominators, for a z-loss, fp32 ``[B, T-1]``; and
        the load-balancing loss of experts. The first two are 0 where ``next_tokens`` is -1.
    """
    x_BTD, targets_BT, balance_loss = _hidden(model, tokens_BT, segments_BT, options)
    found: Any = token_cross_entropy(options.cross_entropy, chunk, x_BTD, model.head_weight[...], targets_BT)
    return *found, balance_loss


def summed_losses(
    model: Llama,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    z_loss: float = 0.0,
    options: ForwardOptions = ForwardOptions(),  # noqa: B008
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What training minimises, with the gradients of head and hidden states computed in the forward pass.

    Args: as in ``token_losses``.

    Returns:
        The sum over all tokens of the cross-entropy and of ``z_loss`` times the squared log-denominator; the summed
        cross-entropy alone, which carries no gradient; and the load-balancing loss of experts.
    """
    x_BTD, targets_BT, balance_loss = _hidden(model, tokens_BT, segments_BT, options)
    total, nats = objective(options.cross_entropy, z_loss, x_BTD, model.head_weight[...], targets_BT)
    return total, nats, balance_loss


def _hidden(
    model: Llama, tokens_BT: jax.Array, segments_BT: jax.Array | None, options: ForwardOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs_BT, targets_BT = jnp.maximum(tokens_BT[:, :-1], 0), next_tokens(tokens_BT, segments_BT)
    segments_BT = None if segments_BT is None else segments_BT[:, :-1]
    x_BTD, _, balance_loss = model.hidden(inputs_BT, None, segments_BT, options)
    return x_BTD, targets_BT, balance_loss


@functools.partial(jax.jit, static_argnums=0)
def losses(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Cross-entropy of each token given those before it, in nats: int ``[B, T]`` -> fp32 ``[B, T-1]``.

    Example:
        >>> config, params = tli_jax.load_hf("embedded")
        >>> tli_jax.losses(config, params, tokens_BT).mean()
    """
    return token_losses(Llama.from_params(config, params), tokens_BT)[0]
