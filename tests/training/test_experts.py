"""Experts in training: the same on every mesh and by every kernel, falling loss, a load that stays balanced."""

import jax
import numpy as np
import optax
import pytest

from tli_jax.cli.config import TrainConfig
from tli_jax.distributed.kernels import choose_dispatch, grouped
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import init_params
from tli_jax.models.moe import every_expert
from tli_jax.training.freezing import as_model, group, make_layout
from tli_jax.training.optimizer import make_optimizer
from tli_jax.training.trainer import Trainer

MODEL = LlamaConfig(64, 32, 48, 4, 4, 2, 8, initializer_range=0.2, num_experts=4, experts_per_token=2)
MESHES = {
    "1": {},
    "fsdp 2 × expert 2": {"fsdp": 2, "expert": 2},
    "expert 4": {"fsdp": 1, "expert": 4},
    "data 2 × expert 2 × tensor 2": {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2},
    "fsdp 8": {"fsdp": 8},
}


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def start(params):
    def make(mesh=None, dispatch=every_expert, **options):
        config = TrainConfig(**{"dtypes": {"compute": "float32"}, "clip_norm": 0, "learning_rate": 1e-2} | options)
        count = int(np.prod(list((mesh or {}).values()))) if mesh else 1
        grid = make_mesh(mesh or {}, jax.devices()[:count])
        chosen = dispatch if dispatch is every_expert else lambda *args: grouped(grid, *args)
        layout = make_layout(MODEL, [False] * 4, config.only, config.outer)
        trainer = Trainer(MODEL, config, layout, grid, causal, chosen)
        dims = {leaf.name: leaf.dims for leaf in trainer.param_specs}
        parts = [
            {name: jax.device_put(np.asarray(x), param_sharding(grid, dims[name])) for name, x in part.items()}
            for part in group(params, trainer.param_specs)
        ]
        return trainer, *parts

    return make


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(0, 64, (1, 8, 17)).astype(np.int32)
    return tokens, np.zeros_like(tokens)


def gradients(trainer, trained, frozen, batch):
    run = jax.jit(jax.value_and_grad(trainer._sums, has_aux=True))
    (whole, aux), found = run(trained, frozen, batch[0][0], batch[1][0])
    return [float(whole), *map(float, aux)], jax.device_get(found)


@pytest.fixture(scope="module")
def alone(start, batch):
    return gradients(*start(), batch)


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [(mesh, dispatch) for mesh in MESHES for dispatch in (every_expert, grouped)][1:],  # the first is ``alone``
)
def test_every_mesh_and_kernel_gives_the_same(start, batch, alone, mesh, dispatch):
    found, slopes = gradients(*start(MESHES[mesh], dispatch), batch)
    assert found == pytest.approx(alone[0], rel=1e-5)
    for name, slope in slopes.items():
        largest = np.abs(alone[1][name]).max()
        assert largest > 0, name
        np.testing.assert_allclose(slope, alone[1][name], rtol=0, atol=2e-5 * largest, err_msg=name)


def test_experts_lie_where_the_table_says(start):
    trainer, trained, _ = start({"fsdp": 2, "expert": 4})
    shapes = {leaf.tensor: trained[leaf.name].addressable_shards[0].data.shape for leaf in trainer.param_specs}
    assert shapes["block_sparse_moe.experts.w1.weight"] == (4, 1, 48, 16)
    assert shapes["block_sparse_moe.experts.w2.weight"] == (4, 1, 16, 48)
    assert shapes["self_attn.q_proj.weight"] == (4, 32, 4)  # D over both, as it has no experts


