"""The model as a pytree: the module has the params' structure and depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tli_jax.models.attention import make_cache
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Llama, forward, init_params

SIZES = {"vocab_size": 19, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "head_dim": 8}
TIED = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5)
UNTIED = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7))


def same(a, b) -> bool:
    """Equal trees: structure, dtypes and every bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_module_is_a_pytree_equal_to_the_params(config, random_params):
    params = random_params(config)
    module = Llama.from_params(config, params)
    assert same(nnx.to_pure_dict(nnx.state(module)), params)
    assert len(jax.tree.leaves(module)) == len(jax.tree.leaves(params))
    # Transforming the module as a pytree transforms its params.
    doubled = jax.tree.map(lambda x: 2 * x, module)
    assert isinstance(doubled, Llama)
    assert same(nnx.to_pure_dict(nnx.state(doubled)), jax.tree.map(lambda x: 2 * x, params))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_module_passes_through_jit_and_grad(config, random_params):
    params = random_params(config)

    def spread(model):
        logits = (model if isinstance(model, Llama) else Llama.from_params(config, model))(TOKENS)
        return logits.std(), logits

    step = jax.jit(jax.grad(spread, has_aux=True))
    module_grads, logits = step(Llama.from_params(config, params))
    params_grads, expected = step(params)
    assert isinstance(module_grads, Llama)
    np.testing.assert_array_equal(logits, expected)
    module_grads = nnx.to_pure_dict(nnx.state(module_grads))
    assert jax.tree.structure(module_grads) == jax.tree.structure(params_grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), module_grads, params_grads)
    assert all(float(np.abs(g).max()) > 1e-5 for g in jax.tree.leaves(params_grads))


def test_the_depth_is_that_of_the_leaves(random_params):
    params = random_params(UNTIED)
    twice = params | {"layers": jax.tree.map(lambda x: np.repeat(x, 2, axis=0), params["layers"])}
    deep = UNTIED.with_layers(6)
    # The config has 3 layers and the params 6: the params decide.
    np.testing.assert_array_equal(forward(UNTIED, twice, TOKENS), forward(deep, twice, TOKENS))
    assert np.abs(forward(UNTIED, twice, TOKENS) - forward(UNTIED, params, TOKENS)).max() > 1e-2
    assert make_cache(UNTIED, twice, 2, 5).k.shape == (6, 2, 5, 2, 8)


def test_a_layer_without_residual_outputs_changes_nothing(random_params):
    params = random_params(UNTIED)
    layers = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), params["layers"])
    for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        layers[part][name]["weight"][1::2] = 0
    np.testing.assert_array_equal(forward(UNTIED, params | {"layers": layers}, TOKENS), forward(UNTIED, params, TOKENS))


def test_attention_is_causal_and_sees_all_earlier_tokens(random_params):
    params = random_params(UNTIED)
    before = forward(UNTIED, params, TOKENS)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 19
    difference_BT = np.abs(forward(UNTIED, params, changed) - before).max(axis=-1)
    assert (difference_BT[:, :3] == 0).all()
    assert (difference_BT[:, 3:] > 0).all()


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_initial_params_have_the_shapes_of_the_table(config):
    abstract = jax.eval_shape(lambda key: init_params(config, key, jnp.bfloat16), jax.random.key(0))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(abstract))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == config.num_params
    for name, dims in config.layer_tensors.items():
        leaf = abstract["layers"]
        for part in name.split("."):
            leaf = leaf[part]
        assert leaf.shape == (3, *config.shape(dims)), name
    assert ("lm_head" in abstract) == (not config.tie_word_embeddings)


def test_initial_params_depend_on_key_and_initializer_range():
    params = init_params(UNTIED, jax.random.key(0))
    assert same(params, init_params(UNTIED, jax.random.key(0)))
    assert not same(params, init_params(UNTIED, jax.random.key(1)))
    assert (params["norm"]["weight"] == 1).all() and (params["layers"]["input_layernorm"]["weight"] == 1).all()
    up = params["layers"]["mlp"]["up_proj"]["weight"]
    assert np.std(up) == pytest.approx(0.3, rel=0.05) and np.mean(up) == pytest.approx(0, abs=0.03)
    assert not np.array_equal(up, params["layers"]["mlp"]["gate_proj"]["weight"])
    assert not np.array_equal(up[0], up[1])
