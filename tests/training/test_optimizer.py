"""Schedules and updates: by dims and by group, and the same for a layer whether it is stacked or alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tli_jax.cli.config import TrainConfig
from tli_jax.training.freezing import Layout, group
from tli_jax.training.optimizer import make_optimizer, make_schedule


def rates(**options):
    config = TrainConfig(**{"steps": 100, "learning_rate": 1.0, "final_fraction": 0.1} | options)
    return [float(make_schedule(config, "kept")(step)) for step in range(1, 101)]


def test_cosine():
    found = rates(schedule="cosine", warmup=10)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
    half_way = 0.1 + 0.9 * (1 + np.cos(np.pi * (np.arange(10, 101) - 10) / 90)) / 2
    np.testing.assert_allclose(found[9:], half_way, rtol=1e-5)


def test_wsd():
    found = rates(schedule="wsd", warmup=10, decay_fraction=0.2)
    np.testing.assert_allclose(found[9:80], 1.0)
    np.testing.assert_allclose(found[79:], np.linspace(1.0, 0.1, 21), rtol=1e-5)


def test_constant_and_no_warmup():
    assert rates(schedule="constant") == [1.0] * 100
    assert rates(schedule="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_every_group_has_its_own_rate_and_warmup():
    config = TrainConfig(
        learning_rate={"all": 1.0, "injected": 3.0, "outer": 0.0},
        schedule="constant",
        warmup={"all": 0, "kept": 10},
    )
    at_5 = {name: float(make_schedule(config, name)(5)) for name in ("kept", "injected", "outer")}
    assert at_5 == {"kept": 0.5, "injected": 3.0, "outer": 0.0}


@pytest.fixture(scope="module")
def everything(model, params, injected):
    """All leaves of a model that trains whole, its params by leaf, and gradients."""
    leaves = Layout((True,) * 8, frozenset({"embed_tokens", "norm", "lm_head"}), tuple(injected)).leaves(model)
    trained, _ = group(params, leaves)
    keys = jax.random.split(jax.random.key(7), len(trained))
    gradients = {n: jax.random.normal(k, x.shape) for (n, x), k in zip(trained.items(), keys, strict=True)}
    return leaves, trained, gradients


def update(config, leaves, trained, gradients, steps=2):
    optimizer = make_optimizer(config, leaves)
    state = optimizer.init(trained)
    run = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = run(gradients, state, trained)
    return updates


def test_groups_differ_within_one_stack(everything, injected):
    leaves, trained, gradients = everything
    base = TrainConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0)
    plain = update(base, leaves, trained, gradients)
    other = dataclasses.replace(base, learning_rate={"all": 1e-3, "injected": 5e-3, "outer": 0.0})
    for name, of_group in update(other, leaves, trained, gradients).items():
        if name.startswith("layers."):
            factor = np.where(injected, 5.0, 1.0).reshape(-1, *[1] * (of_group.ndim - 1))
            np.testing.assert_allclose(of_group, plain[name] * factor, rtol=1e-5)
        else:
            assert not np.asarray(of_group).any() and np.asarray(plain[name]).any()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_only_matrices_of_layers_and_the_head_decay(everything, optimizer):
    leaves, trained, gradients = everything
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer=optimizer, weight_decay=0.0)
    without = update(config, leaves, trained, gradients, steps=1)
    with_decay = update(dataclasses.replace(config, weight_decay=0.5), leaves, trained, gradients, steps=1)
    for leaf in leaves:
        difference = np.asarray(with_decay[leaf.name] - without[leaf.name])
        is_matrix = len(leaf.dims) == 3 or leaf.name == "lm_head.weight"
        expected = -0.5 * np.asarray(trained[leaf.name]) * is_matrix
        np.testing.assert_allclose(difference, expected, atol=2e-6, err_msg=leaf.name)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_layer_in_a_stack_is_updated_as_if_alone(everything, optimizer):
    leaves, trained, gradients = everything
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer=optimizer, weight_decay=0.0, clip_norm=0.0)
    stacked = update(config, leaves, trained, gradients)
    alone = [dataclasses.replace(leaf, layers=leaf.layers[:1], groups=leaf.groups[:1]) for leaf in leaves]

    def first(tree):
        return {leaf.name: tree[leaf.name][:1] if leaf.layers else tree[leaf.name] for leaf in leaves}

    for name, one in update(config, alone, first(trained), first(gradients)).items():
        np.testing.assert_allclose(first(stacked)[name], one, rtol=1e-4, atol=1e-6, err_msg=name)


def test_muon_is_for_matrices_of_layers_and_makes_them_orthogonal(everything):
    leaves, trained, gradients = everything
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer="muon", weight_decay=0.0, clip_norm=0.0)
    updates = update(config, leaves, trained, gradients)
    q_LOI = np.asarray(updates["layers.0.0.self_attn.q_proj.weight"])  # [8, 32, 40]
    # Five Newton-Schulz iterations bring singular values near 1, before the size of AdamW's updates.
    singular = np.linalg.svd(q_LOI / (0.2 * 40**0.5), compute_uv=False)
    assert singular.shape == (8, 32) and singular.min() > 0.3 and singular.max() < 1.4
    adam = update(dataclasses.replace(config, optimizer="adamw"), leaves, trained, gradients)
    for leaf in leaves:
        same = np.allclose(updates[leaf.name], adam[leaf.name])
        assert same == (len(leaf.dims) != 3), leaf.name


def test_adamw_is_optax_s(everything):
    leaves, trained, gradients = everything
    config = TrainConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.1, clip_norm=1.0, adam={"b2": 0.99})
    decayed = {leaf.name: len(leaf.dims) == 3 or leaf.name == "lm_head.weight" for leaf in leaves}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b1=0.9, b2=0.99, weight_decay=0.1, mask=decayed)
    )
    state = theirs.init(trained)
    for _ in range(2):
        expected, state = theirs.update(gradients, state, trained)
    for name, ours in update(config, leaves, trained, gradients).items():
        np.testing.assert_allclose(ours, expected[name], rtol=1e-5, atol=1e-9)


def test_moments_in_another_dtype(everything):
    leaves, trained, _ = everything
    state = make_optimizer(TrainConfig(dtypes={"moment": "bfloat16"}), leaves).init(trained)
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype("bfloat16")}
