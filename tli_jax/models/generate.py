"""Greedy or sampled continuation of a prompt."""

import functools

import jax
import jax.numpy as jnp

from tli_jax.errors import UsageError
from tli_jax.models.attention import make_cache
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama, Params


def generate_tokens(
    config: LlamaConfig,
    params: Params,
    prompt_BT: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    cached: bool = True,
) -> jax.Array:
    """Continue a prompt.

    Args:
        prompt_BT: int token ids ``[B, T]``.
        temperature: 0 is greedy; else tokens are sampled from ``softmax(logits / temperature)``.
        key: the random key for sampling; the same key gives the same tokens.
        cached: False runs the complete sequence for every token instead of using a KV cache. Equal up to rounding.

    Returns:
        int32 ``[B, T + max_new_tokens]``, prompt included. Once a row has generated one of ``config.eos_token_ids``, it
        repeats that token to its end.

    Raises:
        UsageError: an empty prompt, no new tokens, more positions than the model has, a negative temperature, or
            sampling without a key.

    Example:
        >>> config, params = tli_jax.load_hf("embedded")
        >>> tli_jax.generate_tokens(config, params, jnp.array([[1, 5, 9]]), 20)
    """
    T, limit = prompt_BT.shape[1], config.max_position_embeddings
    if T < 1 or max_new_tokens < 1:
        raise UsageError(f"prompt of {T} tokens, max_new_tokens {max_new_tokens}: both must be at least 1")
    if T + max_new_tokens > limit:
        raise UsageError(
            f"prompt of {T} tokens + max_new_tokens {max_new_tokens} = {T + max_new_tokens}, but the model has "
            f"max_position_embeddings {limit}: ask for at most {max(0, limit - T)}"
        )
    if not temperature >= 0:  # also refuses NaN
        raise UsageError(f"temperature {temperature} must be 0 (greedy) or above")
    if temperature > 0 and key is None:
        raise UsageError(
            f"temperature {temperature} samples tokens: pass key, such as jax.random.key(0), or temperature 0"
        )
    return _generate(config, max_new_tokens, cached, params, prompt_BT, temperature, key if temperature > 0 else None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    config: LlamaConfig,
    new: int,
    cached: bool,
    params: Params,
    prompt_BT: jax.Array,
    temperature: float,
    key: jax.Array | None,
) -> jax.Array:
    B, T = prompt_BT.shape
    model = Llama.from_params(config, params)
    eos_E = jnp.array(config.eos_token_ids, jnp.int32)

    def choose(i, x_BD, last_B, done_B):
        logits_BV = model.logits(x_BD).astype(jnp.float32)
        if key is None:
            next_B = jnp.argmax(logits_BV, axis=-1)
        else:
            next_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / temperature)
        next_B = jnp.where(done_B, last_B, next_B.astype(jnp.int32))
        return next_B, done_B | jnp.isin(next_B, eos_E)

    def cached_step(carry, i):
        cache, last_B, done_B = carry
        x_B1D, cache, _ = model.hidden(last_B[:, None], cache)
        next_B, done_B = choose(i, x_B1D[:, 0], last_B, done_B)
        return (cache, next_B, done_B), next_B

    def uncached_step(carry, i):
        tokens_BS, done_B = carry
        last = T - 1 + i
        # Tokens after `last` are padding, hidden by the causal mask.
        x_BSD, _, _ = model.hidden(tokens_BS)
        next_B, done_B = choose(i, x_BSD[:, last], tokens_BS[:, last], done_B)
        return (tokens_BS.at[:, last + 1].set(next_B), done_B), None

    prompt_BT, done_B = prompt_BT.astype(jnp.int32), jnp.zeros(B, bool)
    if not cached:
        padded_BS = jnp.pad(prompt_BT, ((0, 0), (0, new)))
        return jax.lax.scan(uncached_step, (padded_BS, done_B), jnp.arange(new))[0][0]
    # The last new token is never fed back, so it needs no slot.
    x_BTD, cache, _ = model.hidden(prompt_BT, make_cache(config, params, B, T + new - 1))
    first_B, done_B = choose(0, x_BTD[:, -1], prompt_BT[:, -1], done_B)
    _, rest_NB = jax.lax.scan(cached_step, (cache, first_B, done_B), jnp.arange(1, new))
    return jnp.concatenate([prompt_BT, first_B[:, None], rest_NB.T], axis=1)
