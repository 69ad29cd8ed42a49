"""Cross-entropy, fused with the head: the logits of a complete batch never exist.

Logits are made, used and dropped chunk by chunk, in fp32 from products in the compute dtype. Gradients of logits are
in the compute dtype, and the gradient of the head is summed in fp32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tli_jax.models.precision import fp32_einsum

# Logits per chunk: 256 MiB in fp32, but at least that many tokens. With fewer, reading and writing the fp32 gradient of
# the head would take longer than the products.
LOGITS, ROWS = 2**26, 1024


class Chunked(NamedTuple):
    """What ``chunked_cross_entropy`` returns; a gradient that was not asked for is None.

    Attributes:
        losses: cross-entropy in nats, fp32 ``[B, T]``, 0 where there is no target.
        log_z: log of the softmax denominator, fp32 ``[B, T]``, 0 where there is no target.
        x_gradient: ``[B, T, D]`` in the dtype of x.
        head_gradient: fp32 ``[V, D]``.
    """

    losses: jax.Array
    log_z: jax.Array
    x_gradient: jax.Array | None = None
    head_gradient: jax.Array | None = None


# Takes the log-denominators of some tokens and what else is given for each, and returns the derivatives of the
# objective with respect to each loss and each log-denominator.
Derivatives = Callable[..., tuple[jax.Array, jax.Array]]


class CrossEntropy(Protocol):
    """``chunked_cross_entropy``, or the same over a mesh."""

    def __call__(
        self,
        x_BTD: jax.Array,
        head_VD: jax.Array,
        targets_BT: jax.Array,
        *given_BT: jax.Array,
        derivatives: Derivatives | None = None,
        is_head_trained: bool = False,
        chunk: int | None = None,
    ) -> Chunked: ...


def chunked_cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *given_BT: jax.Array,
    derivatives: Derivatives | None = None,
    is_head_trained: bool = False,
    chunk: int | None = None,
    axis: str | None = None,
) -> Chunked:
    """Cross-entropy of ``x @ head.T``, and the gradients of an objective that is a function of it.

    With gradients, this takes three products of the size of the logits, and one less for a frozen head.

    Args:
        head_VD: cast to the dtype of x. With ``axis``, one shard of the vocabulary.
        targets_BT: token ids; -1 is no target.
        given_BT: passed to ``derivatives``, token by token.
        derivatives: called with fp32 log-denominators and ``given_BT``; without it, there are no gradients.
        is_head_trained: whether to return the gradient of the head.
        chunk: tokens per chunk; by default as ``LOGITS`` and ``ROWS`` say.
        axis: the mesh axis that shards the vocabulary, under ``shard_map``.
    """
    (B, T, D), V = x_BTD.shape, head_VD.shape[0]
    N, rows = B * T, chunk or max(ROWS, LOGITS // V)
    number = -(-N // rows)
    C = -(-N // number)
    head_VD, einsum = head_VD.astype(x_BTD.dtype), fp32_einsum(x_BTD.dtype)
    first = 0 if axis is None else jax.lax.axis_index(axis) * V

    def total(x: jax.Array) -> jax.Array:
        return x if axis is None else jax.lax.psum(x, axis)

    def split(x: jax.Array, fill: int) -> jax.Array:
        x = x.reshape(N, *x.shape[2:])
        return jnp.pad(x, ((0, number * C - N), *[(0, 0)] * (x.ndim - 1)), constant_values=fill).reshape(
            number, C, *x.shape[1:]
        )

    def add_chunk(head_gradient: jax.Array | None, inputs: tuple[Any, ...]) -> tuple[jax.Array | None, Any]:
        x_CD, targets_C, *given_C = inputs
        has_target = targets_C >= 0
        logits_CV = einsum("cd,vd->cv", x_CD, head_VD)
        largest_C = logits_CV.max(-1)
        largest_C = largest_C if axis is None else jax.lax.pmax(largest_C, axis)
        log_z_C = largest_C + jnp.log(total(jnp.exp(logits_CV - largest_C[:, None]).sum(-1)))
        # A comparison, not a gather, so that it is fused with its neighbours.
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) + first == targets_C[:, None]
        target_C = total(jnp.where(is_target, logits_CV, 0.0).sum(-1))
        losses = jnp.where(has_target, log_z_C - target_C, 0.0), jnp.where(has_target, log_z_C, 0.0)
        if derivatives is None:
            return None, losses
        by_loss, by_log_z = (jnp.where(has_target, d, 0.0)[:, None] for d in derivatives(log_z_C, *given_C))
        probs_CV = jnp.exp(logits_CV - log_z_C[:, None])
        gradient_CV = (probs_CV * (by_loss + by_log_z) - jnp.where(is_target, by_loss, 0.0)).astype(x_CD.dtype)
        if head_gradient is not None:
            head_gradient += einsum("cv,cd->vd", gradient_CV, x_CD)
        return head_gradient, (*losses, total(einsum("cv,vd->cd", gradient_CV, head_VD)).astype(x_CD.dtype))

    start = jnp.zeros((V, D), jnp.float32) if derivatives is not None and is_head_trained else None
    inputs = (split(x_BTD, 0), split(targets_BT, -1), *(split(x, 0) for x in given_BT))
    head_gradient, chunks = jax.lax.scan(add_chunk, start, inputs)
    found = [x.reshape(number * C, *x.shape[2:])[:N].reshape(B, T, *x.shape[2:]) for x in chunks]
    return Chunked(found[0], found[1], None if derivatives is None else found[2], head_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_cross_entropy(
    kernel: CrossEntropy, chunk: int | None, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses and log-denominators of each token, see ``Chunked``."""
    found = kernel(x_BTD, head_VD, targets_BT, chunk=chunk)
    return found.losses, found.log_z


