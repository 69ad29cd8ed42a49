"""Experts: both dispatches against a reference, and against Mixtral in transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.models.config import LlamaConfig
from tli_jax.models.generate import generate_tokens
from tli_jax.models.llama import ForwardOptions, Llama, forward, init_params
from tli_jax.models.loss import token_losses
from tli_jax.models.moe import chosen_experts, every_expert, route

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 8, tie_word_embeddings=False, num_experts=8, experts_per_token=2)


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(0)
    shapes = {"x": (2, 12, 16), "gate": (8, 16), "w1": (8, 24, 16), "w2": (8, 16, 24), "w3": (8, 24, 16)}
    return {name: jnp.asarray(draw.normal(0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}


def reference(weights, k):
    """One token and one expert at a time, in fp64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    out = np.zeros_like(w["x"])
    for place in np.ndindex(w["x"].shape[:2]):
        x = w["x"][place]
        logits = w["gate"] @ x
        odds = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-odds)[:k]
        for e in chosen:
            gate, up = w["w1"][e] @ x, w["w3"][e] @ x
            out[place] += odds[e] / odds[chosen].sum() * (w["w2"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dispatch", [every_expert, chosen_experts])
def test_dispatch_equals_the_definition(weights, dispatch, k):
    routing, _ = route(weights["x"], weights["gate"], k)
    np.testing.assert_allclose(routing.weights.sum(-1), 1, rtol=1e-6)
    out = dispatch(weights["x"], routing, weights["w1"], weights["w2"], weights["w3"])
    np.testing.assert_allclose(out, reference(weights, k), rtol=0, atol=1e-6)


def test_both_dispatches_have_the_same_gradients(weights):
    def loss(weights, dispatch):
        routing, balance = route(weights["x"], weights["gate"], 2)
        return jnp.square(dispatch(weights["x"], routing, weights["w1"], weights["w2"], weights["w3"])).sum() + balance

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    first, second = (gradients(weights, dispatch) for dispatch in (every_expert, chosen_experts))
    for name, gradient in first.items():
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(gradient, second[name], rtol=0, atol=1e-5, err_msg=name)


def test_shards_of_the_experts_sum_to_the_result(weights):
    routing, _ = route(weights["x"], weights["gate"], 2)
    whole = chosen_experts(weights["x"], routing, weights["w1"], weights["w2"], weights["w3"])
    parts = [
        chosen_experts(weights["x"], routing, *(weights[name][first : first + 2] for name in ("w1", "w2", "w3")), first)
        for first in range(0, 8, 2)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=0, atol=1e-6)


def test_the_load_balancing_loss_is_1_if_even():
    even = jnp.eye(8)[None]  # token i for expert i alone
    assert route(even, 50 * jnp.eye(8), 1)[1] == pytest.approx(1, abs=1e-6)
    uneven = jnp.ones((1, 8, 8)) * jnp.eye(8)[0]
    assert route(uneven, 50 * jnp.eye(8), 1)[1] == pytest.approx(8, rel=1e-6)
    assert route(jnp.zeros((1, 8, 8)), jnp.eye(8), 2)[1] == pytest.approx(1, abs=1e-6)  # ties: even odds


def test_sizes_and_names():
    params = init_params(CONFIG, jax.random.key(0))
    leaves = params["layers"]["block_sparse_moe"]
    assert leaves["gate"]["weight"].shape == (3, 8, 32)
    assert [leaves["experts"][name]["weight"].shape for name in ("w1", "w2", "w3")] == [
        *((3, 8, 48, 32), (3, 8, 32, 48), (3, 8, 48, 32)),
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == CONFIG.num_params
    assert CONFIG.num_params - CONFIG.num_active_params == 3 * 6 * 3 * 48 * 32
    dense = dataclasses.replace(CONFIG, num_experts=0, experts_per_token=0)
    assert CONFIG.flops_per_token(16) - dense.flops_per_token(16) == 3 * 2 * (3 * 48 * 32 + 8 * 32)
    assert CONFIG.stored_tensors("block_sparse_moe.experts.w2.weight")[7] == "block_sparse_moe.experts.7.w2.weight"


def test_both_dispatches_in_a_complete_model():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 64)
    model = Llama.from_params(CONFIG, params)
    one, other = (
        token_losses(model, tokens, options=ForwardOptions(dispatch=dispatch))
        for dispatch in (every_expert, chosen_experts)
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert 1 <= one[2] < 2 and one[2] == pytest.approx(float(other[2]), rel=1e-6)


def test_cached_generation_equals_uncached():
    params = init_params(dataclasses.replace(CONFIG, initializer_range=0.3), jax.random.key(0))
    prompt = jnp.asarray([[5, 9, 11]])
    cached = generate_tokens(CONFIG, params, prompt, 12)
    np.testing.assert_array_equal(cached, generate_tokens(CONFIG, params, prompt, 12, cached=False))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A random Mixtral, created and saved by transformers, and the model itself."""
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_local_experts=4,
        initializer_range=0.2,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    model.save_pretrained(folder)
    return folder, model


def test_parity_with_transformers(mixtral):
    import torch

    from tli_jax.hf.load import load_hf

    folder, model = mixtral
    config, params = load_hf(folder)
    assert (config.num_experts, config.experts_per_token, config.rope_theta) == (4, 2, 1e6)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = forward(config, params, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_gradients_equal_those_of_transformers(mixtral):
    import torch

    from tli_jax.hf.load import load_hf

    folder, model = mixtral
    config, params = load_hf(folder)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    ids = torch.tensor(tokens)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: token_losses(Llama.from_params(config, params), jnp.asarray(tokens))[0].mean())(
            params
        )

    gradients = gradient(params)
    experts = gradients["layers"]["block_sparse_moe"]
    for i, layer in enumerate(model.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.grad.numpy(), layer.mlp.experts.down_proj.grad.numpy()
        expected = {"w1": gate_up[:, :48], "w3": gate_up[:, 48:], "w2": down}
        for name, gradient in expected.items():
            np.testing.assert_allclose(
                experts["experts"][name]["weight"][i], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max()
            )
        router = layer.mlp.gate.weight.grad.numpy()
        np.testing.assert_allclose(experts["gate"]["weight"][i], router, rtol=0, atol=1e-4 * np.abs(router).max())
