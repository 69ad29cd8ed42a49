"""Next-token cross-entropy in chunks, so that the logits of a complete batch never exist."""

import functools

import jax
import jax.numpy as jnp

from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama, Params

# Logits per chunk by default: 256 MiB in fp32, whatever the vocabulary.
LOGITS = 2**26


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
    """Cross-entropy of each token given those before it.

    Args:
        tokens_BT: int token ids ``[B, T]``; -1 is padding.
        chunk: positions per chunk, counted over the whole batch. By default, a chunk has at most ``LOGITS`` logits, so
            that memory depends on neither B, T nor V.
        segments_BT: the document of each token; None if there is a single one.

    Returns:
        The losses in nats, fp32 ``[B, T-1]``; the log of the softmax denominators, for a z-loss, fp32 ``[B, T-1]``; and
        the load-balancing loss of experts. The first two are 0 where ``next_tokens`` is -1.
    """
    inputs_BT, targets_BT = jnp.maximum(tokens_BT[:, :-1], 0), next_tokens(tokens_BT, segments_BT)
    segments_BT = None if segments_BT is None else segments_BT[:, :-1]
    x_BTD, _, balance_loss = model.hidden(inputs_BT, None, segments_BT, options)
    B, T, D = x_BTD.shape
    # Split along T, so that every device has a share of every chunk.
    C = min(T, max(1, (chunk or LOGITS // model.config.vocab_size) // B))
    pad = -T % C
    x_NBCD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D).swapaxes(0, 1)
    targets_NBC = jnp.pad(targets_BT, ((0, 0), (0, pad)), constant_values=-1).reshape(B, -1, C).swapaxes(0, 1)
    head_VD = options.constrain(model.head_weight[...].astype(x_BTD.dtype), "VD")

    @jax.checkpoint
    def chunk_losses(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = options.constrain(inputs[0], "BTD"), inputs[1]
        logits_BCV = jnp.einsum("...d,vd->...v", x_BCD, head_VD, preferred_element_type=jnp.float32)
        logits_BCV = options.constrain(logits_BCV, "BTV")
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A gather would all-gather the logits if the vocabulary is sharded.
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == targets_BC[..., None]
        target_logits_BC = jnp.sum(jnp.where(is_target, logits_BCV, 0.0), axis=-1)
        has_target = targets_BC >= 0
        return jnp.where(has_target, log_z_BC - target_logits_BC, 0.0), jnp.where(has_target, log_z_BC, 0.0)

    losses_NBC, log_z_NBC = jax.lax.map(chunk_losses, (x_NBCD, targets_NBC))
    losses_BT, log_z_BT = (y.swapaxes(0, 1).reshape(B, -1)[:, :T] for y in (losses_NBC, log_z_NBC))
    return losses_BT, log_z_BT, balance_loss


@functools.partial(jax.jit, static_argnums=0)
def losses(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Cross-entropy of each token given those before it, in nats: int ``[B, T]`` -> fp32 ``[B, T-1]``.

    Example:
        >>> config, params = tli_jax.load_hf("embedded")
        >>> tli_jax.losses(config, params, tokens_BT).mean()
    """
    return token_losses(Llama.from_params(config, params), tokens_BT)[0]
