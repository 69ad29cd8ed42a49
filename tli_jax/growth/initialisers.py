"""What the tensors of an injected layer become: the arithmetic of a row, for NumPy and JAX arrays alike.

Arithmetic is in fp32 and rounded once to the stored dtype.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.growth.plan import HOST_INITS, Plan


def combine(sources: Sequence[Any], weights: Sequence[Any], scale: Any) -> Any:
    """``scale * sum(weights * sources)``; weights and scale are fp32 scalars, or fp32 arrays that broadcast."""
    total = sources[0].astype(np.float32) * weights[0]
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        total = total + source.astype(np.float32) * weight
    return (total * scale).astype(sources[0].dtype)


def noise(source: jax.Array, key: jax.Array, name: str, options: Mapping[str, Any]) -> jax.Array:
    """The source plus Gaussian noise of ``noise_ratio`` times its root mean square, in fp32."""
    source = source.astype(jnp.float32)
    # The rms is rounded to bf16 so that the order in which a program sums does not show in the result.
    rms = jnp.sqrt(jnp.mean(jnp.square(source))).astype(jnp.bfloat16).astype(jnp.float32)
    return source + options["noise_ratio"] * rms * jax.random.normal(key, source.shape, jnp.float32)


def random(source: jax.Array, key: jax.Array, name: str, options: Mapping[str, Any]) -> jax.Array:
    """A fresh tensor of the architecture, in fp32: matrices from N(0, ``std``), norms one, biases zero."""
    if source.ndim == 1:
        return jnp.full(source.shape, 0.0 if name.endswith("bias") else 1.0, jnp.float32)
    return options["std"] * jax.random.normal(key, source.shape, jnp.float32)


COMPUTED: dict[str, Callable[[jax.Array, jax.Array, str, Mapping[str, Any]], jax.Array]] = {
    "noise": noise,
    "random": random,
}


def compute(init: str, source: Any, row: int, name: str, scale: float, options: Mapping[str, Any]) -> jax.Array:
    """One tensor of one injected layer by an initialiser that draws; of a layer's experts, each by itself.

    Args:
        source: the tensor of the layer before, without the layer dim.
        row: number of the layer in the grown model; with the seed and the tensor's name it is the random key.
        name: the tensor's name within the layer, e.g. ``mlp.up_proj.weight``.
        scale: factor on the result.
        options: the plan's: ``seed``, ``noise_ratio``, ``std``.
    """
    if source.ndim == 3:
        each = [compute(init, one, row, f"{name}.{expert}", scale, options) for expert, one in enumerate(source)]
        return jnp.stack(each)
    needed = tuple((key, options[key]) for key in ("seed", "noise_ratio", "std") if key in options)
    return _compute(init, source, np.uint32(row), name, np.float32(scale), needed)


# One program wherever it is called from: the same bytes in memory and file to file.
@functools.partial(jax.jit, static_argnums=(0, 3, 5))
def _compute(
    init: str, source: jax.Array, row: jax.Array, name: str, scale: jax.Array, options: tuple[tuple[str, Any], ...]
) -> jax.Array:
    given = dict(options)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(given["seed"]), row), zlib.crc32(name.encode()))
    return (COMPUTED[init](source, key, name, given) * scale).astype(source.dtype)


class Host(Protocol):
    """An initialiser that works on the host, on the base's tensors as they are: ``(row, tensor) -> [out, in]``, not yet
    scaled nor rounded. ``facts`` is what it found on the way, for ``growth.json``."""

    facts: dict[str, Any]

    def __call__(self, number: int, name: str) -> np.ndarray: ...


class Hosts:
    """All of them that a plan needs, each made when it is first asked.

    Args:
        read: the tensor of a base layer, by the number of the layer and its name within it.
    """

    def __init__(self, plan: Plan, read: Callable[[int, str], Any]):
        self.plan, self.read = plan, read
        self._made: dict[str, Host] = {}

    def tensor(self, number: int, name: str, is_output: bool, dtype: Any) -> np.ndarray:
        """Of grown layer ``number``, scaled, rounded once to ``dtype``.

        Raises:
            UsageError: what the initialiser needs is not installed, or the base is not as it needs it.
        """
        row = self.plan.rows[number]
        if row.init not in self._made:
            self._made[row.init] = _open_host(row.init)(self.plan, self.read)
        return (self._made[row.init](number, name) * row.factor(is_output)).astype(dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """What each initialiser found."""
        return {init: host.facts for init, host in self._made.items()}


def _open_host(init: str) -> Callable[[Plan, Callable[[int, str], Any]], Host]:
    # Here, because one brings POT and the other optax, which nothing else in growth needs.
    assert init in HOST_INITS
    if init == "transport":
        from tli_jax.growth.transport import Transport

        return Transport
    from tli_jax.growth.predictor import Predictor

    return Predictor
