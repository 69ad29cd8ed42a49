"""The predictor against a reference implementation in NumPy and fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.errors import UsageError
from tli_jax.growth import predictor
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import lesa

NAME = "mlp.up_proj.weight"


def train_reference(V, network, orders):
    """AdamW with explicit gradients on V ``[L, R, C]``. Returns the network and the mean loss of the last epoch."""
    flat = [np.array(part, np.float64) for layer in network for part in layer]
    first, second, step = [np.zeros_like(p) for p in flat], [np.zeros_like(p) for p in flat], 0
    R = V.shape[1]
    for order in orders:
        losses = []
        for samples in order:
            layer, row = 1 + samples // R, samples % R
            x0, y = np.concatenate([V[layer - 1, row], V[layer + 1, row]], 1), V[layer, row]
            w1, b1, w2, b2, w3, b3 = flat
            h1 = np.maximum(x0 @ w1 + b1, 0)
            h2 = np.maximum(h1 @ w2 + b2, 0)
            out = h2 @ w3 + b3
            norm, wanted = np.sqrt((out**2).sum()), np.sqrt((y**2).sum())
            losses.append(0.9995 * ((out - y) ** 2).mean() + 0.0005 * (norm - wanted) ** 2)
            d = 0.9995 * 2 * (out - y) / out.size + 0.0005 * 2 * (norm - wanted) * out / norm
            d2 = (d @ w3.T) * (h2 > 0)
            d1 = (d2 @ w2.T) * (h1 > 0)
            gradients = [x0.T @ d1, d1.sum(0), h1.T @ d2, d2.sum(0), h2.T @ d, d.sum(0)]
            step += 1
            for i, g in enumerate(gradients):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                update = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
                flat[i] = flat[i] - 1e-3 * (update + 0.01 * flat[i])
    return flat, np.mean(losses)


def test_it_equals_the_definition():
    L, rows, columns, epochs = 5, 20, 8, 3
    weights = np.random.default_rng(0).normal(0, 0.2, (L, rows, columns)).astype(np.float32)
    plan = lesa(L, epochs=epochs, seed=7)
    made = predictor.Predictor(plan, lambda layer, name: weights[layer])
    # The matrices side by side, decomposed by LAPACK, with the same signs.
    U, S, V = np.linalg.svd(np.concatenate(list(weights.astype(np.float64)), axis=1), full_matrices=False)
    sign = np.sign(U[np.abs(U).argmax(0), np.arange(len(S))])
    U, V = U * sign, (V * sign[:, None]).reshape(len(S), L, columns).swapaxes(0, 1)
    seed = (7, predictor.zlib.crc32(NAME.encode()))
    orders = [predictor.epoch_batches((L - 2) * len(S), seed, epoch) for epoch in range(epochs)]
    (w1, b1, w2, b2, w3, b3), loss = train_reference(V, predictor.initial_network(columns, seed), orders)
    for number, row in enumerate(plan.rows):
        if row.injected:
            x = np.concatenate([V[layer] for layer, _ in row.sources], axis=1)
            block = np.maximum(np.maximum(x @ w1 + b1, 0) @ w2 + b2, 0) @ w3 + b3
            np.testing.assert_allclose(made(number, NAME), U * S @ block, rtol=0, atol=2e-4 * np.abs(weights).max())
    assert made.facts["loss"][NAME] == pytest.approx(loss, rel=1e-4)


def test_the_decomposition_is_exact():
    """Also if the rank is smaller than the number of rows."""
    draw = np.random.default_rng(0)
    for rows, columns, L in ((6, 4, 3), (20, 4, 3), (16, 16, 4)):
        weights = [draw.normal(0, 1, (rows, columns)).astype(np.float32) for _ in range(L)]
        U, S, V = predictor.decompose(weights)
        assert len(S) == min(rows, columns * L) and (np.diff(S) <= 0).all()
        np.testing.assert_allclose([U * S @ block for block in V], weights, atol=1e-5)


def test_it_learns():
    """If layers are linear in depth, a layer between two is nearly their mean."""
    draw = np.random.default_rng(0)
    start, slope = draw.normal(0, 1, (2, 32, 16))
    weights = np.stack([start + slope * layer / 8 for layer in range(8)]).astype(np.float32)
    losses = []
    for epochs in (1, 60):
        made = predictor.Predictor(lesa(8, epochs=epochs), lambda layer, name: weights[layer])
        predicted = made(4, NAME)
        losses.append(made.facts["loss"][NAME])
    assert losses[1] < losses[0] / 20
    middle = weights[3:5].mean(0)
    assert np.linalg.norm(predicted - middle) < 0.25 * np.linalg.norm(middle)


def test_each_sample_once_per_epoch_in_a_new_order():
    first, second = (predictor.epoch_batches(200, (0, 5), epoch) for epoch in (0, 1))
    assert first.shape == second.shape == (3, 64) and len(set(first.ravel())) == 192 and (first != second).any()
    assert predictor.epoch_batches(10, (0, 5), 0).shape == (1, 10)


@pytest.mark.parametrize(("norms", "expected"), [("mean", [1.5, 2.5]), ("first", [0.0, 0.0])])
def test_norms(norms, expected):
    made = predictor.Predictor(lesa(4, norms=norms), lambda layer, name: np.full(3, layer, np.float32))
    assert [made(number, "input_layernorm.weight").tolist() for number in (2, 4)] == [[x] * 3 for x in expected]


def test_in_memory():
    params = {"layers": {"mlp": {"up_proj": {"weight": jax.random.normal(jax.random.key(0), (4, 12, 6))}}}}
    weights = params["layers"]["mlp"]["up_proj"]["weight"]
    plan = lesa(4, epochs=1)
    grown = inject(params, plan)["layers"]["mlp"]["up_proj"]["weight"]
    made = predictor.Predictor(plan, lambda layer, name: np.asarray(weights[layer]))
    np.testing.assert_array_equal(grown[2], made(2, NAME).astype(np.float32))
    np.testing.assert_array_equal(grown[np.array([0, 1, 3, 5])], weights)
    with pytest.raises(UsageError, match="call inject outside of jit"):
        jax.jit(lambda params: inject(params, plan))(params)
    with pytest.raises(UsageError, match="learns from three layers in a row, the base has 2"):
        inject({"layers": {"mlp": {"up_proj": {"weight": jnp.zeros((2, 4, 4))}}}}, lesa(2))
    with pytest.raises(UsageError, match="makes dense layers"):
        inject({"layers": {"mlp": {"experts": jnp.zeros((4, 2, 4, 4))}}}, plan)
