"""The chunked loss equals the plain one in value and gradient, and never holds the logits of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.models.config import LlamaConfig
from tli_jax.models.cross_entropy import chunked_cross_entropy, objective
from tli_jax.models.llama import ForwardOptions, Llama, forward, init_params
from tli_jax.models.loss import losses, summed_losses, token_losses

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
TOKENS = np.random.default_rng(1).integers(0, 37, (3, 12))


def plain(config, params, tokens_BT):
    """log_softmax over all logits at once."""
    logp_BTV = jax.nn.log_softmax(forward(config, params, tokens_BT[:, :-1]).astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp_BTV, jnp.asarray(tokens_BT)[:, 1:, None], axis=-1)[..., 0]


def value_and_grad(loss, params):
    # A different weight per position, so that the sum detects a misplaced loss.
    weights = jnp.arange(1.0, 34.0).reshape(3, 11)

    def weighted(params):
        out = loss(params)
        return (out * weights).sum() / weights.sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    return out, gradients


@pytest.fixture(scope="module")
def expected(request, random_params):
    """A model, tied or not, with its plain loss and gradients."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    params = random_params(config)
    return config, params, *value_and_grad(lambda params: plain(config, params, TOKENS), params)


# B*T is 33: neither 5 nor 16 divides it, and 64 is larger.
@pytest.mark.parametrize(
    ("expected", "chunk", "remat"),
    [(True, 5, "none"), (True, 16, "full"), (True, 64, "dots"), (False, 16, "full")],
    ids=["tied-5", "tied-16-full", "tied-64-dots", "untied-16-full"],
    indirect=["expected"],
)
def test_chunked_equals_plain(expected, chunk, remat):
    config, params, value, gradients = expected
    ours, our_gradients = value_and_grad(
        lambda params: token_losses(
            Llama.from_params(config, params), TOKENS, chunk, options=ForwardOptions(remat=remat)
        )[0],
        params,
    )
    assert ours.shape == (3, 11) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, value, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), our_gradients, gradients)


@pytest.mark.parametrize("expected", [True], ids=["tied"], indirect=True)
def test_losses_of_params_and_in_bfloat16(expected):
    config, params, value, _ = expected
    np.testing.assert_allclose(losses(config, params, TOKENS), value, rtol=1e-5, atol=1e-6)
    rounded = losses(config, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params), TOKENS)
    assert rounded.dtype == jnp.float32
    # bf16 logits have 8 bits, and the largest is about 4.
    np.testing.assert_allclose(rounded, value, atol=0.15)


@pytest.mark.parametrize("chunk", [32, 512])
def test_gradients_in_bfloat16_are_close_to_fp32_whatever_the_chunk(chunk):
    """Logit gradients are rounded once; the gradient of the head is not rounded at every chunk."""
    rng = np.random.default_rng(0)
    N, V, D = 512, 1024, 64
    x = jnp.asarray(rng.normal(size=(1, N, D)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(V, D)) * 0.1, jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(np.minimum(rng.zipf(1.2, (1, N)) - 1, V - 1))
    kernel = functools.partial(chunked_cross_entropy, chunk=chunk)

    def gradients(x):
        return jax.jit(jax.grad(lambda *a: objective(kernel, 1e-3, *a, targets)[0], argnums=(0, 1)))(x, head)

    expected_x, expected_head = gradients(x.astype(jnp.float32))
    by_x, by_head = gradients(x)
    assert by_x.dtype == jnp.bfloat16 and by_head.dtype == jnp.float32

    def error(a, b):
        return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)

    assert error(by_head, expected_head) < 1.2e-3 and error(by_x, expected_x) < 3e-3


def test_both_forms_of_the_loss_have_equal_gradients():
    """Summed with a z-loss, as in training, and token by token."""
    config = LlamaConfig(**SIZES)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()

    def summed(params):
        return summed_losses(Llama.from_params(config, params), TOKENS, z_loss=1e-2)[0]

    def by_token(params):
        found, log_z, _ = token_losses(Llama.from_params(config, params), TOKENS)
        return found.sum() + 1e-2 * jnp.square(log_z).sum()

    (a, grads_a), (b, grads_b) = (jax.jit(jax.value_and_grad(f))(params) for f in (summed, by_token))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads_a, grads_b)


def test_the_logits_of_a_batch_are_never_held():
    config = LlamaConfig(**SIZES | {"vocab_size": 128_256})
    B, T, chunk = 2, 512, 64
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    logits_bytes = B * T * config.vocab_size * 4

    def temporaries(loss) -> int:
        """Scratch memory in bytes of the compiled loss and gradient; nothing runs."""
        step = jax.jit(jax.value_and_grad(lambda params, tokens: loss(params, tokens).mean()))
        return step.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lambda params, tokens: plain(config, params, tokens)) > logits_bytes
    chunked = temporaries(
        lambda params, tokens: token_losses(Llama.from_params(config, params), tokens, chunk=chunk)[0]
    )
    # A chunk is a sixteenth of the logits. The rest is the head's gradient and a few copies of a chunk.
    assert chunked < logits_bytes / 3
