"""Rotary position embedding and grouped-query attention."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tli_jax.models.blockwise import blockwise_attention
from tli_jax.models.config import LlamaConfig
from tli_jax.models.modules import Linear, tensor_options

# Up to this T, the probabilities are kept for the backward pass: it is faster than computing them again.
_KEPT = 512

# q [B, T, H, h], k and v [B, S, K, h] -> [B, T, H, h].
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# T, and the document of each token, int [B, T], or None for a single document -> causal attention.
AttentionImpl = Callable[[int, jax.Array | None], AttentionFn]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedAttention:
    """Grouped-query attention with the softmax in fp32, under a boolean mask ``[T, S]`` or ``[B, T, S]``."""

    mask: jax.Array

    def __call__(self, q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array) -> jax.Array:
        mask = self.mask[None, None] if self.mask.ndim == 2 else self.mask[:, None]
        with jax.default_matmul_precision("highest" if q_BTHh.dtype == jnp.float32 else None):
            return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, mask=mask, implementation="xla")


class Rope(NamedTuple):
    """What attention needs to know about positions: cosines and sines ``[T, h]``, and the attention function."""

    cos: jax.Array
    sin: jax.Array
    attend: AttentionFn


class Cache(NamedTuple):
    """Keys and values of past tokens, ``[L, B, S, K, h]`` each, and how many of the S slots are in use."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv 2305.13245) with rotary positions."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
    ):
        self.head_dim = config.head_dim
        D, Hh, Kh = (config.sizes[dim] for dim in ("D", "Hh", "Kh"))
        options = tensor_options(config, rngs, param_dtype, stack)
        self.k_proj = Linear(D, Kh, **options("self_attn.k_proj"))
        self.o_proj = Linear(Hh, D, **options("self_attn.o_proj"))
        self.q_proj = Linear(D, Hh, **options("self_attn.q_proj"))
        self.v_proj = Linear(D, Kh, **options("self_attn.v_proj"))

    def __call__(
        self, x_BTD: jax.Array, *, rope: Rope, cache: Cache | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return the output ``[B, T, D]`` and all keys and values, ``[B, S, K, h]``.

        Args:
            cache: of this layer, ``[B, S, K, h]``.
        """
        q_BTHh, k_BSKh, v_BSKh = self.project(x_BTD, rope=rope)
        if cache is not None:
            at = (0, cache.length, 0, 0)
            k_BSKh = jax.lax.dynamic_update_slice(cache.k, k_BSKh, at)
            v_BSKh = jax.lax.dynamic_update_slice(cache.v, v_BSKh, at)
        return self.combine(rope.attend(q_BTHh, k_BSKh, v_BSKh)), (k_BSKh, v_BSKh)

    def project(self, x_BTD: jax.Array, *, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, H, h]``, keys and values ``[B, T, K, h]``."""

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], -1, self.head_dim)

        q_BTHh = rotate(heads(self.q_proj(x_BTD)), rope.cos, rope.sin)
        k_BTKh = rotate(heads(self.k_proj(x_BTD)), rope.cos, rope.sin)
        return q_BTHh, k_BTKh, heads(self.v_proj(x_BTD))

    def combine(self, out_BTHh: jax.Array) -> jax.Array:
        """``[B, T, D]`` from the outputs of all heads."""
        return self.o_proj(out_BTHh.reshape(*out_BTHh.shape[:2], -1))


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies of the rotary embedding in radians per position, fp32 ``[h/2]``.

    ``default`` is RoFormer (arXiv 2104.09864). ``linear`` divides all frequencies by ``factor``. ``llama3`` keeps high
    frequencies, divides low ones and interpolates in between, as in Llama 3.1. Computed in fp64 and rounded once.

    Raises:
        DataError: another RoPE type.
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
    """Cosines and sines for ``positions [T]``, both ``[T, h]``. Angles are fp32, the result is rounded to ``dtype``."""
    angles_Tx = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    angles_Th = jnp.concatenate([angles_Tx, angles_Tx], axis=-1)
    return jnp.cos(angles_Th).astype(dtype), jnp.sin(angles_Th).astype(dtype)


def rotate(x_BTNh: jax.Array, cos_Th: jax.Array, sin_Th: jax.Array) -> jax.Array:
    """Apply the rotary embedding in the rotate-half layout, which Hugging Face's q and k projections assume."""
    first, second = jnp.split(x_BTNh, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return x_BTNh * cos_Th[:, None] + rotated * sin_Th[:, None]


def query_block(platform: str) -> int:
    """Queries for which attention computes the scores at once. On a CPU, those of few queries stay in the cache."""
    return 128 if platform == "cpu" else 512


def causal(T: int, segments_BT: jax.Array | None, block: int | None = None) -> AttentionFn:
    """Causal attention on any platform, in blocks of queries that only read the keys up to their last query.

    Args:
        segments_BT: the document of each token, which attends only within it; None if there is a single one.
        block: queries at once, at most; None for the best on JAX's default device.
    """
    block = block or query_block(jax.default_backend())
    if T > _KEPT:
        return lambda q_BTHh, k_BTKh, v_BTKh: blockwise_attention(q_BTHh, k_BTKh, v_BTKh, segments_BT, block)
    positions_T = jnp.arange(T)
    mask = positions_T[None] <= positions_T[:, None]
    if segments_BT is not None:
        mask = mask & (segments_BT[:, :, None] == segments_BT[:, None, :])

    def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
        ends = [*range(block, T, block), T]
        blocks = [
            MaskedAttention(mask[..., start:end, :end])(q_BTHh[:, start:end], k_BTKh[:, :end], v_BTKh[:, :end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return jnp.concatenate(blocks, axis=1)

    return attend


def make_rope(config: LlamaConfig, T: int, dtype: jnp.dtype, cache: Cache | None = None) -> Rope:
    """Positions and causal mask of T new tokens that follow those in the cache."""
    start = 0 if cache is None else cache.length
    positions_T = start + jnp.arange(T)
    keys_S = jnp.arange(T if cache is None else cache.k.shape[2])
    mask_TS = keys_S[None] <= positions_T[:, None]
    return Rope(*rotary_tables(config, positions_T, dtype), attend=MaskedAttention(mask_TS))


def make_cache(config: LlamaConfig, params: dict[str, Any], batch: int, slots: int) -> Cache:
    """Return an empty cache for flat-stacked ``params``, in their dtype and of their depth."""
    k_proj = params["layers"]["self_attn"]["k_proj"]["weight"]
    shape = (k_proj.shape[0], batch, slots, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape, k_proj.dtype), jnp.zeros(shape, k_proj.dtype), jnp.zeros((), jnp.int32))
