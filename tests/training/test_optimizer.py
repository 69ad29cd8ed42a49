"""Schedules, and updates that follow dims and groups and treat a stacked layer as a single one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed.mesh import make_mesh
from tli_jax.training.freezing import Layout, group
from tli_jax.training.optimizer import learning_rates, make_optimizer, make_schedule


def rates(**options):
    config = TrainConfig(**{"steps": 100, "learning_rate": 1.0, "final_fraction": 0.1} | options)
    return [float(make_schedule(config, "kept")(step)) for step in range(1, 101)]


def test_cosine():
    rate = rates(schedule="cosine", warmup=10)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * (np.arange(10, 101) - 10) / 90)) / 2
    np.testing.assert_allclose(rate[9:], cosine, rtol=1e-5)


def test_wsd():
    rate = rates(schedule="wsd", warmup=10, decay_fraction=0.2)
    np.testing.assert_allclose(rate[9:80], 1.0)
    np.testing.assert_allclose(rate[79:], np.linspace(1.0, 0.1, 21), rtol=1e-5)


def test_constant_with_and_without_warmup():
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
def trainable(model, params, injected):
    """Specs, params and random gradients of a model without frozen parameters."""
    specs = Layout((True,) * 8, frozenset({"embed_tokens", "norm", "lm_head"}), tuple(injected)).param_specs(model)
    trained, _ = group(params, specs)
    keys = jax.random.split(jax.random.key(7), len(trained))
    gradients = {n: jax.random.normal(k, x.shape) for (n, x), k in zip(trained.items(), keys, strict=True)}
    return specs, trained, gradients


def update(config, specs, trained, gradients, steps=2):
    optimizer = make_optimizer(config, specs, make_mesh({}))
    state = optimizer.init(trained)
    run = jax.jit(optimizer.update)
    for step in range(1, steps + 1):
        updates, state = run(gradients, state, trained, rates=learning_rates(config, step))
    return updates


def test_groups_differ_within_a_stack(trainable, injected):
    specs, trained, gradients = trainable
    base = TrainConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0)
    plain = update(base, specs, trained, gradients)
    other = dataclasses.replace(base, learning_rate={"all": 1e-3, "injected": 5e-3, "outer": 0.0})
    for name, grouped in update(other, specs, trained, gradients).items():
        if name.startswith("layers."):
            factor = np.where(injected, 5.0, 1.0).reshape(-1, *[1] * (grouped.ndim - 1))
            np.testing.assert_allclose(grouped, plain[name] * factor, rtol=1e-5)
        else:
            assert not np.asarray(grouped).any() and np.asarray(plain[name]).any()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_weight_decay_is_for_layer_matrices_and_the_head(trainable, optimizer):
    specs, trained, gradients = trainable
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer=optimizer, weight_decay=0.0)
    without = update(config, specs, trained, gradients, steps=1)
    with_decay = update(dataclasses.replace(config, weight_decay=0.5), specs, trained, gradients, steps=1)
    for spec in specs:
        difference = np.asarray(with_decay[spec.name] - without[spec.name])
        is_matrix = len(spec.dims) == 3 or spec.name == "lm_head.weight"
        expected = -0.5 * np.asarray(trained[spec.name]) * is_matrix
        np.testing.assert_allclose(difference, expected, atol=2e-6, err_msg=spec.name)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_stacked_layer_is_updated_like_a_single_one(trainable, optimizer):
    specs, trained, gradients = trainable
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer=optimizer, weight_decay=0.0, clip_norm=0.0)
    stacked = update(config, specs, trained, gradients)
    alone = [dataclasses.replace(spec, layers=spec.layers[:1], groups=spec.groups[:1]) for spec in specs]

    def first(tree):
        return {spec.name: tree[spec.name][:1] if spec.layers else tree[spec.name] for spec in specs}

    for name, single in update(config, alone, first(trained), first(gradients)).items():
        np.testing.assert_allclose(first(stacked)[name], single, rtol=1e-4, atol=1e-6, err_msg=name)


def test_muon_orthogonalizes_layer_matrices_only(trainable):
    specs, trained, gradients = trainable
    config = TrainConfig(learning_rate=1.0, schedule="constant", optimizer="muon", weight_decay=0.0, clip_norm=0.0)
    updates = update(config, specs, trained, gradients)
    q_LOI = np.asarray(updates["layers.0.0.self_attn.q_proj.weight"])  # [8, 32, 40]
    # Before the scale of AdamW's updates, five Newton-Schulz iterations bring singular values near 1.
    singular = np.linalg.svd(q_LOI / (0.2 * 40**0.5), compute_uv=False)
    assert singular.shape == (8, 32) and singular.min() > 0.3 and singular.max() < 1.4
    adam = update(dataclasses.replace(config, optimizer="adamw"), specs, trained, gradients)
    for spec in specs:
        same = np.allclose(updates[spec.name], adam[spec.name])
        assert same == (len(spec.dims) != 3), spec.name


def test_muon_on_a_mesh_equals_optax(build):
    """Two steps on a mesh against ``optax.contrib.scale_by_muon`` on whole stacks."""
    trainer, trained, _ = build(optimizer="muon", mesh={"data": 2, "fsdp": 2, "tensor": 2}, weight_decay=0.0)
    name = "layers.0.0.mlp.up_proj.weight"
    dims = optax.contrib.MuonDimensionNumbers(2, 1)
    theirs = optax.contrib.scale_by_muon(mu_dtype="float32", weight_dimension_numbers=lambda updates: dims)
    state, their_state = trainer.optimizer.init(trained), theirs.init(trained[name])
    for step in range(2):
        slopes = {n: jax.random.normal(jax.random.key(step), x.shape) for n, x in trained.items()}
        clipped = optax.clip_by_global_norm(1.0).update(slopes, optax.EmptyState())[0]
        updates, state = jax.jit(trainer.optimizer.update)(slopes, state, trained, rates=jnp.ones(3))
        expected, their_state = theirs.update(clipped[name], their_state)
    scale = 0.2 * max(trained[name].shape[-2:]) ** 0.5
    np.testing.assert_allclose(updates[name], -scale * expected, rtol=0, atol=1e-5)


def test_adamw_equals_optax(trainable):
    specs, trained, gradients = trainable
    config = TrainConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.1, clip_norm=1.0, adam={"b2": 0.99})
    decayed = {spec.name: len(spec.dims) == 3 or spec.name == "lm_head.weight" for spec in specs}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b1=0.9, b2=0.99, weight_decay=0.1, mask=decayed)
    )
    state = theirs.init(trained)
    for _ in range(2):
        expected, state = theirs.update(gradients, state, trained)
    for name, actual in update(config, specs, trained, gradients).items():
        np.testing.assert_allclose(actual, expected[name], rtol=1e-5, atol=1e-9)


def test_moments_in_another_dtype(trainable):
    specs, trained, _ = trainable
    state = make_optimizer(TrainConfig(dtypes={"moment": "bfloat16"}), specs, make_mesh({})).init(trained)
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype("bfloat16")}
