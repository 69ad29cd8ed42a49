"""Initialisers: how the tensors of an injected layer are computed, for NumPy and JAX arrays alike.

Arithmetic is in fp32 and rounded once to the stored dtype.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import HOST_INITS


def combine(sources: Sequence[Any], weights: Sequence[Any], scale: Any) -> Any:
    """``scale * sum(weights * sources)``. Weights and scale are fp32 and broadcast."""
    total = sources[0].astype(np.float32) * weights[0]
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        total = total + source.astype(np.float32) * weight
    return (total * scale).astype(sources[0].dtype)


def round_statistic(x: jax.Array) -> jax.Array:
    """Round to bf16, so that the result does not depend on the order in which a program sums."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def salt_of(name: str) -> np.uint32:
    """What a random key takes from a name. Jitted functions take it in place of the name, so that tensors of one shape
    share a program."""
    return np.uint32(zlib.crc32(name.encode()))


def random_key(seed: int, row: jax.Array, salt: jax.Array | np.uint32) -> jax.Array:
    """The random key of a tensor in grown layer ``row``."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), salt)


def compute(init: str, source: Any, row: int, name: str, scale: float, options: Mapping[str, Any]) -> jax.Array:
    """Compute a tensor of an injected layer by ``noise`` or ``random``. Each expert's tensor is computed separately.

    Args:
        source: the tensor of the layer before, without the layer dim.
        row: number of the grown layer. The random key depends on it, the seed and the name.
        name: of the tensor within the layer, e.g. ``mlp.up_proj.weight``.
        scale: factor on the result.
        options: of the plan: ``seed``, ``noise_ratio``, ``std``.
    """
    if source.ndim == 3:
        experts = [compute(init, expert, row, f"{name}.{i}", scale, options) for i, expert in enumerate(source)]
        return jnp.stack(experts)
    used = tuple((key, options[key]) for key in ("seed", "noise_ratio", "std") if key in options)
    return _compute(init, source, np.uint32(row), salt_of(name), name.endswith("bias"), np.float32(scale), used)


# Compiled even outside of jit, so that growth in memory and from file to file gives the same bytes.
@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _compute(
    init: str,
    source: jax.Array,
    row: jax.Array,
    salt: jax.Array,
    is_bias: bool,
    scale: jax.Array,
    options: tuple[tuple[str, Any], ...],
) -> jax.Array:
    given = dict(options)
    key = random_key(given["seed"], row, salt)
    if init == "noise":
        x = source.astype(jnp.float32)
        rms = round_statistic(jnp.sqrt(jnp.mean(jnp.square(x))))
        x = x + given["noise_ratio"] * rms * jax.random.normal(key, x.shape, jnp.float32)
    elif source.ndim == 1:
        x = jnp.full(source.shape, 0.0 if is_bias else 1.0, jnp.float32)
    else:
        x = given["std"] * jax.random.normal(key, source.shape, jnp.float32)
    return (x * scale).astype(source.dtype)


class HostInit(Protocol):
    """An initialiser that runs on the host and reads the layers of the base.

    Called with the number of a grown layer and a tensor's name, it returns the tensor before scaling and rounding.
    ``facts`` is written to ``growth.json``.
    """

    facts: dict[str, Any]

    def __call__(self, number: int, name: str) -> np.ndarray: ...


class HostInits:
    """The host initialisers of a plan, each created on first use.

    Args:
        read: returns a tensor of the base, given the number of the layer and the name within it.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        self.plan, self.read = plan, read
        self._open: dict[str, HostInit] = {}

    def tensor(self, number: int, name: str, is_output: bool, dtype: Any) -> np.ndarray:
        """A tensor of grown layer ``number``, scaled and rounded once to ``dtype``.

        Raises:
            UsageError: a package is missing, or the base is not supported by the initialiser.
        """
        row = self.plan.rows[number]
        if row.init not in self._open:
            self._open[row.init] = _load(row.init)(self.plan, self.read)
        return (self._open[row.init](number, name) * row.factor(is_output)).astype(dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """What each initialiser reports."""
        return {name: init.facts for name, init in self._open.items()}


def _load(init: str) -> Callable[[Plan, Callable[[int, str], Any]], HostInit]:
    # Imported here, because POT and optax are not needed elsewhere in growth.
    assert init in HOST_INITS
    if init == "transport":
        from tli_jax.growth.transport import Transport

        return Transport
    from tli_jax.growth.predictor import Predictor

    return Predictor
