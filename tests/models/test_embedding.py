"""The gradient of the embedding is summed in fp32, however often a token occurs."""

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.models.embedding import Lookup, look_up, rows, sum_rows


def test_gradient_in_bfloat16_is_exact_to_the_rounding_of_its_terms():
    rng = np.random.default_rng(0)
    V, D = 50, 8
    tokens = np.minimum(rng.zipf(1.3, (4, 2048)) - 1, V - 1)  # as in text, half of the tokens have a few ids
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    gradient = jnp.asarray(rng.normal(1, 1, size=(*tokens.shape, D)), jnp.bfloat16)
    out, transpose = jax.vjp(lambda table: look_up(Lookup(), jnp.bfloat16, table, jnp.asarray(tokens)), table)
    np.testing.assert_array_equal(out, table[tokens].astype(jnp.bfloat16))
    (found,) = transpose(gradient)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, np.asarray(gradient, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_tokens_outside_a_shard_of_the_table_give_zeros_and_change_nothing():
    table = jnp.arange(1.0, 7.0).reshape(3, 2)
    tokens = jnp.asarray([[-5, -1, 0], [2, 3, 100]])
    np.testing.assert_array_equal(rows(table, tokens, jnp.float32)[..., 0], [[0, 0, 1], [5, 0, 0]])
    found = sum_rows(jnp.ones((2, 3, 2)), tokens, 3)
    np.testing.assert_array_equal(found, [[1, 1], [0, 0], [1, 1]])
