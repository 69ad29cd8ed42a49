"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) as Flax NNX modules that are plain pytrees.

The parameter tree is the Hugging Face name table: ``params["layers"]["self_attn"]["q_proj"]["weight"]`` holds
``model.layers.*.self_attn.q_proj.weight`` of all layers, stacked in front. No depth is stored anywhere: it is the
leading size of the leaves under ``layers``.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tli_jax.models.attention import attention, rotary_tables, rotate
from tli_jax.models.config import LAYER_TENSORS, LlamaConfig
from tli_jax.models.tree import nest

Params = dict[str, Any]


class Rope(NamedTuple):
    """What a block needs to know of positions: cosines and sines ``[T, h]`` and the attention mask ``[T, S]``."""

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array


class Cache(NamedTuple):
    """Keys and values seen so far, ``[L, B, S, K, h]`` each, and how many of the S slots are filled."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


class Linear(nnx.Module):
    """``x [..., in] -> [..., out]`` with a weight ``[out, in]``, as Hugging Face stores it."""

    def __init__(self, weight: jax.Array):
        self.weight = nnx.Param(weight)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * (x32 * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: LlamaConfig, params: Mapping[str, Any]):
        self.head_dim = config.head_dim
        self.q_proj = Linear(params["q_proj"]["weight"])
        self.k_proj = Linear(params["k_proj"]["weight"])
        self.v_proj = Linear(params["v_proj"]["weight"])
        self.o_proj = Linear(params["o_proj"]["weight"])

    def __call__(
        self, x_BTD: jax.Array, rope: Rope, cache: Cache | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], -1, self.head_dim)

        q_BTHh = rotate(heads(self.q_proj(x_BTD)), rope.cos, rope.sin)
        k_BSKh = rotate(heads(self.k_proj(x_BTD)), rope.cos, rope.sin)
        v_BSKh = heads(self.v_proj(x_BTD))
        if cache is not None:
            at = (0, cache.length, 0, 0)
            k_BSKh = jax.lax.dynamic_update_slice(cache.k, k_BSKh, at)
            v_BSKh = jax.lax.dynamic_update_slice(cache.v, v_BSKh, at)
        out_BTHh = attention(q_BTHh, k_BSKh, v_BSKh, rope.mask)
        return self.o_proj(out_BTHh.reshape(*x_BTD.shape[:2], -1)), (k_BSKh, v_BSKh)


class MLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, params: Mapping[str, Any]):
        self.gate_proj = Linear(params["gate_proj"]["weight"])
        self.up_proj = Linear(params["up_proj"]["weight"])
        self.down_proj = Linear(params["down_proj"]["weight"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One decoder layer; with stacked leaves, all of them, to be scanned."""

    def __init__(self, config: LlamaConfig, params: Mapping[str, Any]):
        self.input_layernorm = RMSNorm(params["input_layernorm"]["weight"], config.rms_norm_eps)
        self.self_attn = Attention(config, params["self_attn"])
        self.post_attention_layernorm = RMSNorm(params["post_attention_layernorm"]["weight"], config.rms_norm_eps)
        self.mlp = MLP(params["mlp"])

    def __call__(
        self, x_BTD: jax.Array, rope: Rope, cache: Cache | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        attended, kv = self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), kv


class Llama(nnx.Module):
    """The whole model over layer-stacked params. ``lm_head`` is None when the head is tied to the embedding."""

    def __init__(self, config: LlamaConfig, params: Mapping[str, Any]):
        self.config = config
        self.embed_tokens = Linear(params["embed_tokens"]["weight"])
        self.layers = Block(config, params["layers"])
        self.norm = RMSNorm(params["norm"]["weight"], config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(params["lm_head"]["weight"])

    def hidden(
        self, tokens_BT: jax.Array, cache: Cache | None = None, remat: bool = False
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, ``[B, T, D]``, and the cache with these tokens in it."""
        T = tokens_BT.shape[1]
        x_BTD = self.embed_tokens.weight[...][tokens_BT]
        rope = make_rope(self.config, T, x_BTD.dtype, cache)

        def body(x: jax.Array, layer: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, kv = layer
            x, kv = block(x, rope, None if cache is None else Cache(kv[0], kv[1], cache.length))
            return x, None if cache is None else kv

        kv = None if cache is None else (cache.k, cache.v)
        x_BTD, kv = jax.lax.scan(jax.checkpoint(body) if remat else body, x_BTD, (self.layers, kv))
        new_cache = None if cache is None else Cache(kv[0], kv[1], cache.length + T)
        return self.norm(x_BTD), new_cache

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits ``[B, T, V]`` from hidden states."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)(x_BTD)

    def __call__(self, tokens_BT: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        x_BTD, cache = self.hidden(tokens_BT, cache)
        return self.head(x_BTD), cache


def make_rope(config: LlamaConfig, T: int, dtype: jnp.dtype, cache: Cache | None = None) -> Rope:
    """Positions and causal mask of T new tokens, after what the cache holds."""
    start = 0 if cache is None else cache.length
    positions_T = start + jnp.arange(T)
    keys_S = jnp.arange(T if cache is None else cache.k.shape[2])
    return Rope(*rotary_tables(config, positions_T, dtype), mask=keys_S[None] <= positions_T[:, None])


def make_cache(config: LlamaConfig, params: Params, batch: int, slots: int) -> Cache:
    """An empty cache for ``params``: the depth is that of the params, not of the config."""
    k_proj = params["layers"]["self_attn"]["k_proj"]["weight"]
    shape = (k_proj.shape[0], batch, slots, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape, k_proj.dtype), jnp.zeros(shape, k_proj.dtype), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def forward(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Logits ``[B, T, V]`` of token ids ``[B, T]``, in the dtype of the params; as deep as the params are."""
    return Llama(config, params)(tokens_BT)[0]


def init_params(config: LlamaConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Fresh layer-stacked params: matrices from N(0, initializer_range), norms one. Made for ``jit``/``eval_shape``."""
    tensors = {name: config.shape(dims) for name, dims in config.outer_tensors.items()}
    tensors |= {f"layers.{n}": (config.num_hidden_layers, *config.shape(d)) for n, d in LAYER_TENSORS.items()}
    vectors = {name for name in tensors if "norm" in name}
    flat = {
        name: jnp.ones(shape, dtype)
        if name in vectors
        else (jax.random.normal(jax.random.fold_in(key, i), shape) * config.initializer_range).astype(dtype)
        for i, (name, shape) in enumerate(sorted(tensors.items()))
    }
    return nest(flat)
