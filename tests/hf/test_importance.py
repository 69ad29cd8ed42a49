"""The importance of layers, compared with torch in fp64."""

import numpy as np
import pytest

from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.verify.importance import measure_importance


@pytest.mark.parametrize("tied", [True, False])
def test_importance_follows_its_definition(make_model, tmp_path, tied):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers")
    folder = make_model(tmp_path / "model", tied=tied)
    tokens = np.random.default_rng(0).integers(0, 48, (3, 20))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(tokens)
    model(ids, labels=ids).loss.backward()
    expected = [
        sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters()) for layer in model.model.layers
    ]
    layers = []
    found = measure_importance(folder, tokens, lambda: layers.append(1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(layers) == 8 and len(set(np.argsort(found))) == 4


def test_layer_that_adds_nothing_matters_least(make_model, grow, tmp_path):
    from tli_jax.growth.methods import tli

    base = make_model(tmp_path / "base", "bfloat16", tied=False)
    grown = grow(base, tli(4, after=[1]), tmp_path / "grown").folder
    tokens = np.random.default_rng(0).integers(0, 48, (2, 32))
    found = measure_importance(open_checkpoint(grown), tokens)
    assert np.argmin(found) == 2 and found[2] == 0  # either θ is 0 (zeroed outputs) or its gradient is
    np.testing.assert_allclose(found[:2] + found[3:], measure_importance(base, tokens), rtol=1e-5)


def test_importance_of_the_embedded_model():
    found = measure_importance("embedded", np.arange(64).reshape(2, 32))
    assert len(found) == open_checkpoint(hub.resolve("embedded")).config.num_hidden_layers and min(found) > 0
