"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) and Mixtral as Flax NNX modules.

Params are nested dicts named as Hugging Face names them: ``params["layers"]["self_attn"]["q_proj"]["weight"]`` holds
``model.layers.*.self_attn.q_proj.weight`` of all layers, stacked along a leading dim L. ``nnx.state(model)`` has the
same structure. The depth of a model is that of its params, whatever its config says.

For training, the layers can be a grouped stack instead: a list of segments, each a list of stacks whose leaves are
``[periods, layers, …]``. A segment runs period by period, and each period runs its stacks in order.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tli_jax.models.attention import Attention, AttentionImpl, Cache, Rope, causal, make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.cross_entropy import CrossEntropy, chunked_cross_entropy
from tli_jax.models.embedding import Lookup
from tli_jax.models.modules import Embed, Linear, RMSNorm, tensor_options, wrap_params
from tli_jax.models.moe import ExpertDispatch, MixtureOfExperts, every_expert

Params = dict[str, Any]

Remat = Literal["auto", "none", "dots", "attention", "full", "offload"]
_INPUT = "layer_input"
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
_POLICIES: dict[Remat, Callable[[Any], Any]] = {
    "dots": functools.partial(_checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "attention": _checkpoint,
    "full": _checkpoint,
    "offload": functools.partial(
        _checkpoint,
        policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


class ForwardOptions(NamedTuple):
    """How to run a model. No option changes the function it computes, up to rounding.

    Args:
        dtype: of activations and matrix products, by default that of the embedding. Norms, softmax and loss are fp32.
        remat: what the backward pass rematerializes. ``none``: nothing. ``dots``: everything but attention and the
            products with weights. ``attention``: everything but attention. ``full``: complete layers. ``offload``: the
            same, with the layers' inputs kept in the memory of the host. ``auto`` is for ``training.fit``, which
            replaces it; here it is ``none``.
        attention_impl: the attention kernel.
        dispatch: how experts are run.
        lookup: the embedding look-up and its gradient.
        cross_entropy: the cross-entropy that is fused with the head.
        constrain: shards an activation, given a letter for each of its dims.
    """

    dtype: Any = None
    remat: Remat = "none"
    attention_impl: AttentionImpl = causal
    dispatch: ExpertDispatch = every_expert
    lookup: Lookup = Lookup()
    cross_entropy: CrossEntropy = chunked_cross_entropy
    constrain: Callable[[jax.Array, str], jax.Array] = lambda x, dims: x


class MLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
    ):
        D, F = config.hidden_size, config.intermediate_size
        options = tensor_options(config, rngs, param_dtype, stack)
        self.down_proj = Linear(F, D, **options("mlp.down_proj"))
        self.gate_proj = Linear(D, F, **options("mlp.gate_proj"))
        self.up_proj = Linear(D, F, **options("mlp.up_proj"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """A decoder layer, or with ``stack`` several layers to scan over.

    Args:
        stack: leading dims of the params, ``(L,)`` or ``(periods, L)``.
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
    ):
        given = {"rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        options = tensor_options(config, **given)
        D, eps = config.hidden_size, config.rms_norm_eps
        if config.num_experts:
            self.block_sparse_moe = MixtureOfExperts(config, **given)
        self.input_layernorm = RMSNorm(D, eps=eps, **options("input_layernorm"))
        if not config.num_experts:
            self.mlp = MLP(config, **given)
        self.post_attention_layernorm = RMSNorm(D, eps=eps, **options("post_attention_layernorm"))
        self.self_attn = Attention(config, **given)
        self.has_experts = config.num_experts > 0

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any]) -> "Block":
        """Wrap the params of a layer, or of stacked layers, without copying them."""
        stack = params["input_layernorm"]["weight"].shape[:-1]
        return wrap_params(params, cls, config, stack=stack)

    def __call__(
        self, x_BTD: jax.Array, *, rope: Rope, cache: Cache | None = None, dispatch: ExpertDispatch = every_expert
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
        """Return the hidden states ``[B, T, D]``, keys and values, and the load-balancing loss of experts, if any."""
        attended, kv = self.self_attn(self.input_layernorm(x_BTD), rope=rope, cache=cache)
        x_BTD, balance_loss = self._feed_forward(x_BTD + attended, dispatch)
        return x_BTD, kv, balance_loss

    def run_rematerialized(
        self, x_BTD: jax.Array, *, rope: Rope, dispatch: ExpertDispatch, remat: Callable[[Any], Any]
    ) -> tuple[jax.Array, jax.Array | None]:
        """``__call__`` without a cache, with ``remat`` applied to what precedes attention and to what follows it.

        Attention stays outside, so that the arrays which it saves for its backward pass are never recomputed.
        """

        def before(block: Block, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return block.self_attn.project(block.input_layernorm(x_BTD), rope=rope)

        def after(block: Block, x_BTD: jax.Array, out_BTHh: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            return block._feed_forward(x_BTD + block.self_attn.combine(out_BTHh), dispatch)

        return remat(after)(self, x_BTD, rope.attend(*remat(before)(self, x_BTD)))

    def run_scaled(
        self, x_BTD: jax.Array, scale: jax.Array, *, rope: Rope, dispatch: ExpertDispatch = every_expert
    ) -> jax.Array:
        """``__call__`` without a cache, with both residual outputs times ``scale``, a scalar in the dtype of x."""
        x_BTD = x_BTD + scale * self.self_attn(self.input_layernorm(x_BTD), rope=rope)[0]
        return self._feed_forward(x_BTD, dispatch, scale)[0]

    def _feed_forward(
        self, x_BTD: jax.Array, dispatch: ExpertDispatch, scale: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        normed = self.post_attention_layernorm(x_BTD)
        out, balance_loss = self.block_sparse_moe(normed, dispatch) if self.has_experts else (self.mlp(normed), None)
        return x_BTD + (out if scale is None else scale * out), balance_loss


class Llama(nnx.Module):
    """A complete model, dense or with experts. It is a pytree: ``jax.jit``, ``jax.grad`` and ``inject`` take it as is.

    Args:
        rngs: matrices are sampled from N(0, ``initializer_range``), norms are one, as in ``init_params``.

    Example:
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> model = Llama.from_params(*tli_jax.load_hf("embedded"))
        >>> logits = model(tokens_BT)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        options = tensor_options(config, rngs, param_dtype)
        # In alphabetical order, because each takes the next key of rngs and seeded results depend on it.
        self.embed_tokens = Embed(V, D, **options("embed_tokens"))
        layers: Any = Block(config, rngs=rngs, param_dtype=param_dtype, stack=(config.num_hidden_layers,))
        self.layers = nnx.data(layers)
        self.lm_head = None if config.tie_word_embeddings else Linear(D, V, **options("lm_head"))
        self.norm = RMSNorm(D, eps=config.rms_norm_eps, **options("norm"))

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any]) -> "Llama":
        """Wrap existing params, of a flat or a grouped stack, without copying them. Also works under ``jit`` and on
        ``jax.ShapeDtypeStruct`` leaves.

        Args:
            params: as ``load_hf`` and ``init_params`` return them.
        """
        names = ["layers", *(name.split(".")[0] for name in config.outer_tensors)]
        params = {name: params[name] for name in names}
        layers, is_flat = params["layers"], isinstance(params["layers"], Mapping)
        model = wrap_params(params if is_flat else params | {"layers": layers[0][0]}, cls, config)
        if not is_flat:
            model.layers = nnx.data([[Block.from_params(config, stack) for stack in segment] for segment in layers])
        model.config = config  # equal configs can differ in their source
        return model

    @property
    def head_weight(self) -> nnx.Param[jax.Array]:
        """``[V, D]``, the embedding if the head is tied."""
        return (self.lm_head or self.embed_tokens).weight

    def logits(self, x: jax.Array) -> jax.Array:
        """``[..., V]`` from the hidden states ``[..., D]`` after the final norm."""
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits ``[B, T, V]``."""
        return self.logits(self.hidden(tokens_BT)[0])

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        segments_BT: jax.Array | None = None,
        options: ForwardOptions = ForwardOptions(),  # noqa: B008
    ) -> tuple[jax.Array, Cache | None, jax.Array]:
        """Return the hidden states after the final norm, the updated cache and the load-balancing loss.

        Args:
            cache: of the tokens before these; only for a flat stack. ``attention_impl``, ``dispatch`` and ``remat`` do
                not apply with a cache.
            segments_BT: the document of each token; None if there is a single one.

        Returns:
            ``[B, T, D]``; the cache, or None; the loss averaged over the layers, 0 without experts or with a cache.
        """
        T = tokens_BT.shape[1]
        x_BTD = options.constrain(self.embed_tokens(tokens_BT, options.dtype, options.lookup), "BTD")
        rope = make_rope(self.config, T, x_BTD.dtype, cache)
        if cache is None:
            rope = rope._replace(attend=options.attention_impl(T, segments_BT))
            x_BTD, balance_loss = self._run_layers(x_BTD, rope, options)
            return self.norm(x_BTD), None, balance_loss

        def body(x: jax.Array, layer: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, (k, v) = layer
            return block(x, rope=rope, cache=Cache(k, v, cache.length))[:2]

        layers: Any = self.layers
        x_BTD, (k, v) = jax.lax.scan(body, x_BTD, (layers, (cache.k, cache.v)))
        return self.norm(x_BTD), Cache(k, v, cache.length + T), jnp.zeros(())

    def _run_layers(self, x_BTD: jax.Array, rope: Rope, options: ForwardOptions) -> tuple[jax.Array, jax.Array]:
        remat = _POLICIES.get(options.remat, lambda function: function)
        is_whole = options.remat in ("full", "offload")

        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, jax.Array | None]:
            if is_whole:
                x, _, balance_loss = block(checkpoint_name(x, _INPUT), rope=rope, dispatch=options.dispatch)
            else:
                x, balance_loss = block.run_rematerialized(x, rope=rope, dispatch=options.dispatch, remat=remat)
            return options.constrain(x, "BTD"), balance_loss

        def stack(x: jax.Array, blocks: Block) -> tuple[jax.Array, jax.Array | None]:
            return jax.lax.scan(remat(layer) if is_whole else layer, x, blocks)

        def period(x: jax.Array, stacks: list[Block]) -> tuple[jax.Array, list[jax.Array | None]]:
            balance_losses = []
            for blocks in stacks:
                x, balance_loss = stack(x, blocks)
                balance_losses.append(balance_loss)
            return x, balance_losses

        balance_losses: list[Any] = []
        if isinstance(self.layers, Block):
            x_BTD, balance_loss = stack(x_BTD, self.layers)
            balance_losses.append(balance_loss)
        else:
            for segment in self.layers:
                x_BTD, of_segment = jax.lax.scan(period, x_BTD, segment)
                balance_losses.append(of_segment)
        values = [value.ravel() for value in jax.tree.leaves(balance_losses)]
        return x_BTD, jnp.concatenate(values).mean() if values else jnp.zeros(())


@functools.partial(jax.jit, static_argnums=0)
def forward(config: LlamaConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Logits ``[B, T, V]`` of int token ids ``[B, T]``, in the dtype of the params."""
    return Llama.from_params(config, params)(tokens_BT)


def init_params(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Randomly initialised layer-stacked params, the same that ``Llama(config, rngs=nnx.Rngs(key))`` has.

    Matrices are sampled from N(0, ``initializer_range``), norms are one. Works under ``jit`` and ``eval_shape``.
    """
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key), param_dtype=dtype)))
