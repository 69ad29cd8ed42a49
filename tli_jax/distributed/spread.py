"""Read an array in parallel: spread its rows evenly over all devices of a mesh, then reshard it under ``jit``.

Devices that read their own shards would read the same bytes of a file several times: where an array is replicated, and
where a dim other than the leading one is sharded, because a shard is then a part of every row.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tli_jax.distributed.mesh import axes_by_dim


@dataclasses.dataclass(frozen=True)
class Spread:
    """How an array is read before it has its own sharding.

    Attributes:
        sharding: of the result.
        shape: of the result, ``[*leading, rows, …]``.
        dim: of the rows, which are spread over all axes that do not shard a leading dim.
    """

    sharding: NamedSharding
    shape: tuple[int, ...]
    dim: int

    @functools.cached_property
    def _axes(self) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
        """Axes of each leading dim; of the rows and later dims; and those over which the result is replicated.

        The rows are spread over the last two in this order. So XLA can all-gather over the replicated axes, and then
        move those of later dims with an all-to-all, in memory of two shards. Otherwise, it would all-gather the array.
        """
        dims = axes_by_dim(self.sharding.spec)
        dims += [()] * (len(self.shape) - len(dims))
        named = [axis for axes in dims for axis in axes]
        replicated = [axis for axis in self.sharding.mesh.axis_names if axis not in named]
        return dims[: self.dim], [axis for axes in dims[self.dim :] for axis in axes], replicated

    def _sharding(self, axes: list[str]) -> NamedSharding:
        return NamedSharding(self.sharding.mesh, PartitionSpec(*self._axes[0], tuple(axes)))

    @property
    def read_sharding(self) -> NamedSharding:
        return self._sharding([*self._axes[1], *self._axes[2]])

    @property
    def read_shape(self) -> tuple[int, ...]:
        """``shape`` with the rows padded to a multiple of their shards."""
        ways = math.prod(self.sharding.mesh.shape[axis] for axes in self._axes[1:] for axis in axes)
        rows = -(-self.shape[self.dim] // ways) * ways
        return (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])

    @property
    def processes(self) -> int:
        """Number of processes that read."""
        return len({device.process_index for device in self.sharding.device_set})

    @property
    def has_layers(self) -> bool:
        """Whether the first dim is a leading one that is not sharded, so that parts of it can be loaded in turn."""
        return self.dim > 0 and not self._axes[0][0]

    @property
    def is_direct(self) -> bool:
        """Whether what is read already is the result."""
        same = self.read_sharding.is_equivalent_to(self.sharding, len(self.shape))
        return same and self.read_shape == self.shape

    def reshard(self, array: jax.Array) -> jax.Array:
        """Turn an array with ``read_sharding`` and ``read_shape`` into the result, under ``jit``."""
        array = jax.lax.with_sharding_constraint(array, self._sharding(self._axes[1]))
        array = jax.lax.slice_in_dim(array, 0, self.shape[self.dim], axis=self.dim)
        return jax.lax.with_sharding_constraint(array, self.sharding)


def reshard(arrays: dict[str, jax.Array], spreads: dict[str, Spread]) -> dict[str, jax.Array]:
    """Reshard several arrays in one program."""
    moved = {name: spread for name, spread in spreads.items() if not spread.is_direct}
    if not moved:
        return arrays
    results = _reshard(tuple(moved.values()))([arrays[name] for name in moved])
    return arrays | dict(zip(moved, results, strict=True))


@functools.cache
def _reshard(spreads: tuple[Spread, ...]) -> Any:
    return jax.jit(lambda arrays: [spread.reshard(x) for spread, x in zip(spreads, arrays, strict=True)])


@functools.cache
def empty(sharding: NamedSharding, shape: tuple[int, ...], dtype: Any) -> Any:
    """A jitted function that makes an array of zeros."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.cache
def insert(spread: Spread) -> Any:
    """A jitted function that reshards a part of an array and writes it from index ``start`` on. Donates the array."""

    def run(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, spread.reshard(part), start, axis=0)

    return jax.jit(run, donate_argnums=0, out_shardings=spread.sharding)
