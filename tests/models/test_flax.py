"""The model as Flax users know it: rngs, from_params, split and merge, sharding metadata, summaries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tli_jax
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import tli
from tli_jax.models.attention import make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import MLP, Block, Llama, forward, init_params
from tli_jax.models.modules import Embed, Linear, RMSNorm
from tli_jax.models.moe import MixtureOfExperts
from tli_jax.models.tree import nest, pick

CONFIG = LlamaConfig(19, 24, 20, 4, 4, 2, 8, tie_word_embeddings=True)
MIXTURE = dataclasses.replace(CONFIG, num_experts=3, experts_per_token=2, tie_word_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7))


@functools.cache
def make_params(config: LlamaConfig):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(7))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_rngs_and_init_params_are_one_initialisation(config):
    model = jax.jit(lambda key: Llama(config, rngs=nnx.Rngs(key)))(jax.random.key(7))
    assert_equal(nnx.to_pure_dict(nnx.state(model)), make_params(config))
    # The values themselves: the key of a tensor is folded in by its position among the sorted names.
    names = sorted([*config.outer_tensors, *(f"layers.{name}" for name in config.layer_tensors)])
    for number, name in enumerate(names):
        leaf = pick(make_params(config), name)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), number), leaf.shape)
        expected = 1.0 if "norm" in name else noise * config.initializer_range
        np.testing.assert_allclose(leaf, np.broadcast_to(expected, leaf.shape), rtol=1e-6, err_msg=name)


def test_param_dtype():
    model = jax.eval_shape(lambda: Llama(MIXTURE, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_from_params_copies_nothing(config):
    params = make_params(config)
    model = Llama.from_params(config, params)
    for name in config.outer_tensors:
        assert pick(nnx.to_pure_dict(nnx.state(model)), name) is pick(params, name)
    assert model.layers.self_attn.q_proj.weight[...] is params["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_allclose(model(TOKENS), forward(config, params, TOKENS), atol=1e-6)
    source = dataclasses.replace(config, source='{"a": 1}')  # equal, but not the same
    assert Llama.from_params(source, params).config.source == source.source


def test_modules_of_a_single_layer():
    params = jax.tree.map(lambda leaf: leaf[2], make_params(CONFIG)["layers"])
    block = Block.from_params(CONFIG, params)
    assert_equal(nnx.to_pure_dict(nnx.state(block)), params)
    x_BTD = jnp.ones((1, 3, 24))
    out, (k, v), balance_loss = jax.jit(lambda block: block(x_BTD, rope=make_rope(CONFIG, 3, jnp.float32)))(block)
    assert (out.shape, k.shape, v.shape, balance_loss) == ((1, 3, 24), (1, 3, 2, 8), (1, 3, 2, 8), None)
    norm = RMSNorm.from_params(params["input_layernorm"], 1e-6)
    assert norm.weight[...] is params["input_layernorm"]["weight"]


def test_constructors_take_sizes_and_rngs():
    rngs = nnx.Rngs(0)
    x = jnp.ones((2, 5, 24))
    assert Linear(24, 6, rngs=rngs)(x).shape == (2, 5, 6)
    assert RMSNorm(24, rngs=rngs)(x).shape == (2, 5, 24)
    embed = Embed(19, 24, rngs=rngs)
    assert embed(TOKENS).shape == (2, 7, 24) and embed.attend(x).shape == (2, 5, 19)
    assert MLP(CONFIG, rngs=rngs)(x).shape == (2, 5, 24)
    assert MixtureOfExperts(MIXTURE, rngs=rngs)(x)[0].shape == (2, 5, 24)
    assert not np.array_equal(Linear(24, 6, rngs=rngs).weight[...], Linear(24, 6, rngs=rngs).weight[...])


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_sharding_metadata_is_the_tensor_table(config):
    params = make_params(config)
    expected = nest({**config.outer_tensors, **{f"layers.{n}": ("L", *d) for n, d in config.layer_tensors.items()}})

    def dims(module):
        variables = nnx.to_flat_state(nnx.state(module))
        return nest({".".join(map(str, path)): variable.out_sharding for path, variable in variables})

    assert dims(Llama.from_params(config, params)) == expected
    assert dims(jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))) == expected
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    assert dims(Block.from_params(config, layer)) == nest(config.layer_tensors)
    periods = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), params["layers"])
    grouped = Llama.from_params(config, {**params, "layers": [[periods]]})
    assert grouped.layers[0][0].input_layernorm.weight.out_sharding == (None, "L", "D")
    np.testing.assert_allclose(grouped(TOKENS), forward(config, params, TOKENS), atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_metadata_constrains_nothing_by_itself():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = make_params(CONFIG)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda params: Llama.from_params(CONFIG, params)(TOKENS))(params)
    np.testing.assert_allclose(logits, forward(CONFIG, params, TOKENS), atol=1e-6)
    # Flax's own way from the letters to shardings.
    with nnx.logical_axis_rules([("D", "x"), ("L", None), ("V", None), ("F", None), ("Hh", None), ("Kh", None)]):
        specs = nnx.get_partition_spec(nnx.state(Llama.from_params(CONFIG, params)))
    assert specs["layers"]["mlp"]["up_proj"]["weight"].get_value() == jax.sharding.PartitionSpec(None, None, "x")


def test_split_inject_merge():
    model, plan = Llama.from_params(CONFIG, make_params(CONFIG)), tli(4, 2)
    graphdef, state = nnx.split(model)
    grown = nnx.merge(graphdef, inject(state, plan))
    assert grown.layers.mlp.up_proj.weight.shape == (6, 20, 24)
    assert grown.layers.mlp.up_proj.weight.out_sharding == ("L", "F", "D")
    np.testing.assert_array_equal(grown(TOKENS), model(TOKENS))
    for other in (inject(model, plan), nnx.jit(inject, static_argnums=1)(model, plan)):
        assert_equal(nnx.state(other), nnx.state(grown))


def test_computed_layers_are_the_same_in_modules_and_dicts():
    """The random key of a tensor is made from its name, so a module must name it as the params do."""
    params = make_params(MIXTURE)
    plan = tli(4, 4, "noise")
    router_and_experts = {"layers": {"block_sparse_moe": params["layers"]["block_sparse_moe"]}}
    grown = inject(router_and_experts, plan)
    module = nnx.split(Llama.from_params(MIXTURE, params))[1]
    of_state = inject(nnx.State({"layers": {"block_sparse_moe": module["layers"]["block_sparse_moe"]}}), plan)
    assert_equal(nnx.to_pure_dict(of_state), grown)


def test_summaries_name_the_layers_and_the_parameters(capsys):
    model = Llama.from_params(CONFIG, make_params(CONFIG))
    total = f"{CONFIG.num_params:,}"
    nnx.display(model)
    shown = capsys.readouterr().out
    assert f"Llama( # Param: {total}" in shown and "out_sharding=('L', 'F', 'D')" in shown
    console = {"width": 200, "force_terminal": False}
    table = nnx.tabulate(model, jnp.asarray(TOKENS), console_kwargs=console)
    assert f"Total Parameters: {total}" in table
    for name in ("embed_tokens", "layers/self_attn/q_proj", "layers/mlp/up_proj", "layers/input_layernorm", "norm"):
        assert name in table


def test_the_functional_api_has_the_same_model():
    assert tli_jax.Llama is Llama and tli_jax.init_params is init_params
