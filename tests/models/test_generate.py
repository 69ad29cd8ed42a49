"""Generation: the cache changes nothing, keys reproduce, a trained model tells its story."""

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
    # Wide enough for logits that differ: a flat model would agree with itself by chance of the argmax.
    initializer_range=0.3,
)
PROMPT = np.array([[1, 5, 9, 2], [7, 7, 0, 30]])


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


def by_hand(params, tokens, steps):
    """Greedy, one whole forward pass and one argmax at a time."""
    T = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, steps)))
    for last in range(T - 1, T + steps - 1):
        tokens[:, last + 1] = np.argmax(forward(CONFIG, params, tokens)[:, last], axis=-1)
    return tokens


def test_greedy_cached_equals_uncached_equals_by_hand(params):
    cached = generate_tokens(CONFIG, params, PROMPT, 20)
    assert cached.shape == (2, 24) and cached.dtype == np.int32
    np.testing.assert_array_equal(cached[:, :4], PROMPT)
    np.testing.assert_array_equal(cached, generate_tokens(CONFIG, params, PROMPT, 20, cached=False))
    np.testing.assert_array_equal(cached, by_hand(params, PROMPT, 20))
    assert len(set(np.asarray(cached[0, 4:]).tolist())) > 2, "the continuation is too dull to tell a wrong one from it"


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 1, 2]], ids=["in place", "two trunks"])
def test_cached_equals_uncached_when_layers_are_repeated(params, order):
    deep = params | {"layers": jax.tree.map(lambda x: x[np.array(order)], params["layers"])}
    cached = generate_tokens(CONFIG, deep, PROMPT, 20)
    np.testing.assert_array_equal(cached, generate_tokens(CONFIG, deep, PROMPT, 20, cached=False))
    np.testing.assert_array_equal(cached, by_hand(deep, PROMPT, 20))
    assert not np.array_equal(cached, generate_tokens(CONFIG, params, PROMPT, 20))


def test_sampling_is_reproducible_by_key(params):
    draw = {"temperature": 1.5, "key": jax.random.key(0)}
    tokens = generate_tokens(CONFIG, params, PROMPT, 16, **draw)
    np.testing.assert_array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16, **draw))
    np.testing.assert_array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16, **draw, cached=False))
    assert not np.array_equal(
        tokens, generate_tokens(CONFIG, params, PROMPT, 16, temperature=1.5, key=jax.random.key(1))
    )
    assert not np.array_equal(tokens, generate_tokens(CONFIG, params, PROMPT, 16))


def test_sampling_follows_the_softmax(params):
    draws = 4000
    prompt = np.repeat(PROMPT[:1], draws, axis=0)
    drawn = generate_tokens(CONFIG, params, prompt, 1, temperature=2.0, key=jax.random.key(0))[:, -1]
    expected = jax.nn.softmax(forward(CONFIG, params, PROMPT[:1])[0, -1] / 2.0)
    counted = np.bincount(drawn, minlength=31) / draws
    # Five standard deviations of a count of 4000 draws.
    assert (np.abs(counted - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3).all()
    # All but uniform: were the same noise drawn at every step, it would pick the same token every time.
    hot = np.asarray(generate_tokens(CONFIG, params, PROMPT, 16, temperature=1e6, key=jax.random.key(0)))
    assert all(len(set(row)) > 8 for row in hot[:, 4:].tolist())
    cold = generate_tokens(CONFIG, params, PROMPT, 16, temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate_tokens(CONFIG, params, PROMPT, 16))


@pytest.mark.parametrize("cached", [True, False])
def test_after_an_eos_the_row_repeats_it(params, cached):
    free = np.asarray(generate_tokens(CONFIG, params, PROMPT, 20, cached=cached))
    # Two tokens that the rows produce on their way, one of which also stands in a prompt, where it does not count.
    first, second = int(free[0, 8]), int(free[1, 12])
    stops = dataclasses.replace(CONFIG, eos_token_ids=(first, second, int(PROMPT[0, 0])))
    expected = free.copy()
    for row in expected:
        at = next((i for i in range(4, 24) if row[i] in stops.eos_token_ids), 23)
        row[at:] = row[at]
    assert not np.array_equal(expected, free)
    np.testing.assert_array_equal(generate_tokens(stops, params, PROMPT, 20, cached=cached), expected)


def test_refusals_carry_the_numbers(params):
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


def test_the_story_is_the_one_transformers_tells(material, story):
    torch = pytest.importorskip("torch", reason="torch is not installed: no transformers model to compare with")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(material / "stories260k", dtype=torch.float32)
    # Each token is its greedy choice after those before it: so its own greedy story is this one, token by token.
    with torch.no_grad():
        choices = model(torch.tensor(story)).logits.argmax(-1).numpy()
    np.testing.assert_array_equal(story[:, 1:], choices[:, :-1])
