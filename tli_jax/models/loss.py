"""Next-token cross-entropy without ever holding the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp

from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama, Params

# Logits that exist at a time, by default: 256 MiB in fp32, whatever the vocabulary.
LOGITS = 2**26


def next_tokens(tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """The target at each position but the last, int32 ``[B, T-1]``: the token after it; -1 where there is none, which
    is in padding and where that token starts another document."""
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
    """Cross-entropy of each token after the first, given those before it, in nats, fp32 ``[B, T-1]``; and the log of
    the softmax's denominator, likewise, for a z-loss. Both are 0 where ``next_tokens`` is -1. And the load-balancing
    loss of the experts, see ``Llama.hidden``.

    Args:
        chunk: positions that the head runs over at a time, counted over the whole batch; by default as many as keep
            the logits within ``LOGITS``, so that memory grows neither with B*T nor with V.
        segments_BT: the document of each token; None if there is only one.
    """
    inputs_BT, targets_BT = jnp.maximum(tokens_BT[:, :-1], 0), next_tokens(tokens_BT, segments_BT)
    x_BTD, _, balance = model.hidden(inputs_BT, None, None if segments_BT is None else segments_BT[:, :-1], options)
    B, T, D = x_BTD.shape
    # Cut along T, so that every device has a share of every chunk.
    C = min(T, max(1, (chunk or LOGITS // model.config.vocab_size) // B))
    pad = -T % C
    x_NBCD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D).swapaxes(0, 1)
    targets_NBC = jnp.pad(targets_BT, ((0, 0), (0, pad)), constant_values=-1).reshape(B, -1, C).swapaxes(0, 1)
    head_VD = options.constrain(model.head.weight[...].astype(x_BTD.dtype), "VD")

    @jax.checkpoint
    def one(chunk_of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = options.constrain(chunk_of[0], "BTD"), chunk_of[1]
        logits_BCV = jnp.einsum("...d,vd->...v", x_BCD, head_VD, preferred_element_type=jnp.float32)
        logits_BCV = options.constrain(logits_BCV, "BTV")
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # Not a gather: over a vocabulary that lies on several devices that would bring all logits together.
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(is_target, logits_BCV, 0.0), axis=-1)
        is_counted = targets_BC >= 0
        return jnp.where(is_counted, log_z_BC - picked_BC, 0.0), jnp.where(is_counted, log_z_BC, 0.0)

    losses_NBC, log_z_NBC = jax.lax.map(one, (x_NBCD, targets_NBC))
    losses_BT, log_z_BT = (y.swapaxes(0, 1).reshape(B, -1)[:, :T] for y in (losses_NBC, log_z_NBC))
    return losses_BT, log_z_BT, balance


@functools.partial(jax.jit, static_argnums=0)
def losses(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Cross-entropy of each token after the first, in nats, fp32 ``[B, T-1]``; as deep as the params are."""
    return token_losses(Llama(config, params), tokens_BT)[0]
