"""Fusing layers by optimal transport: against a reference in NumPy, and on permuted layers."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.errors import UsageError
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import opt_deus, tli

pytest.importorskip("ot", reason="POT is not installed")
SHAPES = {
    "input_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (12, 16),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.o_proj.weight": (16, 12),
    "post_attention_layernorm.weight": (16,),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}


def layers(dtype=np.float32, spread=0.2, L=3):
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, spread, (L, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def sinkhorn(a, b, regularisation=0.06):
    """Transport plan between rows with uniform marginals, columns summing to one, in the log domain and fp64."""
    cost = np.sqrt(np.maximum(((a[:, None] - b[None]) ** 2).sum(-1), 0)) / regularisation
    f, g = np.zeros(len(a)), np.zeros(len(b))

    def log_sum(x, axis):
        top = x.max(axis, keepdims=True)
        return (top + np.log(np.exp(x - top).sum(axis, keepdims=True))).squeeze(axis)

    for _ in range(20_000):
        before, f = f, -log_sum(g[None] - cost, 1) - np.log(len(a))
        g = -log_sum(f[:, None] - cost, 0) - np.log(len(b))
        if np.abs(f - before).max() < 1e-14:
            break
    return np.exp(f[:, None] + g[None] - cost) * len(b)


def fused(stacks, before, after):
    """The definition, tensor by tensor."""
    a = {name: stack[before].astype(np.float64) for name, stack in stacks.items()}
    b = {name: stack[after].astype(np.float64) for name, stack in stacks.items()}
    o = sinkhorn(a["self_attn.o_proj.weight"], b["self_attn.o_proj.weight"])
    a["post_attention_layernorm.weight"] = a["post_attention_layernorm.weight"] @ (o / 2 + np.eye(16) / 2)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        a[name] = a[name] @ o
    return {
        name: (a[name] if a[name].ndim == 1 else sinkhorn(a[name], b[name]).T @ a[name]) / 2 + b[name] / 2 for name in a
    }


@pytest.mark.parametrize("jitted", [False, True])
def test_it_equals_the_definition(jitted):
    stacks = layers()
    plan = tli(3, after=[1], init="transport", scale=1.0)
    grow = lambda stacks: inject({"layers": stacks}, plan)["layers"]  # noqa: E731
    grown = (jax.jit(grow) if jitted else grow)({name: jnp.asarray(stack) for name, stack in stacks.items()})
    expected = fused(stacks, 1, 2)
    for name, stack in stacks.items():
        np.testing.assert_array_equal(grown[name][np.array([0, 1, 3])], stack, name)
        np.testing.assert_allclose(grown[name][2], expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_the_method_zeroes_the_residual_outputs():
    stacks = layers()
    grown = inject({"layers": {name: jnp.asarray(stack) for name, stack in stacks.items()}}, opt_deus(3))["layers"]
    expected = fused(stacks, 0, 1)
    for name in SHAPES:
        zeroed = "o_proj" in name or "down_proj" in name
        np.testing.assert_allclose(grown[name][1], 0 if zeroed else expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_permuted_rows_are_aligned():
    """A layer fused with a permutation of itself is that permutation."""
    stacks = layers(spread=1.0, L=2)
    draw = np.random.default_rng(1)
    order = {name: draw.permutation(shape[0]) for name, shape in SHAPES.items()}
    moved = order["self_attn.o_proj.weight"]
    for name, stack in stacks.items():
        fed = stack[0][:, moved] if name in ("mlp.gate_proj.weight", "mlp.up_proj.weight") else stack[0]
        stack[1] = fed if fed.ndim == 1 else fed[order[name]]
    plan = tli(2, after=[0], init="transport", scale=1.0)
    grown = inject({"layers": {name: jnp.asarray(stack) for name, stack in stacks.items()}}, plan)["layers"]
    for name, stack in stacks.items():
        if stack.ndim == 3:
            np.testing.assert_allclose(grown[name][1], stack[1], rtol=0, atol=1e-5, err_msg=name)


def test_underflow_uses_the_log_domain_and_no_convergence_is_reported(monkeypatch):
    from tli_jax.growth import transport

    stacks = layers(spread=30.0)  # distances of 100 and more: exp(-100 / 0.06) is 0
    plan = tli(3, after=[0], init="transport", scale=1.0)
    made = transport.Transport(plan, lambda layer, name: stacks[name][layer])
    name = "self_attn.q_proj.weight"
    assert np.isfinite(made(1, name)).all() and made.facts["solved"] == 1
    hard = {name: np.random.default_rng(0).normal(0, 0.05, (2, 64, 16)).astype(np.float32)}
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 20)
    monkeypatch.setattr(transport, "REGULARISATION", 0.005)
    made = transport.Transport(tli(2, after=[0], init="transport"), lambda layer, name: hard[name][layer])
    assert np.isfinite(made(1, name)).all()
    assert made.facts == {"solved": 1, "most_iterations": 20, "not_converged": [f"layer 1: {name}"]}


def test_errors(monkeypatch):
    experts = {"mlp.experts.gate_proj.weight": jnp.zeros((2, 4, 8, 8))}
    with pytest.raises(UsageError, match=r"fuses dense layers, mlp\.experts\.gate_proj\.weight has 3 dims"):
        inject({"layers": experts}, opt_deus(2))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(UsageError, match=r"needs POT: pip install POT"):
        inject({"layers": {name: jnp.asarray(stack) for name, stack in layers(L=2).items()}}, opt_deus(2))
