"""Functions of whole matrices on sharded stacks: what they compute, and what they exchange."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.distributed.matrices import map_matrices
from tli_jax.distributed.mesh import make_mesh, param_sharding

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}]
STACKS = [(("L", "F", "D"), (5, 16, 24)), (("L", "D", "Hh"), (8, 24, 16)), (("L", "E", "F", "D"), (3, 4, 16, 24))]


def whole(matrices_NOI):
    """Something that no part of a matrix can compute alone."""
    return jnp.sin(matrices_NOI) @ jnp.swapaxes(matrices_NOI, -1, -2) @ matrices_NOI


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("dims", "shape"), STACKS, ids=lambda value: "".join(map(str, value)))
def test_the_result_is_that_of_whole_matrices(mesh, dims, shape):
    mesh = make_mesh(mesh)
    sharding = param_sharding(mesh, dims)
    x = jax.random.normal(jax.random.key(0), shape)
    run = jax.jit(lambda x: map_matrices(mesh, dims, whole, x), out_shardings=sharding)
    np.testing.assert_allclose(run(jax.device_put(x, sharding)), whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_device_gathers_a_stack(mesh):
    mesh = make_mesh(mesh)
    dims, shape = ("L", "F", "D"), (16, 64, 48)
    sharding = param_sharding(mesh, dims)
    run = jax.jit(lambda x: map_matrices(mesh, dims, whole, x), out_shardings=sharding)
    text = run.lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)).compile().as_text()
    # XLA for CPUs writes an all-to-all as one array per peer. Only layers of this device come from other copies.
    assert len(re.findall(r" all-to-all\(", text)) == 2 * sum(axis in "fsdp expert tensor" for axis in _used(mesh))
    gathers = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    parts = int(np.prod(sharding.shard_shape(shape)))
    assert len(gathers) == ("data" in _used(mesh))
    assert all(np.prod([int(n) for n in gather.split(",")]) <= parts for gather in gathers)


def _used(mesh):
    return [axis for axis, size in mesh.shape.items() if size > 1]
