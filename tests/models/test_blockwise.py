"""Attention in blocks equals masked attention in value and gradients, with memory that does not grow with T²."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.models.attention import MaskedAttention, causal
from tli_jax.models.blockwise import blockwise_attention


def masked(segments_BT, T):
    mask = np.tril(np.ones((T, T), bool))[None]
    if segments_BT is not None:
        mask = mask & (np.asarray(segments_BT)[:, :, None] == np.asarray(segments_BT)[:, None])
    return MaskedAttention(jnp.asarray(mask))


def with_kept_probabilities(q, k, v, segments, block):
    return causal(q.shape[1], segments, block)(q, k, v)


# One block; several; more than there are strips, the last one incomplete.
@pytest.mark.parametrize(("T", "block"), [(17, 512), (77, 16), (200, 16)])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("attend", [blockwise_attention, with_kept_probabilities])
def test_equals_masked_attention(T, block, has_documents, attend):
    rng = np.random.default_rng(0)
    B, H, K, h = 2, 4, 2, 8
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.float32) for n in (H, K, K))
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    segments = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.1, axis=1)) if has_documents else None

    def value_and_grad(attend):
        def total(*qkv):
            out = attend(*qkv)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = value_and_grad(lambda *qkv: attend(*qkv, segments, block))
    (_, expected), expected_grads = value_and_grad(masked(segments, T))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Default settings at 4,096 tokens once took 19.5 GB."""

    def temporaries(T):
        qkv = [jax.ShapeDtypeStruct((8, T, 8, 16), jnp.bfloat16)] * 3
        segments = jax.ShapeDtypeStruct((8, T), jnp.int32)

        def total(q, k, v, segments_BT):
            return causal(T, segments_BT)(q, k, v).astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 8 * 8 * 4096**2 * 4 / 8  # an eighth of the scores of all heads
    assert temporaries(4096) < 3 * temporaries(2048)


@pytest.mark.parametrize("T", [512, 1024])
def test_most_keys_after_the_last_query_are_not_read(T):
    """Five of eight blocks of scores remain with four blocks of queries, and nearly half with many."""

    def flops(block):
        qkv = [jax.ShapeDtypeStruct((1, T, 4, 32), jnp.float32)] * 3
        attend = jax.jit(lambda *qkv: causal(T, None, block)(*qkv))
        return attend.lower(*qkv).compile().cost_analysis()["flops"]

    assert flops(128) < (0.65 if T == 512 else 0.6) * flops(T)
