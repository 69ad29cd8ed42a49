"""A function of whole matrices, applied to stacks of sharded ones: each device works on the matrices of some layers."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tli_jax.distributed.mesh import AXES, axes_by_dim, param_sharding


def map_matrices(mesh: Mesh, dims: Sequence[str], f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Apply ``f`` to a stack that is sharded like a parameter, without gathering it.

    All-to-alls exchange parts of matrices for whole ones of fewer layers, and back afterwards. Devices that hold the
    same parts share the layers too. A stack that does not divide evenly is padded with zeros.

    Args:
        dims: dims of x, the last two of which are those of a matrix: ``("L", "F", "D")``, ``("L", "E", "F", "D")``.
        f: ``[N, out, in] -> [N, out, in]``, on each matrix separately.
    """
    spec = param_sharding(mesh, dims).spec
    axes = axes_by_dim(spec)
    split = [(axis, dim) for dim in (1, 2) for axis in axes[dim - 3]]  # in the order of their shards
    copies = tuple(axis for axis in AXES if mesh.shape[axis] > 1 and not any(axis in part for part in axes))
    degree = math.prod(mesh.shape[axis] for axis, _ in split) * math.prod(mesh.shape[axis] for axis in copies)

    def local(x: jax.Array) -> jax.Array:
        matrices = x.reshape(-1, *x.shape[-2:])
        count = len(matrices)
        matrices = jnp.pad(matrices, ((0, -count % degree), (0, 0), (0, 0)))
        if copies:
            share = len(matrices) // math.prod(mesh.shape[axis] for axis in copies)
            matrices = lax.dynamic_slice_in_dim(matrices, lax.axis_index(copies) * share, share)
        for axis, dim in reversed(split):
            matrices = lax.all_to_all(matrices, axis, split_axis=0, concat_axis=dim, tiled=True)
        matrices = f(matrices)
        for axis, dim in split:
            matrices = lax.all_to_all(matrices, axis, split_axis=dim, concat_axis=0, tiled=True)
        if copies:
            matrices = lax.all_gather(matrices, copies, tiled=True)
        return matrices[:count].reshape(x.shape)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
