"""The initialiser ``predictor``: a network predicts a layer from its two neighbours (LESA, arXiv 2502.13794).

For each tensor name, the matrices of all layers are decomposed together as U S V. The network learns on the base to
predict a layer's block of V, row by row, from the blocks of the layers before and after. Memory is that of one tensor
name: V of all layers in fp32, and three square matrices of the rows in fp64.
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
_NORM_WEIGHT = 0.0005
_NEGLIGIBLE = 1e-7  # relative to the largest singular value; smaller ones are rounding errors

Network = Any  # a list of (weight [in, out], bias [out])


class Predictor:
    """Computes the tensors of a plan's injected layers.

    The network of a tensor name is trained when the first such tensor is requested and dropped when the name changes,
    so request all layers of a name in a row.

    Args:
        plan: its options ``seed`` and ``epochs`` are for the network. Norms are the ``mean`` of the neighbours, or
            those of layer 0 with option ``norms`` = ``first``, as in the authors' code.
        read: returns a tensor of the base, given the number of the layer and the name within it.

    Attributes:
        facts: the network's loss in the last epoch, by tensor name.

    Raises:
        UsageError: the base has fewer than three layers.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        if plan.base_layers < 3:
            raise UsageError(f"init predictor learns from three layers in a row, the base has {plan.base_layers}")
        self.plan, self.read = plan, read
        self.facts: dict[str, Any] = {"loss": {}}
        self._name, self._tensors = "", {}

    def __call__(self, number: int, name: str) -> np.ndarray:
        """The tensor ``name`` of grown layer ``number``, fp32 or fp64, before its row's scale. Norms are averaged.

        Raises:
            UsageError: the tensor has more than two dims, as those of experts have.
        """
        if name == self._name:
            return self._tensors[number]
        neighbours = [layer for layer, _ in self.plan.rows[number].sources]
        first = np.asarray(self.read(neighbours[0], name))
        if first.ndim > 2:
            raise UsageError(f"init predictor makes dense layers, {name} has {first.ndim} dims: use another init")
        if first.ndim < 2:
            layers = neighbours if self.plan.options.get("norms", "mean") == "mean" else [0]
            return np.mean([np.asarray(self.read(layer, name)).astype(np.float64) for layer in layers], axis=0)
        self._name, self._tensors = name, self._predict(name)
        return self._tensors[number]

    def _predict(self, name: str) -> dict[int, np.ndarray]:
        U, S, V_LRC = decompose([np.asarray(self.read(layer, name)) for layer in range(self.plan.base_layers)])
        options = self.plan.options
        seed = (options.get("seed", 0), zlib.crc32(name.encode()))
        network, loss = train(V_LRC, seed, options.get("epochs", 5))
        self.facts["loss"][name] = loss
        tensors = {}
        for number, row in enumerate(self.plan.rows):
            if row.init == "predictor":
                block = predict(network, np.concatenate([V_LRC[layer] for layer, _ in row.sources], axis=1))
                tensors[number] = (U * S) @ np.asarray(block)
        return tensors


def decompose(weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular value decomposition of the matrices side by side: U ``[out, R]``, S ``[R]``, V ``[L, R, in]``, fp32.

    Computed in fp64 from the Gram matrix of the rows, which is much smaller than all matrices together. The largest
    entry of each column of U is positive, which makes the signs unique.
    """
    rows = len(weights[0])
    gram = np.zeros((rows, rows))
    for weight in weights:
        wide = weight.astype(np.float64)
        gram += wide @ wide.T
    values, U = np.linalg.eigh(gram)
    S = np.sqrt(np.maximum(values[::-1], 0))
    rank = max(1, int(np.sum(S / S[0] > _NEGLIGIBLE)))
    S, U = S[:rank], U[:, ::-1][:, :rank]
    U = U * np.sign(U[np.abs(U).argmax(0), np.arange(rank)])
    V = np.stack([((U.T @ weight.astype(np.float64)) / S[:, None]).astype(np.float32) for weight in weights])
    return U.astype(np.float32), S.astype(np.float32), V


def initial_network(columns: int, seed: tuple[int, int]) -> Network:
    """Three linear layers, ``[in, out]`` and ``[out]``, uniform in ±1/√in."""
    key = jax.random.fold_in(jax.random.key(seed[0]), np.uint32(seed[1]))
    sizes = (2 * columns, HIDDEN, HIDDEN, columns)
    network = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        limits = {"minval": -(fan_in**-0.5), "maxval": fan_in**-0.5}
        keys = jax.random.split(jax.random.fold_in(key, i))
        weight = jax.random.uniform(keys[0], (fan_in, fan_out), **limits)
        network.append((weight, jax.random.uniform(keys[1], (fan_out,), **limits)))
    return network


def epoch_batches(samples: int, seed: tuple[int, int], epoch: int) -> np.ndarray:
    """Indices of the samples of each batch, ``[batches, batch]``. An incomplete batch is dropped."""
    batch = min(BATCH, samples)
    shuffled = np.random.default_rng([*map(abs, seed), epoch]).permutation(samples)
    return shuffled[: samples // batch * batch].reshape(-1, batch)


def train(V_LRC: np.ndarray, seed: tuple[int, int], epochs: int) -> tuple[Network, float]:
    """Train on the rows of all blocks with two neighbours. Returns the network and its mean loss in the last epoch."""
    network = initial_network(V_LRC.shape[2], seed)
    state = _optimizer().init(network)
    blocks, loss = jnp.asarray(V_LRC), np.inf
    for epoch in range(epochs):
        batches = epoch_batches((len(V_LRC) - 2) * V_LRC.shape[1], seed, epoch)
        network, state, loss = _train_epoch(network, state, blocks, batches)
    return network, float(loss)


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE, weight_decay=0.01)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _train_epoch(network: Network, state: Any, V_LRC: jax.Array, batches: jax.Array) -> tuple[Network, Any, jax.Array]:
    def step(carry: tuple[Network, Any], samples: jax.Array) -> tuple[tuple[Network, Any], jax.Array]:
        network, state = carry
        layer, row = 1 + samples // V_LRC.shape[1], samples % V_LRC.shape[1]
        neighbours = jnp.concatenate([V_LRC[layer - 1, row], V_LRC[layer + 1, row]], axis=1)
        loss, gradients = jax.value_and_grad(_loss)(network, neighbours, V_LRC[layer, row])
        updates, state = _optimizer().update(gradients, state, network)
        return (optax.apply_updates(network, updates), state), loss

    (network, state), losses = jax.lax.scan(step, (network, state), batches)
    return network, state, losses.mean()


def _loss(network: Network, neighbours: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error, plus a small weight on the squared difference of the norms of the batch."""
    predictions = predict(network, neighbours)
    norms = jnp.sqrt(jnp.square(predictions).sum() + 1e-24) - jnp.sqrt(jnp.square(targets).sum())
    return (1 - _NORM_WEIGHT) * jnp.square(predictions - targets).mean() + _NORM_WEIGHT * jnp.square(norms)


def predict(network: Network, neighbours: Any) -> jax.Array:
    """Rows of a block ``[N, in]`` from those of the blocks before and after, ``[N, 2 in]``."""
    x, matmul = jnp.asarray(neighbours), functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    for weight, bias in network[:-1]:
        x = jax.nn.relu(matmul(x, weight) + bias)
    return matmul(x, network[-1][0]) + network[-1][1]
