"""Exact growth of a trained model: logits, gradients, and generation with a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.growth.inject import inject
from tli_jax.growth.methods import dus, tli
from tli_jax.growth.plan import Plan
from tli_jax.hf.load import load_hf
from tli_jax.models.config import LlamaConfig
from tli_jax.models.generate import generate_tokens
from tli_jax.models.llama import Llama, forward
from tli_jax.models.loss import token_losses

Stories = tuple[LlamaConfig, dict[str, Any], jax.Array]


@pytest.fixture(scope="module")
def stories(material) -> Stories:
    """A trained model with five layers, and tokens ``[1, 128]`` of a text like its training data."""
    config, params = load_hf(material / "stories260k")
    with np.load(material / "stories260k" / "reference.npz") as reference:
        return config, params, jnp.asarray(reference["input_ids"][:, :128])


def grow(params: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """As one program, which compiles faster than many small ones."""
    return jax.jit(lambda params: inject(params, plan))(params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_identity_growth_changes_no_logit(stories: Stories, dtype: Any):
    """``forward`` scans one block, compiled once per depth."""
    config, params, tokens_BT = stories
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    logits = forward(config, params, tokens_BT)
    assert logits.dtype == dtype and np.isfinite(logits.astype(np.float32)).all()
    for plan, depth in ((tli(5, 1), 10), (tli(5, 2), 7)):
        assert plan.is_exact
        grown = grow(params, plan)
        assert grown["layers"]["input_layernorm"]["weight"].shape[0] == len(plan) == depth
        # By NumPy: on a CPU, a maximum by XLA can ignore NaN.
        np.testing.assert_array_equal(forward(config, grown, tokens_BT), logits, str(plan))


@pytest.mark.parametrize("plan", [tli(5, 2, "half"), dus(5, 1)], ids=lambda plan: plan.method)
def test_inexact_growth_changes_the_logits(stories: Stories, plan: Plan):
    config, params, tokens_BT = stories
    assert not plan.is_exact
    difference = jnp.abs(forward(config, grow(params, plan), tokens_BT) - forward(config, params, tokens_BT)).max()
    assert difference > 0.01


def test_cached_generation_equals_uncached_and_the_bases(stories: Stories):
    config, params, _ = stories
    prompt = jnp.full((1, 1), config.bos_token_id)
    base = generate_tokens(config, params, prompt, 60)
    grown = grow(params, tli(5, 2))
    np.testing.assert_array_equal(generate_tokens(config, grown, prompt, 60), base)
    np.testing.assert_array_equal(generate_tokens(config, grown, prompt, 60, cached=False), base)
    # A cache that mixes up layers would go unnoticed if injected layers add nothing.
    grown = grow(params, tli(5, 2, "half"))
    cached = generate_tokens(config, grown, prompt, 60)
    np.testing.assert_array_equal(cached, generate_tokens(config, grown, prompt, 60, cached=False))
    assert (cached != base).any()


def test_at_first_only_residual_outputs_of_injected_layers_have_a_gradient(stories: Stories):
    """With residual outputs 0, the loss does not depend on the other tensors of the layer."""
    config, params, tokens_BT = stories
    plan = tli(5, 2)

    @jax.jit
    def gradient(params: dict[str, Any]) -> dict[str, Any]:
        return jax.grad(lambda params: token_losses(Llama.from_params(config, params), tokens_BT)[0].mean())(params)

    gradients = gradient(grow(params, plan))
    injected = np.asarray(plan.injected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients["layers"]):
        is_output = path[-2].key in ("o_proj", "down_proj")
        largest = np.abs(leaf).reshape(len(plan), -1).max(axis=1)
        assert (largest[injected] > 0).all() if is_output else (largest[injected] == 0).all()
        assert (largest[~injected] > 0).all()
