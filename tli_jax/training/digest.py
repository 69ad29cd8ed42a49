"""Checksums of sharded arrays."""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_SEEDS = (0x243F6A88, 0x85A308D3)  # digits of pi; any two numbers would do


def digests(arrays: list[jax.Array]) -> list[str]:
    """Return a 64-bit checksum of each array, computed on its shards. It does not depend on the sharding.

    A checksum has two words. Each is the sum, over all elements, of a bijection of the element's bits, salted with its
    position. Changing one element always changes the checksum; swapping two almost certainly does.
    """
    if not arrays:
        return []
    sharding = arrays[0].sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    words = np.asarray(jax.device_get(_program(replicated)(arrays)))
    return [f"{first:08x}{second:08x}" for first, second in words.tolist()]


@functools.cache
def _program(replicated: NamedSharding | None) -> Any:
    return jax.jit(lambda arrays: jnp.stack([_words(array) for array in arrays]), out_shardings=replicated)


@jax.jit  # inside the program too, so that arrays of one shape are traced once
def _words(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    bits = lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * min(bits.dtype.itemsize, 4)}")).astype(jnp.uint32)
    mixed = []
    for seed in _SEEDS:
        # One index per dimension, since a linear index overflows. The hash keeps their sums from colliding.
        salt = jnp.uint32(seed)
        for dim, size in enumerate(bits.shape):
            shape = [size if other == dim else 1 for other in range(bits.ndim)]
            start = jnp.uint32((seed + 0x9E3779B9 * (dim + 1)) % 2**32)
            salt += _mix(lax.broadcasted_iota(jnp.uint32, shape, dim) + start)
        mixed.append(_mix(bits ^ salt))
    # One reduction for both words: with two, XLA for CPUs materializes the mixed words, twice the size of the arrays.
    zeros = (jnp.uint32(0),) * 2
    return jnp.stack(lax.reduce(tuple(mixed), zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim))))


def _mix(word: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3, a bijection."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
