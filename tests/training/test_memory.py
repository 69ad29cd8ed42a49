"""What a run needs, on paper: counted here a second time, in the simplest way."""

import jax
import pytest

from tli_jax.training import memory as fit


def dtypes(leaf):
    return "bfloat16"


@pytest.mark.parametrize("only", ["all", "injected"])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_what_is_held_is_what_arrays_take(start, only, mesh):
    trainer, trained, frozen = start(mesh, only=only, batch_size=8)
    paper = fit.on_paper(trainer, 16, dtypes)
    state = trainer.init(trained)

    def local(arrays):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))

    # What is frozen is in bfloat16 there, and in float32 here.
    assert paper["parameters"] == local(state.trained) + local(frozen) / 2
    assert paper["moments"] == local(state.optimizer_state)
    assert paper["gradients"] == local(state.trained)


def test_only_layers_at_or_above_the_lowest_that_trains_have_activations(start):
    trainer, _, _ = start(only="injected", batch_size=8)  # layers 2, 4 and 6 of 8
    assert fit.on_paper(trainer, 16, dtypes)["activations"] == 6 * 8 * 16 * 40 * 4
    trainer, _, _ = start(only="all", batch_size=8, grad_accum_steps=4)
    paper = fit.on_paper(trainer, 16, dtypes)
    assert paper["activations"] == 8 * 2 * 16 * 40 * 4
    assert paper["gradients"] == 2 * sum(leaf.size * 4 for leaf in trainer.abstract_state().trained.values())


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_more_that_is_computed_again_is_less_that_is_kept(start, remat):
    trainer, _, _ = start(only="all", batch_size=8, remat=remat)
    kept = fit.on_paper(trainer, 16, dtypes)["activations"] / (8 * 8 * 16 * 4)  # numbers a token and layer
    assert kept == {"full": 40, "dots": 3 * 40 + 64 + 2 * 56, "none": 4 * 40 + 2 * 64 + 3 * 56}[remat]


def test_the_step_compiles_without_an_array(start):
    trainer, _, _ = start(only="injected", batch_size=8)
    found = fit.compile_step(trainer, 16, dtypes)
    assert found.fits and found.peak > found.arguments > 0 and found.seconds > 0


def test_the_growth_gives_a_device_no_more_than_its_share(start):
    from tli_jax.growth.methods import tli

    trainer, _, _ = start({"fsdp": 8}, batch_size=8)
    base = trainer.model
    found = fit.compile_growth(base, tli(base.num_hidden_layers, 2), trainer.mesh)
    matrices = base.num_hidden_layers * base.layer_matrix_params * 4 / 8
    assert found.fits and found.arguments < 1.5 * matrices
    assert not found.collectives
