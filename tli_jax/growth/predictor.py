"""The initialiser ``predictor``: a layer predicted from its neighbours by a network that learnt it from the base's own
layers (LESA, arXiv 2502.13794).

All layers' matrices of one kind, side by side, are U S V; V is cut into the layers' blocks, and the network learns to
tell a block from the one before and the one after, row by row. Memory is that of one kind: V in fp32, as many values as
the kind has in all layers, and three times the square of a matrix' rows in fp64.
"""

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan

HIDDEN, BATCH, LEARNING_RATE = 256, 64, 1e-3
_NORM_SHARE = 0.0005
_NEGLIGIBLE = 1e-7  # of the largest singular value; below it a direction is rounding

Network = Any  # a list of (weight [in, out], bias [out])


class Predictor:
    """Makes one tensor after the other of a plan's injected layers; all of one kind are learnt when the first is asked
    for, so ask kind by kind.

    Args:
        plan: its options ``seed`` and ``epochs`` are of the network, ``norms`` says where norms come from: ``mean`` of
            the neighbours, or ``first``, layer 0's (as the authors' program does).
        read: the tensor of a base layer, by the number of the layer and its name within it.

    Attributes:
        facts: what the network's loss was in the last epoch, by kind.

    Raises:
        UsageError: there are fewer than three layers to learn from.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        if plan.base_layers < 3:
            raise UsageError(f"init predictor learns from three layers in a row, the base has {plan.base_layers}")
        self.plan, self.read = plan, read
        self.facts: dict[str, Any] = {"loss": {}}
        self._kind, self._made = "", {}

    def __call__(self, number: int, name: str) -> np.ndarray:
        """The tensor of that name in grown layer ``number``, fp32 or fp64, its row's scale not yet applied."""
        if name == self._kind:
            return self._made[number]
        neighbours = [layer for layer, _ in self.plan.rows[number].sources]
        first = np.asarray(self.read(neighbours[0], name))
        if first.ndim > 2:
            raise UsageError(f"init predictor makes dense layers, {name} has {first.ndim} dims: use another init")
        if first.ndim < 2:
            layers = neighbours if self.plan.options.get("norms", "mean") == "mean" else [0]
            return np.mean([np.asarray(self.read(layer, name)).astype(np.float64) for layer in layers], axis=0)
        self._kind, self._made = name, self._predict(name)
        return self._made[number]

    def _predict(self, name: str) -> dict[int, np.ndarray]:
        layers = range(self.plan.base_layers)
        U, S, V_LRC = decompose([np.asarray(self.read(layer, name)) for layer in layers])
        options = self.plan.options
        seed = (options.get("seed", 0), zlib.crc32(name.encode()))
        network, loss = learn(V_LRC, seed, options.get("epochs", 5))
        self.facts["loss"][name] = loss
        made = {}
        for number, row in enumerate(self.plan.rows):
            if row.init == "predictor":
                block = predict(network, np.concatenate([V_LRC[layer] for layer, _ in row.sources], axis=1))
                made[number] = (U * S) @ np.asarray(block)
        return made


def decompose(weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U ``[out, R]`` and S ``[R]`` of the matrices side by side, and V as its blocks ``[L, R, in]``, all fp32.

    By way of the square of their rows, so that nothing as wide as all of them is decomposed; in fp64. The largest entry
    of each column of U is positive, which makes the signs those of any other way to decompose.
    """
    rows = len(weights[0])
    square = np.zeros((rows, rows))
    for weight in weights:
        wide = weight.astype(np.float64)
        square += wide @ wide.T
    values, U = np.linalg.eigh(square)
    S = np.sqrt(np.maximum(values[::-1], 0))
    rank = max(1, int(np.sum(S / S[0] > _NEGLIGIBLE)))
    S, U = S[:rank], U[:, ::-1][:, :rank]
    U = U * np.sign(U[np.abs(U).argmax(0), np.arange(rank)])
    V = np.stack([((U.T @ weight.astype(np.float64)) / S[:, None]).astype(np.float32) for weight in weights])
    return U.astype(np.float32), S.astype(np.float32), V


def initial_network(columns: int, seed: tuple[int, int]) -> Network:
    """Three linear layers, ``[in, out]`` and ``[out]``, uniform within one over the root of ``in``."""
    key = jax.random.fold_in(jax.random.key(seed[0]), np.uint32(seed[1]))
    sizes = (2 * columns, HIDDEN, HIDDEN, columns)
    network = []
    for i, (wide, out) in enumerate(itertools.pairwise(sizes)):
        ends = {"minval": -(wide**-0.5), "maxval": wide**-0.5}
        keys = jax.random.split(jax.random.fold_in(key, i))
        network.append((jax.random.uniform(keys[0], (wide, out), **ends), jax.random.uniform(keys[1], (out,), **ends)))
    return network


def order_of(samples: int, seed: tuple[int, int], epoch: int) -> np.ndarray:
    """Samples of an epoch's batches, ``[batches, batch]``; what does not fill a batch is left out until the next."""
    batch = min(BATCH, samples)
    shuffled = np.random.default_rng([*map(abs, seed), epoch]).permutation(samples)
    return shuffled[: samples // batch * batch].reshape(-1, batch)


def learn(V_LRC: np.ndarray, seed: tuple[int, int], epochs: int) -> tuple[Network, float]:
    """The network, and its mean loss in the last epoch. A sample is a row of a block that has two neighbours."""
    network = initial_network(V_LRC.shape[2], seed)
    state = _optimizer().init(network)
    blocks, loss = jnp.asarray(V_LRC), np.inf
    for epoch in range(epochs):
        order = order_of((len(V_LRC) - 2) * V_LRC.shape[1], seed, epoch)
        network, state, loss = _epoch(network, state, blocks, order)
    return network, float(loss)


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE, weight_decay=0.01)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _epoch(network: Network, state: Any, V_LRC: jax.Array, order: jax.Array) -> tuple[Network, Any, jax.Array]:
    def step(carry: tuple[Network, Any], samples: jax.Array) -> tuple[tuple[Network, Any], jax.Array]:
        network, state = carry
        layer, row = 1 + samples // V_LRC.shape[1], samples % V_LRC.shape[1]
        around = jnp.concatenate([V_LRC[layer - 1, row], V_LRC[layer + 1, row]], axis=1)
        loss, gradients = jax.value_and_grad(_loss)(network, around, V_LRC[layer, row])
        updates, state = _optimizer().update(gradients, state, network)
        return (optax.apply_updates(network, updates), state), loss

    (network, state), losses = jax.lax.scan(step, (network, state), order)
    return network, state, losses.mean()


def _loss(network: Network, around: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean squared error, and a small share of the squared difference of the batch's norms."""
    found = predict(network, around)
    norms = jnp.sqrt(jnp.square(found).sum() + 1e-24) - jnp.sqrt(jnp.square(wanted).sum())
    return (1 - _NORM_SHARE) * jnp.square(found - wanted).mean() + _NORM_SHARE * jnp.square(norms)


def predict(network: Network, around: Any) -> jax.Array:
    """Rows of a block ``[N, in]`` from those of the block before and the one after, ``[N, 2 in]``."""
    x = jnp.asarray(around)
    for weight, bias in network[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ network[-1][0] + network[-1][1]
