"""Training with experts: equal for every mesh and dispatch, with falling loss and a balanced load."""

import jax
import numpy as np
import optax
import pytest

from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed.kernels import choose_dispatch, grouped
from tli_jax.distributed.mesh import make_mesh
from tli_jax.models.attention import causal
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import init_params
from tli_jax.models.moe import every_expert
from tli_jax.training.freezing import as_model, make_layout
from tli_jax.training.optimizer import learning_rates, make_optimizer
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
def build(params):
    def make(mesh=None, dispatch=every_expert, **options):
        config = TrainConfig(**{"dtypes": {"compute": "float32"}, "clip_norm": 0, "learning_rate": 1e-2} | options)
        count = int(np.prod(list((mesh or {}).values()))) if mesh else 1
        grid = make_mesh(mesh or {}, jax.devices()[:count])
        chosen = dispatch if dispatch is every_expert else lambda *args: grouped(grid, *args)
        layout = make_layout(MODEL, [False] * 4, config.only, config.outer)
        trainer = Trainer(MODEL, config, layout, grid, causal, chosen)
        return trainer, *trainer.shard(params)

    return make


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(0, 64, (1, 8, 17)).astype(np.int32)
    return tokens, np.zeros_like(tokens)


def gradients(trainer, trained, frozen, batch):
    run = jax.jit(jax.value_and_grad(trainer._sums, has_aux=True))
    (objective, aux), slopes = run(trained, frozen, batch[0][0], batch[1][0])
    return [float(objective), *map(float, aux)], jax.device_get(slopes)


@pytest.fixture(scope="module")
def expected(build, batch):
    return gradients(*build(), batch)


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [(mesh, dispatch) for mesh in MESHES for dispatch in (every_expert, grouped)][1:],  # the first is ``expected``
)
def test_every_mesh_and_dispatch_has_equal_losses_and_gradients(build, batch, expected, mesh, dispatch):
    losses, slopes = gradients(*build(MESHES[mesh], dispatch), batch)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for name, slope in slopes.items():
        largest = np.abs(expected[1][name]).max()
        assert largest > 0, name
        np.testing.assert_allclose(slope, expected[1][name], rtol=0, atol=2e-5 * largest, err_msg=name)


def test_experts_are_sharded_by_the_rules(build):
    trainer, trained, _ = build({"fsdp": 2, "expert": 4})
    shapes = {spec.tensor: trained[spec.name].addressable_shards[0].data.shape for spec in trainer.param_specs}
    assert shapes["block_sparse_moe.experts.w1.weight"] == (4, 1, 48, 16)
    assert shapes["block_sparse_moe.experts.w2.weight"] == (4, 1, 16, 48)
    assert shapes["self_attn.q_proj.weight"] == (4, 32, 4)  # D over both axes, without an E dim


def test_loss_falls_and_the_load_is_balanced(build):
    """Fifty steps on a learnable sequence, from an uneven router."""
    rng = np.random.default_rng(0)
    ids = [0]
    for _ in range(8 * 17 * 10):
        ids.append(int(rng.integers(64)) if rng.random() < 0.1 else (5 * ids[-1] + 7) % 64)
    tokens = np.array(ids[: 8 * 17 * 10], np.int32).reshape(10, 1, 8, 17)
    results = {}
    for weight in (0.0, 0.1):
        trainer, trained, frozen = build(auxiliary={"balance": weight}, learning_rate=3e-3, steps=50, only="all")
        state, stop, lines = trainer.init(trained), np.zeros(1, np.int32), []
        for step in range(50):
            batch = tokens[step % 10]
            state, metrics = trainer.step(state, frozen, batch, np.zeros_like(batch), stop)
            lines.append({name: float(metrics[name]) for name in ("loss", "balance")})
        results[weight] = lines
    balanced, unbalanced = results[0.1], results[0.0]
    assert balanced[-1]["loss"] < 0.8 * balanced[0]["loss"]
    assert balanced[-1]["balance"] < 1.1 and balanced[-1]["balance"] < unbalanced[-1]["balance"]


def test_gradient_accumulation_gives_the_step_of_the_complete_batch(build, batch):
    results = []
    for microbatches in (1, 4):
        # The load-balancing loss of a microbatch differs from that of the complete batch, so it is off.
        trainer, trained, frozen = build(grad_accum_steps=microbatches, auxiliary={"balance": 0})
        split = [x.reshape(microbatches, 8 // microbatches, 17) for x in batch]
        state, metrics = trainer.step(trainer.init(trained), frozen, *split, np.zeros(1, np.int32))
        # The first moment is the scaled gradient. The weights cannot be compared: the first step of Adam is the sign
        # of the gradient, even if that is near 0.
        moments = jax.device_get(optax.tree.get(state.optimizer_state, "mu"))
        results.append((float(metrics["loss"]), float(metrics["balance"]) > 1, moments))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and results[0][1] and results[1][1]
    for name, complete in results[0][2].items():
        largest = np.abs(complete).max()
        assert largest > 0, name
        np.testing.assert_allclose(results[1][2][name], complete, rtol=0, atol=2e-5 * largest, err_msg=name)


def test_the_experts_of_one_layer_can_train(build, batch):
    trainer, trained, frozen = build(only="last_n(1)")
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
def test_each_expert_is_updated_separately(build, params, optimizer):
    """And Muon does not update the router."""
    trainer, trained, _ = build(optimizer=optimizer, schedule="constant", weight_decay=0.0)
    rng = np.random.default_rng(0)
    slopes = {name: np.asarray(rng.normal(0, 1, x.shape), np.float32) for name, x in trained.items()}
    optax_optimizer = make_optimizer(trainer.config, trainer.param_specs, trainer.mesh)
    rates = learning_rates(trainer.config, 1)
    update = jax.jit(optax_optimizer.update)
    updates, _ = update(slopes, optax_optimizer.init(trained), trained, rates=rates)
    name = next(name for name in trained if "experts.w1" in name)
    other = dict(slopes) | {name: slopes[name].copy()}
    other[name][0, 1] *= -3.0  # only the gradient of expert 1 changes
    changed, _ = update(other, optax_optimizer.init(trained), trained, rates=rates)
    np.testing.assert_allclose(changed[name][0, 0], updates[name][0, 0], rtol=1e-5)
    assert (np.asarray(changed[name][0, 1]) != np.asarray(updates[name][0, 1])).any()
    if optimizer == "muon":
        spectrum = np.linalg.svd(np.asarray(updates[name][0, 0]), compute_uv=False)
        assert spectrum.max() / spectrum.min() < 3  # roughly orthogonal
        router = np.asarray(updates[next(name for name in trained if "moe.gate" in name)])
        assert np.abs(router).max() < 1.01 * trainer.config.learning_rate["all"]  # the first step of AdamW


def test_choice_of_dispatch():
    assert choose_dispatch(make_mesh({}, jax.devices()[:1]))[0] is every_expert
    assert choose_dispatch(make_mesh({"fsdp": 2, "expert": 4}))[0] is not every_expert
