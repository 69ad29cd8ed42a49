"""The memory estimate, checked against real arrays and the simplest formula, and ahead-of-time compilation."""

import jax
import pytest

from tli_jax.growth.methods import tli
from tli_jax.training import memory


def dtypes(spec):
    return "bfloat16"


@pytest.mark.parametrize("only", ["all", "injected"])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_parameters_moments_and_gradients_are_the_size_of_the_arrays(build, only, mesh):
    trainer, trained, frozen = build(mesh, only=only, batch_size=8)
    estimate = memory.estimate(trainer, 16, dtypes)
    state = trainer.init(trained)

    def local(arrays):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))

    # The estimate is for frozen arrays in bfloat16; these are in float32.
    assert estimate["parameters"] == local(state.trained) + local(frozen) / 2
    assert estimate["moments"] == local(state.optimizer_state)
    assert estimate["gradients"] == local(state.trained)


def test_layers_below_the_lowest_trainable_one_keep_no_activations(build):
    trainer, _, _ = build(only="injected", batch_size=8, remat="full")  # layers 2, 4 and 6 of 8
    assert memory.estimate(trainer, 16, dtypes)["activations"] == 6 * 8 * 16 * 40 * 4
    trainer, _, _ = build(only="all", batch_size=8, grad_accum_steps=4, remat="full")
    estimate = memory.estimate(trainer, 16, dtypes)
    assert estimate["activations"] == 8 * 2 * 16 * 40 * 4
    assert estimate["gradients"] == 2 * sum(x.size * 4 for x in trainer.abstract_state().trained.values())


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full", "offload"])
def test_more_rematerialization_keeps_fewer_activations(build, remat):
    trainer, _, _ = build(only="all", batch_size=8, remat=remat)
    kept = memory.estimate(trainer, 16, dtypes)["activations"] / (8 * 8 * 16 * 4)  # numbers per token and layer
    around = 40 + 64 + 32  # the input of the layer; queries, keys and values; the outputs of all heads
    expected = {"none": 4 * 40 + 2 * 64 + 3 * 56, "dots": around + 40 + 2 * 56, "attention": around}
    assert kept == (expected | {"full": 40, "offload": 0})[remat]


def test_the_step_compiles_without_any_array(build):
    trainer, _, _ = build(only="injected", batch_size=8)
    compiled = memory.compile_step(trainer, 16, dtypes)
    assert compiled.fits and compiled.peak > compiled.arguments > 0 and compiled.seconds > 0


def test_sharded_growth_needs_one_shard_per_device_and_no_collectives(build):
    trainer, _, _ = build({"fsdp": 8}, batch_size=8)
    base = trainer.model
    compiled = memory.compile_growth(base, tli(base.num_hidden_layers, 2), trainer.mesh)
    matrices = base.num_hidden_layers * base.layer_matrix_params * 4 / 8
    assert compiled.fits and compiled.arguments < 1.5 * matrices
    assert not compiled.collectives
