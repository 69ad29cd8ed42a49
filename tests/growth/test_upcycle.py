"""Turning dense feed-forwards into experts, against the definitions in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.experts import UPCYCLES, Experts
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import dus, moe, tli
from tli_jax.growth.plan import Plan
from tli_jax.growth.upcycle import upcycle
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import forward, init_params

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 8, initializer_range=0.2)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def parts(params, experts):
    grown = upcycle(params, experts)["layers"]["block_sparse_moe"]
    return np.asarray(grown["gate"]["weight"]), {name: np.asarray(w["weight"]) for name, w in grown["experts"].items()}


def of_dense(params):
    mlp = params["layers"]["mlp"]
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return {name: np.asarray(mlp[dense]["weight"]) for name, dense in names.items()}


def test_copy(params):
    router, experts = parts(params, Experts(count=4, router_std=0.3))
    for name, dense in of_dense(params).items():
        np.testing.assert_array_equal(experts[name], np.broadcast_to(dense[:, None], experts[name].shape))
    assert router.shape == (3, 4, 32) and router.std() == pytest.approx(0.3, rel=0.1)
    assert len({row.tobytes() for row in router.reshape(-1, 32)}) == 12


def test_other_tensors_are_unchanged(params):
    grown = upcycle(params, Experts(count=2))
    assert set(grown["layers"]) == set(params["layers"]) - {"mlp"} | {"block_sparse_moe"}
    for name in ("self_attn", "input_layernorm", "post_attention_layernorm"):
        assert grown["layers"][name] is params["layers"][name]
    assert grown["embed_tokens"] is params["embed_tokens"] and "mlp" in params["layers"]


def test_noise(params):
    _, experts = parts(params, Experts(count=4, upcycle="noise", ratio=0.1))
    for name, dense in of_dense(params).items():
        noise = experts[name] - dense[:, None]
        for layer in range(3):
            rms = np.sqrt((dense[layer] ** 2).mean())
            assert noise[layer].std(axis=(1, 2)) == pytest.approx([0.1 * rms] * 4, rel=0.1)
        assert len({one.tobytes() for one in noise.reshape(12, -1)}) == 12


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop(params, ratio):
    _, experts = parts(params, Experts(count=3, upcycle="drop", ratio=ratio))
    dense = of_dense(params)
    for layer in range(3):
        chosen = []
        for expert in range(3):
            new = {name: experts[name][layer, expert] != dense[name][layer] for name in dense}
            rows = new["w1"].all(axis=1)
            chosen.append(rows)
            assert rows.sum() == round(ratio * 48)
            # The same units of F in all three matrices, as complete rows and columns.
            np.testing.assert_array_equal(new["w1"], np.broadcast_to(rows[:, None], (48, 32)))
            np.testing.assert_array_equal(new["w3"], np.broadcast_to(rows[:, None], (48, 32)))
            np.testing.assert_array_equal(new["w2"], np.broadcast_to(rows[None], (32, 48)))
            for name in dense:
                before, after = dense[name][layer][new[name]], experts[name][layer, expert][new[name]]
                assert after.mean() == pytest.approx(before.mean(), abs=5 * before.std() / np.sqrt(before.size))
                assert after.std() == pytest.approx(before.std(), rel=0.15)
        assert ratio == 1 or (chosen[0] != chosen[1]).any()


def test_virtual_groups(params):
    router, experts = parts(params, Experts(count=2, granularity=3, top_k=3, upcycle="virtual_groups"))
    dense = of_dense(params)
    assert (
        router.shape == (3, 6, 32) and experts["w1"].shape == (3, 6, 16, 32) and experts["w2"].shape == (3, 6, 32, 16)
    )
    for expert in range(6):
        part = slice(16 * (expert % 3), 16 * (expert % 3 + 1))
        np.testing.assert_array_equal(experts["w1"][:, expert], dense["w1"][:, part])
        np.testing.assert_array_equal(experts["w3"][:, expert], dense["w3"][:, part])
        np.testing.assert_array_equal(experts["w2"][:, expert], 3 * dense["w2"][:, :, part])
        np.testing.assert_array_equal(router[:, expert], router[:, expert // 3 * 3])
    assert (router[:, 0] != router[:, 3]).all()
    published = Experts(count=2, granularity=3, top_k=3, upcycle="virtual_groups_published")
    _, scaled = parts(params, published)
    factor = (2 * 9 / 3) ** (1 / 3)
    for name, g in (("w1", 1), ("w2", 3), ("w3", 1)):
        np.testing.assert_allclose(scaled[name], factor / g * experts[name], rtol=1e-6)


@pytest.mark.parametrize(
    "experts",
    [
        Experts(),
        Experts(count=4, top_k=1),
        Experts(count=4, top_k=4),
        Experts(count=4, granularity=2, top_k=4, upcycle="virtual_groups"),
        Experts(count=3, granularity=4, top_k=4, upcycle="virtual_groups"),
        Experts(count=4, upcycle="noise", ratio=0.0),
        Experts(count=4, upcycle="noise", ratio=0.3),
        Experts(count=4, upcycle="drop"),
        Experts(count=4, granularity=2, top_k=4, upcycle="virtual_groups_published"),
    ],
    ids=lambda experts: f"{experts.upcycle}-{experts.count}-{experts.top_k}-{experts.granularity}-{experts.ratio}",
)
def test_the_guarantee_holds_exactly_where_it_is_given(params, experts):
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
    before = forward(CONFIG, params, tokens)
    F = CONFIG.intermediate_size // experts.granularity
    config = dataclasses.replace(
        CONFIG, num_experts=experts.total, experts_per_token=experts.top_k, intermediate_size=F
    )
    after = forward(config, upcycle(params, experts), tokens)
    difference = float(jnp.abs(after - before).max() / jnp.abs(before).max())
    assert (difference < 1e-5) if experts.is_exact else (difference > 1e-3), difference


def test_jit_and_eval_shape_agree(params):
    for upcycle_name in UPCYCLES:
        G = 2 if upcycle_name.startswith("virtual") else 1
        experts = Experts(count=2, granularity=G, top_k=2, upcycle=upcycle_name)
        plain, jitted = upcycle(params, experts), jax.jit(lambda params: upcycle(params, experts))(params)  # noqa: B023
        shapes = jax.eval_shape(lambda params: upcycle(params, experts), params)  # noqa: B023
        for a, b, shape in zip(*map(jax.tree.leaves, (plain, jitted, shapes)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert (a.shape, a.dtype) == (shape.shape, shape.dtype)


def test_dtypes_are_kept(params):
    halved = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    for upcycle_name in UPCYCLES:
        grown = upcycle(halved, Experts(count=2, upcycle=upcycle_name))
        assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(ml_dtypes.bfloat16)}


def test_depth_and_experts_in_one_plan(params):
    plan = dataclasses.replace(tli(3, 3), experts=Experts(count=2))
    assert plan.guarantee == "arithmetic" and not plan.is_exact
    assert dataclasses.replace(dus(3, 1), experts=Experts(count=2)).guarantee == "none"
    assert dataclasses.replace(moe(3), experts=Experts(upcycle="drop")).guarantee == "none"
    assert moe(3).guarantee == "bit" and not any(moe(3).injected)
    grown = upcycle(inject(params, plan), plan.experts)
    w2 = np.asarray(grown["layers"]["block_sparse_moe"]["experts"]["w2"]["weight"])
    assert w2.shape[:2] == (4, 2) and not w2[3].any() and w2[:3].any(axis=(1, 2, 3)).all()
    assert Plan.from_json(plan.to_json()) == plan and hash(Plan.from_json(plan.to_json())) == hash(plan)
    assert plan.to_json()["experts"]["count"] == 2 and moe(3).to_json()["experts"] is None
    with pytest.raises(UsageError, match="cannot be written as one step"):
        tli(4, 2).compose(plan)
    with pytest.raises(DataError, match="not a growth plan"):
        Plan.from_json(plan.to_json() | {"experts": {"cout": 2}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"upcycle": "copies"}, "upcycle 'copies' is not known, did you mean copy?"),
        ({"count": 0}, "experts 0, granularity 1: both must be 1 or more"),
        ({"granularity": 2}, "granularity 2 needs upcycle virtual_groups"),
        (
            {"granularity": 2, "upcycle": "virtual_groups", "top_k": 3},
            "top_k is 3, must be a multiple of granularity 2",
        ),
        ({"count": 2, "top_k": 3}, "1…2"),
        ({"router_std": 0.0}, "ties would always choose the same experts"),
        ({"ratio": 0.1}, "noise_ratio 0.1 with upcycle copy"),
        ({"ratio": 1.5, "upcycle": "drop"}, "0…1"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UsageError) as error:
        Experts(**options)
    assert words in str(error.value)


def test_models_that_cannot_be_upcycled(params):
    with pytest.raises(UsageError, match="granularity 5 does not divide the feed-forward size 48"):
        upcycle(params, Experts(granularity=5, top_k=5, upcycle="virtual_groups"))
    with pytest.raises(UsageError, match="only a dense model"):
        upcycle(upcycle(params, Experts(count=2)), Experts(count=2))
