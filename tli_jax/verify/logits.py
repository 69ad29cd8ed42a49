"""Compare the logits of two models on the same tokens, one slice of the vocabulary at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.hf.checkpoint import Checkpoint
from tli_jax.hf.tensors import read_tensor
from tli_jax.models.precision import matmul_precision
from tli_jax.verify.layers import head_name, normalise

_SLICE_BYTES = 16 * 2**20


def compare_logits(
    base: Checkpoint, grown: Checkpoint, x_base: jax.Array, x_grown: jax.Array, tokens_BT: np.ndarray
) -> dict[str, float]:
    """Statistics of the logits of both models, by their name in ``Proof``.

    Args:
        x_base, x_grown: hidden states after the last layer, ``[B, T, D]``.
    """
    config = base.config
    name = head_name(config)
    heads = base.tensors[name], grown.tensors[name]
    norms = [jnp.asarray(read_tensor(c.tensors["model.norm.weight"])) for c in (base, grown)]
    h_base, h_grown = (
        normalise(config.rms_norm_eps, norm_D, x).reshape(-1, x.shape[-1])
        for norm_D, x in zip(norms, (x_base, x_grown), strict=True)
    )
    is_same_hidden = same_bits(h_base, h_grown)
    # The next token of each. The last token of a window has none: its target is not used.
    targets_N = jnp.asarray(np.roll(tokens_BT, -1, axis=1).reshape(-1))
    rows = max(1, _SLICE_BYTES * config.vocab_size // heads[0].nbytes)
    stats = _start(h_base.shape[0])
    for start in range(0, config.vocab_size, rows):
        weights = [read_tensor(head, slice(start, start + rows)) for head in heads]
        is_shared = is_same_hidden and same_bits(weights[0], weights[1])
        logits = _logits(h_base, weights[0])
        other = logits if is_shared else _logits(h_grown, weights[1])
        stats = _update(stats, logits, other, targets_N, start)
    return _finish(stats, tokens_BT.shape)


def same_bits(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@jax.jit
def _logits(h_ND: jax.Array, weight_VD: jax.Array) -> jax.Array:
    precision = matmul_precision(jnp.result_type(h_ND, weight_VD))
    return jnp.einsum("nd,vd->nv", h_ND, weight_VD, precision=precision).astype(jnp.float32)


class _Stats(NamedTuple):
    """Running softmax statistics over slices of the vocabulary. The first dim S is base and grown model: both go
    through the same operations, so equal logits give equal statistics."""

    max_SN: Any
    sum_SN: Any
    top_SN: Any
    target_SN: Any
    weighted_N: Any
    difference: Any
    largest: Any


def _start(N: int) -> _Stats:
    zero = jnp.zeros((2, N))
    return _Stats(zero - jnp.inf, zero, zero.astype(jnp.int32), zero, zero[0], jnp.zeros(()), jnp.zeros(()))


@jax.jit
def _update(stats: _Stats, base_NV: jax.Array, grown_NV: jax.Array, targets_N: jax.Array, start: int) -> _Stats:
    logits_SNV = jnp.stack([base_NV, grown_NV])
    best_SN = logits_SNV.max(-1)
    max_SN = jnp.maximum(best_SN, stats.max_SN)
    fade_SN = jnp.exp(stats.max_SN - max_SN)
    exp_SNV = jnp.exp(logits_SNV - max_SN[..., None])
    # A maximum would lose NaN: the same NaN on both sides is no difference, any other NaN an infinite one.
    is_same_NV = (base_NV == grown_NV) | (jnp.isnan(base_NV) & jnp.isnan(grown_NV))
    difference_NV = jnp.where(is_same_NV, 0.0, jnp.abs(base_NV - grown_NV))
    difference_NV = jnp.where(jnp.isnan(difference_NV), jnp.inf, difference_NV)
    at_N = targets_N - start
    is_here_N = (at_N >= 0) & (at_N < base_NV.shape[1])
    picked_SN = jnp.take_along_axis(logits_SNV, at_N[None, :, None], axis=-1, mode="clip")[..., 0]
    return _Stats(
        max_SN=max_SN,
        sum_SN=stats.sum_SN * fade_SN + exp_SNV.sum(-1),
        top_SN=jnp.where(best_SN > stats.max_SN, logits_SNV.argmax(-1) + start, stats.top_SN),
        target_SN=jnp.where(is_here_N, picked_SN, stats.target_SN),
        weighted_N=stats.weighted_N * fade_SN[0] + (exp_SNV[0] * (base_NV - grown_NV)).sum(-1),
        difference=jnp.maximum(stats.difference, difference_NV.max()),
        largest=jnp.maximum(stats.largest, jnp.abs(base_NV).max()),
    )


def _finish(stats: _Stats, shape: tuple[int, ...]) -> dict[str, float]:
    wide = _Stats(*(np.asarray(value, np.float64) for value in stats))
    normaliser_SN = wide.max_SN + np.log(wide.sum_SN)
    losses = (normaliser_SN - wide.target_SN).reshape(2, *shape)[:, :, :-1].mean((1, 2))
    kl_N = wide.weighted_N / wide.sum_SN[0] - normaliser_SN[0] + normaliser_SN[1]
    return {
        "max_abs_logit": float(wide.largest),
        "max_abs_logit_difference": float(wide.difference),
        "kl": float(kl_N.mean()),
        "loss_base": float(losses[0]),
        "loss_grown": float(losses[1]),
        "top1": float((wide.top_SN[0] == wide.top_SN[1]).mean()),
    }
