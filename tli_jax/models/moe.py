"""A mixture of experts in the place of the feed-forward, as Mixtral has it (arXiv 2401.04088).

A router chooses ``k`` of E experts for each token, by the softmax of its logits renormalised over the chosen ones, in
fp32. No token is dropped.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Routing(NamedTuple):
    """Of each token the experts chosen, ``[B, T, k]`` int32, and their weights, fp32, which sum to 1."""

    experts: jax.Array
    weights: jax.Array


# x [B, T, D], who computes it, w1 and w3 [E, F, D], w2 [E, D, F] -> [B, T, D].
ExpertDispatch = Callable[[jax.Array, Routing, jax.Array, jax.Array, jax.Array], jax.Array]


def choose(x_BTD: jax.Array, gate_ED: jax.Array, k: int) -> tuple[Routing, jax.Array]:
    """The experts of each token; and how unevenly they are used, 1 if evenly, E/k at worst: E times the sum over the
    experts of the share of choices that fall to one with its mean probability (arXiv 2101.03961)."""
    precise = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    logits_BTE = jnp.einsum("...d,ed->...e", x_BTD.astype(jnp.float32), gate_ED.astype(jnp.float32), **precise)
    odds_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    weights_BTk, experts_BTk = jax.lax.top_k(odds_BTE, k)
    weights_BTk = weights_BTk / weights_BTk.sum(-1, keepdims=True)
    E = gate_ED.shape[0]
    share_E = jax.nn.one_hot(experts_BTk, E).mean((0, 1, 2))
    return Routing(experts_BTk, weights_BTk), E * jnp.sum(share_E * odds_BTE.mean((0, 1)))


def every_expert(x_BTD: jax.Array, choice: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array) -> jax.Array:
    """All experts run on all tokens: E/k times the work, in plain products of matrices. For CPUs and small models."""
    share_BTE = (jax.nn.one_hot(choice.experts, w1.shape[0]) * choice.weights[..., None]).sum(-2)
    inside_BTEF = jax.nn.silu(jnp.einsum("btd,efd->btef", x_BTD, w1)) * jnp.einsum("btd,efd->btef", x_BTD, w3)
    out_BTED = jnp.einsum("btef,edf->bted", inside_BTEF, w2)
    return jnp.einsum("bted,bte->btd", out_BTED.astype(jnp.float32), share_BTE).astype(x_BTD.dtype)


def chosen_experts(
    x_BTD: jax.Array, choice: Routing, w1: jax.Array, w2: jax.Array, w3: jax.Array, first: Any = 0
) -> jax.Array:
    """The chosen experts alone run on their tokens, sorted by expert: one grouped product a matrix.

    Args:
        w1, w2, w3: of the experts ``first`` and on; what others are chosen for is left at 0.

    Returns:
        ``[B, T, D]`` fp32, to be summed over all experts where these are not all.
    """
    B, T, D = x_BTD.shape
    k, E = choice.experts.shape[-1], w1.shape[0]
    expert_M = choice.experts.reshape(-1) - first
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)  # those of others come last
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E].astype(jnp.int32)
    x_MD = x_BTD.reshape(-1, D)[order_M // k]

    def product(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, weights.swapaxes(1, 2), sizes_E)

    out_MD = product(jax.nn.silu(product(x_MD, w1)) * product(x_MD, w3), w2)
    is_here_M = jnp.arange(len(order_M)) < sizes_E.sum()
    out_MD = jnp.where(is_here_M[:, None], out_MD.astype(jnp.float32), 0.0)
    back_M = jnp.argsort(order_M, stable=True)
    out_BTkD = out_MD[back_M].reshape(B, T, k, D)
    return (out_BTkD * choice.weights[..., None]).sum(2)


class Experts(nnx.Module):
    """Router and experts of one layer; with stacked leaves, of all."""

    def __init__(self, k: int, params: Mapping[str, Any]):
        self.k = k
        self.gate = nnx.Param(params["gate"]["weight"])
        self.w1, self.w2, self.w3 = (nnx.Param(params["experts"][name]["weight"]) for name in ("w1", "w2", "w3"))

    def __call__(self, x_BTD: jax.Array, dispatch: ExpertDispatch = every_expert) -> tuple[jax.Array, jax.Array]:
        """What the chosen experts give, ``[B, T, D]``, and how unevenly they are used, see ``choose``."""
        choice, balance = choose(x_BTD, self.gate[...], self.k)
        weights = (w[...].astype(x_BTD.dtype) for w in (self.w1, self.w2, self.w3))
        return dispatch(x_BTD, choice, *weights).astype(x_BTD.dtype), balance
