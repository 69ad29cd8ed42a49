"""What trains: the freeze map, and the grouped stack that is the flat one in other words."""

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
def test_only_names_the_layers_that_train(model, injected, only, trained):
    layout = make_layout(model, injected, only, None)
    assert [i for i, trains in enumerate(layout.trains) if trains] == list(trained)
    # Embedding, norm and head train with all layers, and else when asked to.
    assert layout.outer == ({"embed_tokens", "norm", "lm_head"} if only == "all" else set())
    assert make_layout(model, injected, only, "norm, lm_head").outer == {"norm", "lm_head"}


@pytest.mark.parametrize(
    ("only", "outer", "words"),
    [
        ("inject", None, "only: 'inject' is not known: all, injected, last_n(N) or layers(0,3,7-9)"),
        ("last_n(0)", None, "last_n(0) is out of range, the model has 8 layers: 1…8"),
        ("last_n(9)", None, "last_n(9) is out of range"),
        ("layers(3,8)", None, "8 is out of range, the model has layers 0…7"),
        ("layers(7-3)", None, "7-3 is out of range"),
        ("layers(3-)", None, "'3-' is not a layer or a range"),
        ("layers()", None, "nothing would train"),
        ("all", "embed", "outer: 'embed' is not a tensor of this model: all, none, or of embed_tokens, norm, lm_head"),
    ],
)
def test_what_is_refused(model, injected, only, outer, words):
    with pytest.raises(UsageError) as error:
        make_layout(model, injected, only, outer)
    assert words in str(error.value)


def test_injected_needs_a_model_that_was_grown(model):
    with pytest.raises(UsageError, match="injected needs a model that was grown"):
        make_layout(model, None, "injected", None)


@pytest.mark.parametrize(
    ("trained", "segments"),
    [
        # TLI, K=4: what lies below the first injected layer, seven like periods, and the last one.
        (range(4, 40, 5), [(1, (4,)), (7, (1, 4)), (1, (1,))]),
        # DUS: the second half; and all.
        (range(24, 40), [(1, (24,)), (1, (16,))]),
        (range(40), [(1, (40,))]),
        # By hand: periods of three lengths.
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
def test_every_layer_is_in_one_leaf_and_ungroup_is_the_inverse(model, params, trains, outer):
    if not any(trains) and not outer:
        return
    leaves = Layout(tuple(trains), outer, (False,) * 8).leaves(model)
    for tensor in {leaf.tensor for leaf in leaves if leaf.layers}:
        parts = [leaf for leaf in leaves if leaf.tensor == tensor]
        assert sorted(layer for leaf in parts for layer in leaf.layers) == list(range(8))
        assert all(leaf.trains == trains[layer] for leaf in parts for layer in leaf.layers)
    trained, frozen = group(params, leaves)
    assert {leaf.name: leaf.shape(model) for leaf in leaves} == {n: x.shape for n, x in (trained | frozen).items()}
    jax.tree.map(np.testing.assert_array_equal, ungroup(trained, frozen, leaves), params)


@pytest.mark.parametrize("only", ["all", "injected", "layers(0,1,5)"])
def test_the_grouped_model_is_the_flat_one_and_so_are_its_gradients(model, params, injected, batch, only):
    layout = make_layout(model, injected, only, None)
    leaves = layout.param_specs(model)
    trained, frozen = group(params, leaves)
    tokens, segments = batch[0][0], jnp.asarray(batch[1][0])

    def flat(params):
        return token_losses(Llama.from_params(model, params), tokens, segments_BT=segments)[0].mean()

    def grouped(trained):
        model_of = Llama.from_params(model, as_model(trained, frozen, leaves))
        return token_losses(model_of, tokens, segments_BT=segments)[0].mean()

    loss, gradients = jax.jit(jax.value_and_grad(flat))(params)
    ours, of_ours = jax.jit(jax.value_and_grad(grouped))(trained)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    assert set(of_ours) == {leaf.name for leaf in leaves if leaf.trains}
    for leaf in (leaf for leaf in leaves if leaf.trains):
        whole = pick(gradients, ("layers." if leaf.layers else "") + leaf.tensor)
        expected = whole[np.asarray(leaf.layers)] if leaf.layers else whole
        np.testing.assert_allclose(of_ours[leaf.name], expected, rtol=2e-4, atol=1e-6, err_msg=leaf.name)
