"""Growth to mixtures of experts, from folder to folder: the same bytes as in memory, opened by transformers, proved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.errors import DataError, ProofError, UsageError
from tli_jax.growth.experts import Experts
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import dus, moe, opt_deus, tli
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import Row
from tli_jax.growth.upcycle import upcycle
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.load import load_hf
from tli_jax.hf.save import save_hf, unstack
from tli_jax.models.llama import forward
from tli_jax.verify import proof

TOKENS = np.random.default_rng(0).integers(0, 48, (4, 32))
PLANS = {
    "copy": (moe(4), Experts(count=3)),
    "noise": (moe(4), Experts(count=2, upcycle="noise", seed=3)),
    "drop": (moe(4), Experts(count=2, upcycle="drop")),
    "virtual_groups": (moe(4), Experts(count=2, granularity=3, top_k=3, upcycle="virtual_groups")),
    "published": (moe(4), Experts(count=2, granularity=2, upcycle="virtual_groups_published")),
    "deeper": (tli(4, 2), Experts(count=2)),
    "deeper, of two": (tli(4, 3, "average"), Experts(count=2, granularity=2, upcycle="virtual_groups")),
    "deeper, noise on noise": (tli(4, 2, "noise"), Experts(count=2, upcycle="noise")),
}
PLANS = {name: dataclasses.replace(plan, experts=experts) for name, (plan, experts) in PLANS.items()}


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory):
    return {
        dtype: make_model(tmp_path_factory.mktemp("dense") / dtype, dtype, tied=False)
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLANS)
def test_same_bytes_as_in_memory(base, grow, read_bytes, tmp_path, dtype, name):
    plan = PLANS[name]
    grown = grow(base[dtype], plan, tmp_path / "grown", "9KB")
    _, params = load_hf(base[dtype])
    config, loaded = load_hf(grown.folder)
    in_memory = upcycle(inject(params, plan), plan.experts)
    expected = {name: np.asarray(get()).tobytes() for name, get in unstack(config, in_memory)}
    found = read_bytes(grown.folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    # The folder loads as the same tree.
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(in_memory), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["copy", "virtual_groups", "deeper"])
def test_proved_in_both_libraries(base, grow, tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers")
    plan = PLANS[name]
    folder = grow(base["float32"], plan, tmp_path / "grown").folder
    dense, experts = open_checkpoint(base["float32"]), open_checkpoint(folder)
    steps = []
    found = proof.compare_models(dense, experts, plan, TOKENS, "random ids", lambda: steps.append(1))
    assert len(steps) == proof.layers_to_run(plan) and plan.guarantee == "arithmetic"
    proof.check(plan, found)
    assert 0 < found.max_abs_logit_difference < 1e-5 * found.max_abs_logit
    ids = torch.tensor(TOKENS)
    logits = []
    for path in (base["float32"], folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(ids).logits.numpy())
    assert type(model).__name__ == "MixtralForCausalLM"
    assert np.abs(logits[1] - logits[0]).max() < 1e-5 * np.abs(logits[0]).max()
    config, params = load_hf(folder)
    np.testing.assert_allclose(forward(config, params, jnp.asarray(TOKENS)), logits[1], rtol=0, atol=1e-5)


def test_guarantee_that_does_not_hold(base, grow, tmp_path):
    plan = dataclasses.replace(moe(4), experts=Experts(count=2))
    broken = dataclasses.replace(plan, experts=Experts(count=2, upcycle="drop"))
    grown = open_checkpoint(grow(base["float32"], broken, tmp_path / "grown").folder)
    found = proof.compare_models(open_checkpoint(base["float32"]), grown, plan, TOKENS, "random ids", lambda: None)
    with pytest.raises(ProofError, match="guarantees equality up to rounding"):
        proof.check(plan, found)


def test_configuration_is_a_mixtral(base, grow, tmp_path):
    raw = json.loads(
        (grow(base["float32"], PLANS["virtual_groups"], tmp_path / "grown").folder / "config.json").read_text()
    )
    assert raw["architectures"] == ["MixtralForCausalLM"] and raw["model_type"] == "mixtral"
    sizes = ("num_local_experts", "num_experts_per_tok", "intermediate_size", "num_hidden_layers")
    assert [raw[key] for key in sizes] == [6, 3, 8, 4]
    assert raw["rope_theta"] == 1e4 and "mlp_bias" not in raw


@pytest.fixture(scope="module")
def mixtral(base, grow, tmp_path_factory):
    """A Mixtral whose experts all differ."""
    plan = dataclasses.replace(moe(4), experts=Experts(count=3, upcycle="drop", router_std=0.5))
    return {dtype: grow(base[dtype], plan, tmp_path_factory.mktemp("mixtral") / "m").folder for dtype in base}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [tli(4, 2), tli(4, 1, "average_identity"), dus(4, 1), tli(4, 2, "noise")])
def test_mixtral_is_grown_deeper(mixtral, grow, read_bytes, tmp_path, dtype, plan):
    grown = grow(mixtral[dtype], plan, tmp_path / "grown").folder
    config, params = load_hf(mixtral[dtype])
    deeper, _ = load_hf(grown)
    assert (deeper.num_experts, deeper.num_hidden_layers) == (3, len(plan))
    in_memory = {name: np.asarray(get()).tobytes() for name, get in unstack(deeper, inject(params, plan))}
    assert read_bytes(grown) == in_memory
    found = proof.compare_models(
        open_checkpoint(mixtral[dtype]), open_checkpoint(grown), plan, TOKENS, "random ids", lambda: None
    )
    proof.check(plan, found)
    assert (found.max_abs_logit_difference == 0) == plan.is_exact
    logits, before = forward(deeper, inject(params, plan), TOKENS), forward(config, params, TOKENS)
    assert bool((logits == before).all()) == plan.is_exact


def test_deeper_mixtral_in_transformers(mixtral, grow, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers")
    grown = grow(mixtral["float32"], tli(4, 2), tmp_path / "grown").folder
    logits = []
    for path in (mixtral["float32"], grown):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(torch.tensor(TOKENS)).logits.numpy())
    np.testing.assert_array_equal(*logits)


def test_round_trip(mixtral, read_bytes, tmp_path):
    config, params = load_hf(mixtral["bfloat16"])
    save_hf(tmp_path / "back", config, params, source=mixtral["bfloat16"])
    assert read_bytes(tmp_path / "back") == read_bytes(mixtral["bfloat16"])
    written, read = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", mixtral["bfloat16"])
    )
    assert written == read


def test_sharded_over_experts(mixtral):
    from tli_jax.distributed.mesh import make_mesh, param_sharding
    from tli_jax.models.tree import nest

    config, full = load_hf(mixtral["float32"])
    mesh = make_mesh({"fsdp": 2, "expert": 3}, jax.devices()[:6])
    tensors = config.outer_tensors | {f"layers.{name}": ("L", *dims) for name, dims in config.layer_tensors.items()}
    shardings = nest(
        {name: param_sharding(mesh, ["-" if d == "D" else d for d in dims]) for name, dims in tensors.items()}
    )
    _, sharded = load_hf(mixtral["float32"], shardings=shardings)
    w1 = sharded["layers"]["block_sparse_moe"]["experts"]["w1"]["weight"]
    assert w1.addressable_shards[0].data.shape == (4, 1, 24, 16)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_errors(base, mixtral, grow, tmp_path):
    with pytest.raises(UsageError, match="the base already has 3 experts a layer: use a dense one"):
        grow(mixtral["float32"], PLANS["copy"], tmp_path / "a")
    experts = Experts(granularity=5, top_k=5, upcycle="virtual_groups")
    with pytest.raises(UsageError, match="granularity 5 does not divide the feed-forward size 24"):
        grow(base["float32"], dataclasses.replace(moe(4), experts=experts), tmp_path / "b")
    with pytest.raises(UsageError, match="make dense layers, the base has experts"):
        grow(mixtral["float32"], opt_deus(4), tmp_path / "c")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("qwen2_moe", "Qwen2MoeForCausalLM"), ("olmoe", "OlmoeForCausalLM"), ("phimoe", "PhimoeForCausalLM")],
)
def test_other_mixtures_of_experts_are_refused_by_name(mixtral, tmp_path, kind, name):
    raw = json.loads((mixtral["float32"] / "config.json").read_text()) | {"model_type": kind, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=f"{name}.*{kind}.*is not supported"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok 4 is more than num_local_experts 3"),
        ({"num_local_experts": 4}, "tensors that config.json requires are missing"),
        ({"num_local_experts": 2}, "tensors that a model with this config.json does not have"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
    ],
)
def test_contradictory_mixtral(mixtral, tmp_path, change, words):
    raw = json.loads((mixtral["float32"] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((mixtral["float32"] / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match=words):
        open_checkpoint(tmp_path)


def test_explicit_rows(mixtral, grow, read_bytes, tmp_path):
    plan = Plan("hand", 4, (Row(((0, 0.5), (3, 0.5)), 0.25, "average", True, 1), Row(((2, 1.0),))))
    _, params = load_hf(mixtral["float32"])
    config, _ = load_hf(grow(mixtral["float32"], plan, tmp_path / "grown").folder)
    in_memory = {name: np.asarray(get()).tobytes() for name, get in unstack(config, inject(params, plan))}
    assert read_bytes(tmp_path / "grown") == in_memory
