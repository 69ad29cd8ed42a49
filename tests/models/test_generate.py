"""Generation: with and without a cache, random keys, and a trained model's story."""

import dataclasses

import jax
import numpy as np
import pytest

from tli_jax.errors import UsageError
from tli_jax.models.config import LlamaConfig
from tli_jax.models.generate import generate_tokens
from tli_jax.models.llama import forward

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    # Large enough for logits that differ clearly.
    initializer_range=0.3,
)
PROMPT = np.array([[1, 5, 9, 2], [7, 7, 0, 30]])


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


def greedy_reference(params, tokens, steps):
    """Greedy, with a complete forward pass and an argmax per token."""
    T = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, steps)))
    for last in range(T - 1, T + steps - 1):
        tokens[:, last + 1] = np.argmax(forward(CONFIG, params, tokens)[:, last], axis=-1)
    return tokens


def test_greedy_cached_equals_uncached_equals_greedy_reference(params):
    cached = generate_tokens(CONFIG, params, PROMPT, 20)
    assert cached.shape == (2, 24) and cached.dtype == np.int32
    np.testing.assert_array_equal(cached[:, :4], PROMPT)
    np.testing.assert_array_equal(cached, generate_tokens(CONFIG, params, PROMPT, 20, cached=False))
    np.testing.assert_array_equal(cached, greedy_reference(params, PROMPT, 20))
    assert len(set(np.asarray(cached[0, 4:]).tolist())) > 2, "the continuation is too repetitive to detect errors"


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 1, 2]], ids=["in place", "two trunks"])
def test_cached_equals_uncached_when_layers_are_repeated(params, order):
    deep = params | {"layers": jax.tree.map(lambda x: x[np.array(order)], params["layers"])}
    cached = generate_tokens(CONFIG, deep, PROMPT, 20)
    np.testing.assert_array_equal(cached, generate_tokens(CONFIG, deep, PROMPT, 20, cached=False))
    np.testing.assert_array_equal(cached, greedy_reference(deep, PROMPT, 20))
    assert not np.array_equal(cached, generate_tokens(CONFIG, params, PROMPT, 20))


def test_sampling_is_reproducible_by_key(params):
    options = {"temperature": 1.5, "key": jax.random.key(0)}
    tokens = generate_tokens(CONFIG, params, PROMPT, 16, **options)
    np.testing.assert_array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16, **options))
    np.testing.assert_array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16, **options, cached=False))
    assert not np.array_equal(
        tokens, generate_tokens(CONFIG, params, PROMPT, 16, temperature=1.5, key=jax.random.key(1))
    )
    assert not np.array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16))


def test_sampling_follows_the_softmax(params):
    samples = 4000
    prompt = np.repeat(PROMPT[:1], samples, axis=0)
    sampled = generate_tokens(CONFIG, params, prompt, 1, temperature=2.0, key=jax.random.key(0))[:, -1]
    expected = jax.nn.softmax(forward(CONFIG, params, PROMPT[:1])[0, -1] / 2.0)
    counted = np.bincount(sampled, minlength=31) / samples
    # Five standard deviations of a count in 4000 samples.
    assert (np.abs(counted - expected) <= 5 * np.sqrt(expected * (1 - expected) / samples) + 1e-3).all()
    # Nearly uniform: if every step used the same noise, it would choose the same token every time.
    hot = np.asarray(generate_tokens(CONFIG, params, PROMPT, 16, temperature=1e6, key=jax.random.key(0)))
    assert all(len(set(row)) > 8 for row in hot[:, 4:].tolist())
    cold = generate_tokens(CONFIG, params, PROMPT, 16, temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate_tokens(CONFIG, params, PROMPT, 16))


@pytest.mark.parametrize("cached", [True, False])
def test_after_an_eos_the_row_repeats_it(params, cached):
    free = np.asarray(generate_tokens(CONFIG, params, PROMPT, 20, cached=cached))
    # Two tokens that the rows generate. A third is in a prompt, where it does not count.
    first, second = int(free[0, 8]), int(free[1, 12])
    stops = dataclasses.replace(CONFIG, eos_token_ids=(first, second, int(PROMPT[0, 0])))
    expected = free.copy()
    for row in expected:
        at = next((i for i in range(4, 24) if row[i] in stops.eos_token_ids), 23)
        row[at:] = row[at]
    assert not np.array_equal(expected, free)
    np.testing.assert_array_equal(generate_tokens(stops, params, PROMPT, 20, cached=cached), expected)


def test_errors_state_the_numbers(params):
    assert generate_tokens(CONFIG, params, PROMPT, 28).shape == (2, 32)
    with pytest.raises(UsageError, match=r"4 tokens \+ max_new_tokens 29 = 33, .* 32: ask for at most 28"):
        generate_tokens(CONFIG, params, PROMPT, 29)
    with pytest.raises(UsageError, match=r"temperature 0\.8 .* pass key"):
        generate_tokens(CONFIG, params, PROMPT, 4, temperature=0.8)
    with pytest.raises(UsageError, match=r"temperature -1"):
        generate_tokens(CONFIG, params, PROMPT, 4, temperature=-1.0)
    with pytest.raises(UsageError, match=r"max_new_tokens 0"):
        generate_tokens(CONFIG, params, PROMPT, 0)
    with pytest.raises(UsageError, match=r"prompt of 0 tokens"):
        generate_tokens(CONFIG, params, PROMPT[:, :0], 4)


OPENING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def story(stories260k) -> np.ndarray:
    config, params = stories260k
    return np.asarray(generate_tokens(config, params, np.array([[config.bos_token_id]]), 200))


def test_the_story_of_a_trained_model(stories260k, tokenizer, story):
    config, params = stories260k
    assert tokenizer.decode(story[0], skip_special_tokens=True).startswith(OPENING)
    uncached = generate_tokens(config, params, np.array([[config.bos_token_id]]), 200, cached=False)
    np.testing.assert_array_equal(story, uncached)


def test_the_story_is_that_of_transformers(material, story):
    torch = pytest.importorskip("torch", reason="torch is not installed: no transformers model to compare with")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(material / "stories260k", dtype=torch.float32)
    # Every token is the greedy choice of transformers after the tokens before it.
    with torch.no_grad():
        choices = model(torch.tensor(story)).logits.argmax(-1).numpy()
    np.testing.assert_array_equal(story[:, 1:], choices[:, :-1])