def _token_forward(kernel: CrossEntropy, chunk: int | None, x: Any, head: Any, targets: Any) -> tuple[Any, Any]:
    found = kernel(x.value, head.value, targets.value, chunk=chunk)
    return (found.losses, found.log_z), (x.value, head.value, targets.value, () if head.perturbed else None)


def _token_backward(kernel: CrossEntropy, chunk: int | None, saved: Any, cotangents: Any) -> tuple[Any, Any, None]:
    x_BTD, head_VD, targets_BT, trained = saved
    given = [jnp.zeros(c.shape) if isinstance(c, SymbolicZero) else c for c in cotangents]
    found = kernel(
        x_BTD,
        head_VD,
        targets_BT,
        *given,
        derivatives=lambda log_z, by_loss, by_log_z: (by_loss, by_log_z),
        is_head_trained=trained is not None,
        chunk=chunk,
    )
    by_head = None if found.head_gradient is None else found.head_gradient.astype(head_VD.dtype)
    return found.x_gradient, by_head, None


token_cross_entropy.defvjp(_token_forward, _token_backward, symbolic_zeros=True)


def objective(
    kernel: CrossEntropy, z_loss: float, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens of loss + ``z_loss`` · log-denominator², and of the losses alone, which has no gradient.

    Both gradients are computed in the forward pass, if it is differentiated.
    """
    sums: Any = _objective(kernel, z_loss, x_BTD, head_VD, targets_BT)
    total, nats = sums
    return total, jax.lax.stop_gradient(nats)


def _sum(z_loss: float, found: Chunked) -> tuple[jax.Array, jax.Array]:
    nats = found.losses.sum()
    return nats + z_loss * jnp.square(found.log_z).sum() if z_loss else nats, nats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _objective(
    kernel: CrossEntropy, z_loss: float, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _sum(z_loss, kernel(x_BTD, head_VD, targets_BT))


def _objective_forward(kernel: CrossEntropy, z_loss: float, x: Any, head: Any, targets: Any) -> tuple[Any, Any]:
    found = kernel(
        x.value,
        head.value,
        targets.value,
        derivatives=lambda log_z: (jnp.ones_like(log_z), 2 * z_loss * log_z),
        is_head_trained=head.perturbed,
    )
    return _sum(z_loss, found), (found.x_gradient, found.head_gradient, jnp.zeros(0, head.value.dtype))


def _objective_backward(kernel: CrossEntropy, z_loss: float, saved: Any, cotangents: Any) -> tuple[Any, Any, None]:
    x_gradient, head_gradient, like_head = saved
    by_x = (cotangents[0] * x_gradient).astype(x_gradient.dtype)
    return by_x, None if head_gradient is None else (cotangents[0] * head_gradient).astype(like_head.dtype), None


_objective.defvjp(_objective_forward, _objective_backward, symbolic_zeros=True)
