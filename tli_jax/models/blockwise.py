"""Causal attention in blocks of queries: memory grows with T, not T², and most keys above the diagonal are skipped.

As in FlashAttention (arXiv 2205.14135, 2307.08691), only the output and the log of the softmax denominators are kept,
from which the backward pass recomputes the probabilities. It is plain JAX, so it runs everywhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tli_jax.models.precision import fp32_einsum

# Scores of one block of queries: 128 MiB in fp32, but at least _LEAST queries.
_SCORES, _LEAST = 2**25, 64
# The blocks of a strip read the same keys, up to its end, so that the compiled program does not grow with T.
_STRIPS = 8


class _Strip(NamedTuple):
    first: int  # block of queries
    end: int
    keys: int  # that its blocks read


def _cut(B: int, H: int, T: int, size: int) -> tuple[int, list[_Strip]]:
    """Queries per block, at most ``size``, and the strips. The last block may be longer than what is left of T."""
    while size > _LEAST and B * H * size * T > _SCORES:
        size //= 2
    size = min(size, T)
    blocks = -(-T // size)
    per_strip = -(-blocks // _STRIPS)
    ends = [min(first + per_strip, blocks) for first in range(0, blocks, per_strip)]
    return size, [_Strip(first, end, end * size) for first, end in zip([0, *ends], ends, strict=False)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segments_BT: jax.Array | None, block: int
) -> jax.Array:
    """Causal grouped-query attention (arXiv 2305.13245) with the softmax in fp32, ``[B, T, H, h]``.

    Args:
        segments_BT: the document of each token, which attends only within it; None if there is a single one.
        block: queries at once, at most.
    """
    return _forward(q_BTHh, k_BTKh, v_BTKh, segments_BT, block)[0]


def _pad(x_BT: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % size), *[(0, 0)] * (x_BT.ndim - 2)))


def _to_blocks(x_BTH: jax.Array, size: int, K: int) -> jax.Array:
    """``[B, T, H, …] -> [N, B, size, K, G, …]``: blocks of queries, G heads per key/value head."""
    B, _, H, *rest = x_BTH.shape
    return _pad(x_BTH, size).reshape(B, -1, size, K, H // K, *rest).swapaxes(0, 1)


def _from_blocks(blocks: list[jax.Array], T: int) -> jax.Array:
    """The inverse of ``_to_blocks``."""
    x = jnp.concatenate(blocks).swapaxes(0, 1)
    B, N, size, K, G, h = x.shape
    return x.reshape(B, N * size, K * G, h)[:, :T]


def _scores(q_BsKGh: jax.Array, k_BSKh: jax.Array, at: jax.Array, segments: tuple[Any, Any]) -> jax.Array:
    """Scaled and masked scores of the block of queries number ``at``, fp32 ``[B, K, G, s, S]``."""
    size, S = q_BsKGh.shape[1], k_BSKh.shape[1]
    scores = fp32_einsum(q_BsKGh.dtype)("bskgh,btkh->bkgst", q_BsKGh, k_BSKh) * q_BsKGh.shape[-1] ** -0.5
    is_seen = ((at * size + jnp.arange(size))[:, None] >= jnp.arange(S))[None]
    if segments[0] is not None:
        is_seen &= segments[0][:, :, None] == segments[1][:, None]
    return jnp.where(is_seen[:, None, None], scores, -0.7 * jnp.finfo(jnp.float32).max)


def _split_segments(segments_BT: jax.Array | None, size: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Documents by block of queries ``[N, B, size]``, and of all keys."""
    if segments_BT is None:
        return None, None
    padded_BT = _pad(segments_BT, size)
    return padded_BT.reshape(len(padded_BT), -1, size).swapaxes(0, 1), padded_BT


