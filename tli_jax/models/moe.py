"""Mixture of experts in place of the feed-forward, as in Mixtral (arXiv 2401.04088).

A router sends each token to ``k`` of E experts. Their weights are the softmax of the router's logits, renormalised over
the chosen experts, in fp32. No token is dropped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tli_jax.models.config import LlamaConfig
from tli_jax.models.modules import Linear, Weight, tensor_options
from tli_jax.models.precision import fp32_einsum, matmul_precision


class Routing(NamedTuple):
    """The chosen experts of each token, int32 ``[B, T, k]``, and their weights, fp32 ``[B, T, k]``, which sum to 1."""

    experts: jax.Array
    weights: jax.Array


# x [B, T, D], routing, w1 [E, F, D], w2 [E, D, F], w3 [E, F, D] -> [B, T, D].
ExpertDispatch = Callable[[jax.Array, Routing, jax.Array, jax.Array, jax.Array], jax.Array]


def route(x_BTD: jax.Array, gate_ED: jax.Array, k: int) -> tuple[Routing, jax.Array]:
    """Choose ``k`` experts for each token.

    Returns:
        The routing, and the load-balancing loss of the Switch Transformer (arXiv 2101.03961): E · Σ over experts of
        (fraction of the choices) · (mean probability). It is 1 for an even load and E/k at worst.
    """
    einsum = fp32_einsum(jnp.float32)
    logits_BTE = einsum("...d,ed->...e", x_BTD.astype(jnp.float32), gate_ED.astype(jnp.float32))
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    weights_BTk, experts_BTk = jax.lax.top_k(probs_BTE, k)
    weights_BTk = weights_BTk / weights_BTk.sum(-1, keepdims=True)
    E = gate_ED.shape[0]
    fraction_E = jax.nn.one_hot(experts_BTk, E).mean((0, 1, 2))
    return Routing(experts_BTk, weights_BTk), E * jnp.sum(fraction_E * probs_BTE.mean((0, 1)))


def every_expert(x_BTD: jax.Array, routing: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array) -> jax.Array:
    """Run all experts on all tokens: E/k times the work, but plain matrix products. For CPUs and small models."""
    weight_BTE = (jax.nn.one_hot(routing.experts, w1.shape[0]) * routing.weights[..., None]).sum(-2)
    einsum = functools.partial(jnp.einsum, precision=matmul_precision(x_BTD.dtype))
    inner_BTEF = jax.nn.silu(einsum("btd,efd->btef", x_BTD, w1)) * einsum("btd,efd->btef", x_BTD, w3)
    out_BTED = einsum("btef,edf->bted", inner_BTEF, w2)
    return fp32_einsum(jnp.float32)("bted,bte->btd", out_BTED.astype(jnp.float32), weight_BTE).astype(x_BTD.dtype)


def chosen_experts(
    x_BTD: jax.Array, routing: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array, first: Any = 0
) -> jax.Array:
    """Run only the chosen experts: tokens are sorted by expert for grouped matrix products.

    Args:
        w1, w2, w3: weights of the experts from number ``first`` on. Tokens routed elsewhere contribute 0.

    Returns:
        fp32 ``[B, T, D]``. Where the weights are a shard of the experts, sum the results of all shards.
    """
    B, T, D = x_BTD.shape
    k, E = routing.experts.shape[-1], w1.shape[0]
    expert_M = routing.experts.reshape(-1) - first
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)  # sorts after the experts of this shard
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E].astype(jnp.int32)
    x_MD = x_BTD.reshape(-1, D)[order_M // k]

    def product(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, weights.swapaxes(1, 2), sizes_E, precision=matmul_precision(x.dtype))

    out_MD = product(jax.nn.silu(product(x_MD, w1)) * product(x_MD, w3), w2)
    is_here_M = jnp.arange(len(order_M)) < sizes_E.sum()
    out_MD = jnp.where(is_here_M[:, None], out_MD.astype(jnp.float32), 0.0)
    back_M = jnp.argsort(order_M, stable=True)
    out_BTkD = out_MD[back_M].reshape(B, T, k, D)
    return (out_BTkD * routing.weights[..., None]).sum(2)


class ExpertWeights(nnx.Module):
    """The three matrices of all experts of a layer: gate ``w1``, down ``w2`` and up ``w3``."""

    def __init__(self, config: LlamaConfig, options: Callable[[str], dict[str, Any]]):
        E, F, D = (config.sizes[dim] for dim in ("E", "F", "D"))
        self.w1 = Weight((E, F, D), **options("block_sparse_moe.experts.w1"))
        self.w2 = Weight((E, D, F), **options("block_sparse_moe.experts.w2"))
        self.w3 = Weight((E, F, D), **options("block_sparse_moe.experts.w3"))


class MixtureOfExperts(nnx.Module):
    """The router and the experts of a layer, or of stacked layers."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, stack: tuple[int, ...] = ()
    ):
        self.k = config.experts_per_token
        options = tensor_options(config, rngs, param_dtype, stack)
        self.experts = ExpertWeights(config, options)
        self.gate = Linear(config.hidden_size, config.num_experts, **options("block_sparse_moe.gate"))

    def __call__(self, x_BTD: jax.Array, dispatch: ExpertDispatch = every_expert) -> tuple[jax.Array, jax.Array]:
        """Return the output ``[B, T, D]`` and the load-balancing loss, see ``route``."""
        routing, balance_loss = route(x_BTD, self.gate.weight[...], self.k)
        experts = self.experts
        weights = (w.weight[...].astype(x_BTD.dtype) for w in (experts.w1, experts.w2, experts.w3))
        return dispatch(x_BTD, routing, *weights).astype(x_BTD.dtype), balance_loss
