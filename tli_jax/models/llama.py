"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) as Flax NNX modules that are plain pytrees.

The parameter tree is the Hugging Face name table: ``params["layers"]["self_attn"]["q_proj"]["weight"]`` holds
``model.layers.*.self_attn.q_proj.weight`` of all layers, stacked in front. No depth is stored anywhere: it is the
leading size of the leaves under ``layers``.

Training may give the layers as a grouped stack instead: a list of segments, each a list of stacks with the leaves
``[periods, layers, …]``. A segment runs period by period, and in each of them its stacks in order.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tli_jax.models.attention import AttentionFn, AttentionImpl, attention, causal, rotary_tables, rotate
from tli_jax.models.config import LlamaConfig
from tli_jax.models.moe import ExpertDispatch, Experts, every_expert
from tli_jax.models.tree import nest

Params = dict[str, Any]


Remat = Literal["none", "dots", "full"]
_REMAT: dict[Remat, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}


class Rope(NamedTuple):
    """What a block needs to know of positions: cosines and sines ``[T, h]``, and who attends to whom."""

    cos: jax.Array
    sin: jax.Array
    attend: AttentionFn


class ForwardOptions(NamedTuple):
    """How a model is run: nothing here changes the mathematics.

    Args:
        dtype: of activations and matrix products; that of the embedding by default. Norms, softmax and loss are fp32.
        remat: what the backward pass computes again: nothing, all but the products with weights, or all of a layer.
        kernel: the attention kernel.
        dispatch: how experts are run.
        place: pins an array, whose dims are spelled by letters, to its place on a mesh.
    """

    dtype: Any = None
    remat: Remat = "none"
    attention_impl: AttentionImpl = causal
    dispatch: ExpertDispatch = every_expert
    constrain: Callable[[jax.Array, str], jax.Array] = lambda x, dims: x


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
        return jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * (x32 * scale).astype(x.dtype)


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
        out_BTHh = rope.attend(q_BTHh, k_BSKh, v_BSKh)
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
        if config.num_experts:
            self.block_sparse_moe = Experts(config.experts_per_token, params["block_sparse_moe"])
        else:
            self.mlp = MLP(params["mlp"])
        self.has_experts = config.num_experts > 0

    def __call__(
        self, x_BTD: jax.Array, rope: Rope, cache: Cache | None = None, dispatch: ExpertDispatch = every_expert
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
        """What leaves the layer, its keys and values, and how unevenly its experts were used, if it has any."""
        attended, kv = self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        x_BTD = x_BTD + attended
        inside = self.post_attention_layernorm(x_BTD)
        out, balance = self.block_sparse_moe(inside, dispatch) if self.has_experts else (self.mlp(inside), None)
        return x_BTD + out, kv, balance


class Llama(nnx.Module):
    """The whole model, dense or with experts, over layer-stacked params. ``lm_head`` is None when the head is tied to
    the embedding."""

    def __init__(self, config: LlamaConfig, params: Mapping[str, Any]):
        self.config = config
        self.embed_tokens = Linear(params["embed_tokens"]["weight"])
        layers = params["layers"]
        is_flat = isinstance(layers, Mapping)
        self.layers = nnx.data(
            Block(config, layers) if is_flat else [[Block(config, s) for s in segment] for segment in layers]
        )
        self.norm = RMSNorm(params["norm"]["weight"], config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(params["lm_head"]["weight"])

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        segments_BT: jax.Array | None = None,
        options: ForwardOptions = ForwardOptions(),  # noqa: B008
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        """Hidden states after the final norm, ``[B, T, D]``; the cache with these tokens in it; and how unevenly the
        experts were used, the mean over the layers, 0 without experts or with a cache."""
        T = tokens_BT.shape[1]
        embedding_VD = self.embed_tokens.weight[...]
        # Placed as it is used, not as it is stored: the compiler would bring the looked-up rows together instead.
        embedding_VD = options.constrain(embedding_VD.astype(options.dtype or embedding_VD.dtype), "VD")
        x_BTD = options.constrain(embedding_VD[tokens_BT], "BTD")
        rope = make_rope(self.config, T, x_BTD.dtype, cache)
        if cache is None:
            x_BTD, balance = self._through(x_BTD, rope._replace(attend=options.attention_impl(T, segments_BT)), options)
            return self.norm(x_BTD), None, balance

        def body(x: jax.Array, layer: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, (k, v) = layer
            return block(x, rope, Cache(k, v, cache.length))[:2]

        layers: Any = self.layers
        x_BTD, (k, v) = jax.lax.scan(body, x_BTD, (layers, (cache.k, cache.v)))
        return self.norm(x_BTD), Cache(k, v, cache.length + T), jnp.zeros(())

    def _through(self, x_BTD: jax.Array, rope: Rope, options: ForwardOptions) -> tuple[jax.Array, jax.Array]:
        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, jax.Array | None]:
            x, _, balance = block(x, rope, dispatch=options.dispatch)
            return options.constrain(x, "BTD"), balance

        def stack(x: jax.Array, blocks: Block) -> tuple[jax.Array, jax.Array | None]:
            return jax.lax.scan(_REMAT[options.remat](layer), x, blocks)

        def period(x: jax.Array, stacks: list[Block]) -> tuple[jax.Array, list[jax.Array | None]]:
            found = []
            for blocks in stacks:
                x, balance = stack(x, blocks)
                found.append(balance)
            return x, found

        found: list[Any] = []
        if isinstance(self.layers, Block):
            x_BTD, balance = stack(x_BTD, self.layers)
            found.append(balance)
        else:
            for segment in self.layers:
                x_BTD, balances = jax.lax.scan(period, x_BTD, segment)
                found.append(balances)
        values = [value.ravel() for value in jax.tree.leaves(found)]
        return x_BTD, jnp.concatenate(values).mean() if values else jnp.zeros(())

    @property
    def head(self) -> Linear:
        """Logits ``[B, T, V]`` from hidden states."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def __call__(self, tokens_BT: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        x_BTD, cache, _ = self.hidden(tokens_BT, cache)
        return self.head(x_BTD), cache


def make_rope(config: LlamaConfig, T: int, dtype: jnp.dtype, cache: Cache | None = None) -> Rope:
    """Positions and causal mask of T new tokens, after what the cache holds."""
    start = 0 if cache is None else cache.length
    positions_T = start + jnp.arange(T)
    keys_S = jnp.arange(T if cache is None else cache.k.shape[2])
    mask_TS = keys_S[None] <= positions_T[:, None]
    return Rope(*rotary_tables(config, positions_T, dtype), attend=jax.tree_util.Partial(attention, mask=mask_TS))


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
    tensors |= {f"layers.{n}": (config.num_hidden_layers, *config.shape(d)) for n, d in config.layer_tensors.items()}
    vectors = {name for name in tensors if "norm" in name}
    flat = {
        name: jnp.ones(shape, dtype)
        if name in vectors
        else (jax.random.normal(jax.random.fold_in(key, i), shape) * config.initializer_range).astype(dtype)
        for i, (name, shape) in enumerate(sorted(tensors.items()))
    }
    return nest(flat)
