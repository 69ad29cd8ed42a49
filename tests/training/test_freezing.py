"""The freeze map, and the grouped stack, which computes the same as the flat one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tli_jax.errors import UsageError
from tli_jax.models.llama import Llama
from tli_jax.models.loss import token_losses
from tli_jax.models.tree import pick
from tli_jax.training.freezing import Layout, as_model, group, make_layout, ungroup


@pytest.mark.parametrize(
    ("only", "trained"),
    [
        ("all", range(8)),
        ("injected", (2, 4, 6)),
        ("last_n(3)", (5, 6, 7)),
        ("layers(0,3,5-7)", (0, 3, 5, 6, 7)),
        (" layers( 4 ) ", (4,)),
    ],
)
def test_only_selects_the_trainable_layers(model, injected, only, trained):
    layout = make_layout(model, injected, only, None)
    assert [i for i, trains in enumerate(layout.trains) if trains] == list(trained)
    # Embedding, norm and head train with ``all``, or if ``outer`` names them.
    assert layout.outer == ({"embed_tokens", "norm", "lm_head"} if only == "all" else set())
    assert make_layout(model, injected, only, "norm, lm_head").outer == {"norm", "lm_head"}


@pytest.mark.parametrize(
    ("only", "outer", "message"),
    [
        ("inject", None, "only: 'inject' is not valid: choose all, injected, last_n(N) or layers(0,3,7-9)"),
        ("last_n(0)", None, "last_n(0) is out of range: the model has 8 layers, choose 1 to 8"),
        ("last_n(9)", None, "last_n(9) is out of range"),
        ("layers(3,8)", None, "8 is out of range: the model has layers 0 to 7"),
        ("layers(7-3)", None, "7-3 is out of range"),
        ("layers(3-)", None, "'3-' is not a layer or a range"),
        ("layers()", None, "nothing would train"),
        (
            "all",
            "embed",
            "outer: 'embed' is not a tensor of this model: choose all, none, or embed_tokens, ",
        ),
    ],
)
def test_wrong_only_or_outer_is_refused(model, injected, only, outer, message):
    with pytest.raises(UsageError) as error:
        make_layout(model, injected, only, outer)
    assert message in str(error.value)


def test_injected_needs_a_grown_model(model):
    with pytest.raises(UsageError, match="injected needs a grown model"):
        make_layout(model, None, "injected", None)


@pytest.mark.parametrize(
    ("trained", "segments"),
    [
        # TLI, K=4: the layers below the first injected one, seven equal periods, and the last injected layer.
        (range(4, 40, 5), [(1, (4,)), (7, (1, 4)), (1, (1,))]),
        # DUS trains the second half; then all layers.
        (range(24, 40), [(1, (24,)), (1, (16,))]),
        (range(40), [(1, (40,))]),
        # Explicit layers: periods of three lengths.
        ((3, 4, 9, 20), [(1, (3,)), (1, (2, 4)), (1, (1, 10)), (1, (1, 19))]),
        ((0, 2, 4), [(2, (1, 1)), (1, (1, 35))]),
        ((), [(1, (40,))]),
    ],
)
def test_segments(trained, segments):
    layout = Layout(tuple(i in trained for i in range(40)), frozenset({"norm"}), (False,) * 40)
    assert layout.segments == segments


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([frozenset(), frozenset({"norm"})]))
def test_every_layer_is_in_one_array_and_ungroup_inverts_group(model, params, trains, outer):
    if not any(trains) and not outer:
        return
    params = jax.device_get(params)  # NumPy does not compile a program for every way to split them
    specs = Layout(tuple(trains), outer, (False,) * 8).param_specs(model)
    for tensor in {spec.tensor for spec in specs if spec.layers}:
        parts = [spec for spec in specs if spec.tensor == tensor]
        assert sorted(layer for spec in parts for layer in spec.layers) == list(range(8))
        assert all(spec.trains == trains[layer] for spec in parts for layer in spec.layers)
    trained, frozen = group(params, specs)
    assert {spec.name: spec.shape(model) for spec in specs} == {n: x.shape for n, x in (trained | frozen).items()}
    jax.tree.map(np.testing.assert_array_equal, ungroup(trained, frozen, specs), params)


@pytest.mark.parametrize("only", ["all", "injected", "layers(0,1,5)"])
def test_grouped_and_flat_stacks_have_the_same_loss_and_gradients(model, params, injected, batch, only):
    layout = make_layout(model, injected, only, None)
    specs = layout.param_specs(model)
    trained, frozen = group(params, specs)
    tokens, segments = batch[0][0], jnp.asarray(batch[1][0])

    def flat(params):
        return token_losses(Llama.from_params(model, params), tokens, segments_BT=segments)[0].mean()

    def grouped(trained):
        llama = Llama.from_params(model, as_model(trained, frozen, specs))
        return token_losses(llama, tokens, segments_BT=segments)[0].mean()

    loss, gradients = jax.jit(jax.value_and_grad(flat))(params)
    grouped_loss, grouped_gradients = jax.jit(jax.value_and_grad(grouped))(trained)
    np.testing.assert_allclose(grouped_loss, loss, rtol=1e-6)
    assert set(grouped_gradients) == {spec.name for spec in specs if spec.trains}
    for spec in (spec for spec in specs if spec.trains):
        flat_gradient = pick(gradients, ("layers." if spec.layers else "") + spec.tensor)
        expected = flat_gradient[np.asarray(spec.layers)] if spec.layers else flat_gradient
        np.testing.assert_allclose(grouped_gradients[spec.name], expected, rtol=2e-4, atol=1e-6, err_msg=spec.name)
