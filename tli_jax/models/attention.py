"""Rotary position embedding and grouped-query attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.models.config import LlamaConfig

# q [B, T, H, h], k and v [B, S, K, h] -> [B, T, H, h].
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# T and which document of its sequence each token belongs to, [B, T] or None for one document -> causal attention.
AttentionImpl = Callable[[int, jax.Array | None], AttentionFn]


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies of the rotary embedding, radians per position, fp32 ``[h/2]``.

    ``default`` is RoFormer's (arXiv 2104.09864), ``linear`` divides every frequency by the factor, ``llama3`` keeps
    high frequencies, divides low ones and interpolates between, as Llama 3.1 does. Computed in fp64, rounded once.

    Raises:
        DataError: the RoPE type is not one of these.
    """
    config.check_runnable()
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    factors = dict(config.rope_factors)
    if config.rope_type == "linear":
        frequencies = frequencies / factors["factor"]
    elif config.rope_type == "llama3":
        low, high = factors["low_freq_factor"], factors["high_freq_factor"]
        turns = factors["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - kept) * frequencies / factors["factor"] + kept * frequencies
    return frequencies.astype(np.float32)


def rotary_tables(config: LlamaConfig, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for ``positions [T]``, both ``[T, h]``; angles in fp32, rounded to ``dtype``."""
    angles_Tx = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    angles_Th = jnp.concatenate([angles_Tx, angles_Tx], axis=-1)
    return jnp.cos(angles_Th).astype(dtype), jnp.sin(angles_Th).astype(dtype)


def rotate(x_BTNh: jax.Array, cos_Th: jax.Array, sin_Th: jax.Array) -> jax.Array:
    """Apply the rotary embedding in the rotate-half layout, the one Hugging Face stores q and k in."""
    first, second = jnp.split(x_BTNh, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x_BTNh * cos_Th[:, None] + turned * sin_Th[:, None]


def attention(q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in fp32, under a mask ``[T, S]`` or ``[B, T, S]``. Returns ``[B, T, H, h]``."""
    mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, mask=mask, implementation="xla")


def causal(T: int, segments_BT: jax.Array | None) -> AttentionFn:
    """Causal attention by ``attention``: runs everywhere, within documents where ``segments_BT`` numbers them."""
    positions_T = jnp.arange(T)
    mask = positions_T[None] <= positions_T[:, None]
    if segments_BT is not None:
        mask = mask & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return jax.tree_util.Partial(attention, mask=mask)
