"""What the tensors of an injected layer become: the arithmetic of a row, for NumPy and JAX arrays alike.

Arithmetic is in fp32 and rounded once to the stored dtype.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
    """One tensor of one injected layer by an initialiser that computes.

    Args:
        source: the tensor of the layer before, without the layer dim.
        row: number of the layer in the grown model; with the seed and the tensor's name it is the random key.
        name: the tensor's name within the layer, e.g. ``mlp.up_proj.weight``.
        scale: factor on the result.
        options: the plan's: ``seed``, ``noise_ratio``, ``std``.
    """
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