def _forward(
    q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segments_BT: Any, block: int
) -> tuple[jax.Array, Any]:
    (B, T, H, _), K, dtype = q_BTHh.shape, k_BTKh.shape[2], q_BTHh.dtype
    size, strips = _cut(B, H, T, block)
    q_NBsKGh, k_BSKh, v_BSKh = _to_blocks(q_BTHh, size, K), _pad(k_BTKh, size), _pad(v_BTKh, size)
    segments_NBs, segments_BS = _split_segments(segments_BT, size)
    outputs, log_zs = [], []
    for first, end, S in strips:

        def run(inputs: tuple[Any, ...], S: int = S) -> tuple[jax.Array, jax.Array]:
            at, q, segments = inputs
            keys = None if segments_BS is None else segments_BS[:, :S]
            scores = _scores(q, k_BSKh[:, :S], at, (segments, keys))
            exps = jnp.exp(scores - scores.max(-1, keepdims=True))
            total = exps.sum(-1, keepdims=True)
            out = fp32_einsum(dtype)("bkgst,btkh->bskgh", (exps / total).astype(dtype), v_BSKh[:, :S])
            return out.astype(dtype), (scores.max(-1, keepdims=True) + jnp.log(total))[..., 0]

        part = jax.tree.map(lambda x, first=first, end=end: x[first:end], (q_NBsKGh, segments_NBs))
        out, log_z = jax.lax.map(run, (jnp.arange(first, end), *part))
        outputs.append(out)
        log_zs.append(log_z)
    out_BTHh = _from_blocks(outputs, T)
    return out_BTHh, (q_BTHh, k_BTKh, v_BTKh, segments_BT, out_BTHh, jnp.concatenate(log_zs))


def _backward(block: int, saved: Any, gradient_BTHh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTHh, k_BTKh, v_BTKh, segments_BT, out_BTHh, log_z_NBKGs = saved
    (B, T, H, h), K, dtype = q_BTHh.shape, k_BTKh.shape[2], q_BTHh.dtype
    size, strips = _cut(B, H, T, block)
    q_NBsKGh, g_NBsKGh = _to_blocks(q_BTHh, size, K), _to_blocks(gradient_BTHh, size, K)
    k_BSKh, v_BSKh = _pad(k_BTKh, size), _pad(v_BTKh, size)
    segments_NBs, segments_BS = _split_segments(segments_BT, size)
    product_BTH = (gradient_BTHh.astype(jnp.float32) * out_BTHh.astype(jnp.float32)).sum(-1)
    delta_NBKGs = jnp.moveaxis(_to_blocks(product_BTH, size, K), 2, -1)
    einsum = fp32_einsum(dtype)
    dk_BSKh, dv_BSKh, dqs = (jnp.zeros(k_BSKh.shape, jnp.float32), jnp.zeros(v_BSKh.shape, jnp.float32), [])
    for first, end, S in strips:

        def add(carry: tuple[jax.Array, jax.Array], inputs: tuple[Any, ...], S: int = S) -> tuple[Any, jax.Array]:
            dk, dv = carry
            at, q, segments, g, log_z, delta = inputs
            keys = None if segments_BS is None else segments_BS[:, :S]
            probs = jnp.exp(_scores(q, k_BSKh[:, :S], at, (segments, keys)) - log_z[..., None])
            dv += einsum("bkgst,bskgh->btkh", probs.astype(dtype), g)
            by_probs = einsum("bskgh,btkh->bkgst", g, v_BSKh[:, :S])
            by_scores = (probs * (by_probs - delta[..., None]) * h**-0.5).astype(dtype)
            dk += einsum("bkgst,bskgh->btkh", by_scores, q)
            return (dk, dv), einsum("bkgst,btkh->bskgh", by_scores, k_BSKh[:, :S]).astype(dtype)

        parts = (q_NBsKGh, segments_NBs, g_NBsKGh, log_z_NBKGs, delta_NBKGs)
        parts = jax.tree.map(lambda x, first=first, end=end: x[first:end], parts)
        sums, dq = jax.lax.scan(add, (dk_BSKh[:, :S], dv_BSKh[:, :S]), (jnp.arange(first, end), *parts))
        dk_BSKh, dv_BSKh = (x.at[:, :S].set(part) for x, part in zip((dk_BSKh, dv_BSKh), sums, strict=True))
        dqs.append(dq)
    dq_BTHh = _from_blocks(dqs, T)
    return dq_BTHh, dk_BSKh[:, :T].astype(k_BTKh.dtype), dv_BSKh[:, :T].astype(v_BTKh.dtype), None


blockwise_attention.defvjp(_forward, _backward)