def test_loss_falls_and_the_load_is_balanced(start):
    """Fifty steps on a sequence that can be learnt, from a router that starts uneven."""
    draw = np.random.default_rng(0)
    ids = [0]
    for _ in range(8 * 17 * 10):
        ids.append(int(draw.integers(64)) if draw.random() < 0.1 else (5 * ids[-1] + 7) % 64)
    tokens = np.array(ids[: 8 * 17 * 10], np.int32).reshape(10, 1, 8, 17)
    results = {}
    for weight in (0.0, 0.1):
        trainer, trained, frozen = start(auxiliary={"balance": weight}, learning_rate=3e-3, steps=50, only="all")
        state, stop, lines = trainer.init(trained), np.zeros(1, np.int32), []
        for step in range(50):
            batch = tokens[step % 10]
            state, metrics = trainer.step(state, frozen, batch, np.zeros_like(batch), stop)
            lines.append({name: float(metrics[name]) for name in ("loss", "balance")})
        results[weight] = lines
    with_it, without = results[0.1], results[0.0]
    assert with_it[-1]["loss"] < 0.8 * with_it[0]["loss"]
    assert with_it[-1]["balance"] < 1.1 and with_it[-1]["balance"] < without[-1]["balance"]


def test_parts_of_a_batch_give_the_step_of_the_whole(start, batch):
    ends = []
    for parts in (1, 4):
        # The balance of a part is not that of the whole, so without it.
        trainer, trained, frozen = start(grad_accum_steps=parts, auxiliary={"balance": 0})
        cut = [part.reshape(parts, 8 // parts, 17) for part in batch]
        state, metrics = trainer.step(trainer.init(trained), frozen, *cut, np.zeros(1, np.int32))
        # The first moment is the gradient scaled. The weights would not do: where a gradient is near nothing, Adam's
        # first step is its sign.
        moments = jax.device_get(optax.tree.get(state.optimizer_state, "mu"))
        ends.append((float(metrics["loss"]), float(metrics["balance"]) > 1, moments))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6) and ends[0][1] and ends[1][1]
    for name, whole in ends[0][2].items():
        largest = np.abs(whole).max()
        assert largest > 0, name
        np.testing.assert_allclose(ends[1][2][name], whole, rtol=0, atol=2e-5 * largest, err_msg=name)


def test_one_layer_s_experts_can_train_alone(start, batch):
    trainer, trained, frozen = start(only="last_n(1)")
    before = jax.device_get(frozen)
    state, metrics = trainer.step(trainer.init(trained), frozen, *batch, np.zeros(1, np.int32))
    assert np.isfinite(float(metrics["loss"]))
    for name, array in before.items():
        np.testing.assert_array_equal(array, frozen[name])
    experts = [name for name in state.trained if "experts" in name]
    assert len(experts) == 3 and all(state.trained[name].shape[0] == 1 for name in experts)
    model = as_model(state.trained, frozen, trainer.param_specs)
    assert len(model["layers"]) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_an_expert_is_updated_as_if_alone(start, params, optimizer):
    """Each expert's matrix by itself, and the router not by Muon."""
    trainer, trained, _ = start(optimizer=optimizer, schedule="constant", weight_decay=0.0)
    config, leaves = trainer.config, trainer.param_specs
    draw = np.random.default_rng(0)
    slopes = {name: np.asarray(draw.normal(0, 1, x.shape), np.float32) for name, x in trained.items()}
    whole = make_optimizer(config, leaves)
    updates, _ = whole.update(slopes, whole.init(trained), trained)
    name = next(name for name in trained if "experts.w1" in name)
    other = dict(slopes) | {name: slopes[name].copy()}
    other[name][0, 1] *= -3.0  # another gradient of another expert
    changed, _ = whole.update(other, whole.init(trained), trained)
    np.testing.assert_allclose(changed[name][0, 0], updates[name][0, 0], rtol=1e-5)
    assert (np.asarray(changed[name][0, 1]) != np.asarray(updates[name][0, 1])).any()
    if optimizer == "muon":
        spectrum = np.linalg.svd(np.asarray(updates[name][0, 0]), compute_uv=False)
        assert spectrum.max() / spectrum.min() < 3  # orthogonal, roughly
        router = np.asarray(updates[next(name for name in trained if "moe.gate" in name)])
        assert np.abs(router).max() < 1.01 * config.learning_rate["all"]  # AdamW's first step


def test_what_runs_where():
    assert choose_dispatch(make_mesh({}, jax.devices()[:1]))[0] is every_expert
    assert choose_dispatch(make_mesh({"fsdp": 2, "expert": 4}))[0] is not every_expert
