"""Next-token cross-entropy without ever holding the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp

from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama, Params


def token_losses(model: Llama, tokens_BT: jax.Array, chunk: int = 512, remat: bool = False) -> jax.Array:
    """Cross-entropy in nats, fp32 ``[B, T-1]``, of each token after the first, given those before it.

    The head runs over ``chunk`` positions at a time, so memory does not grow with B*T*V.
    """
    x_BTD, _ = model.hidden(tokens_BT[:, :-1], remat=remat)
    B, T, D = x_BTD.shape
    chunk = min(chunk, B * T)
    pad = -(B * T) % chunk
    x_NCD = jnp.pad(x_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, chunk, D)
    targets_NC = jnp.pad(tokens_BT[:, 1:].reshape(B * T), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def one(chunk_of: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_CD, targets_C = chunk_of
        logits_CV = model.head(x_CD).astype(jnp.float32)
        picked_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_CV, axis=-1) - picked_C

    return jax.lax.map(one, (x_NCD, targets_NC)).reshape(-1)[: B * T].reshape(B, T)


@functools.partial(jax.jit, static_argnums=0)
def losses(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """``token_losses`` of params that are not in a module."""
    return token_losses(Llama(config, params), tokens_BT)
