"""Meshes, sharding rules, and the rows of a batch that a process holds."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tli_jax.distributed.mesh import batch_sharding, check_fits, local_rows, make_mesh, param_sharding
from tli_jax.errors import UsageError

SIZES = {"V": 64, "D": 32, "F": 48, "H": 4, "K": 2, "E": 0}


@pytest.mark.parametrize(
    ("degrees", "shape"),
    [
        ({}, (1, 8, 1, 1)),
        ({"data": 2}, (2, 4, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"fsdp": 2, "expert": 4}, (1, 2, 4, 1)),
        ({"data": -1}, (8, 1, 1, 1)),
        ({"tensor": -1}, (1, 1, 1, 8)),
        ({"fsdp": -1, "tensor": 4}, (1, 2, 1, 4)),
    ],
)
def test_degrees(degrees, shape):
    assert tuple(make_mesh(degrees).shape.values()) == shape


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"data": 3, "fsdp": 2}, "mesh: data 3 × fsdp 2 × expert 1 × tensor 1 does not give the 8 devices"),
        ({"data": 3}, "mesh: data 3 × fsdp -1 × expert 1 × tensor 1 does not give the 8 devices"),
        ({"data": 16, "fsdp": 1}, "does not give the 8 devices"),
        (
            {"data": -1, "fsdp": -1},
            "mesh: data -1 × fsdp -1 × expert 1 × tensor 1: every axis must be 1 or more, and at most one",
        ),
        ({"tensor": 0}, "every axis must be 1 or more"),
    ],
)
def test_degrees_that_do_not_multiply_to_the_devices_are_refused(degrees, words):
    with pytest.raises(UsageError) as error:
        make_mesh(degrees)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "batch", "words"),
    [
        ({"K": 1}, 8, "key/value heads 1 is not divisible by tensor = 2"),
        ({"V": 63}, 8, "vocabulary 63 is not divisible by tensor = 2"),
        ({"D": 31}, 8, "hidden size 31 is not divisible by fsdp = 2"),
        ({}, 6, "batch size / grad_accum_steps 6 is not divisible by data × fsdp = 4"),
    ],
)
def test_indivisible_sizes_are_refused(sizes, batch, words):
    with pytest.raises(UsageError) as error:
        check_fits(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), SIZES | sizes, batch)
    assert words in str(error.value)
    check_fits(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), SIZES, 8)


def test_sharding_follows_dims():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert param_sharding(mesh, ("L", "Hh", "D")).spec == P(None, "tensor", "fsdp")
    assert param_sharding(mesh, ("L", "D", "F")).spec == P(None, "fsdp", "tensor")
    assert param_sharding(mesh, ("V", "D")).spec == P("tensor", "fsdp")
    assert batch_sharding(mesh, ("A", "B", "T")).spec == P(None, ("data", "fsdp"), None)
    # A weight in use: all-gathered over fsdp, but not over tensor.
    assert batch_sharding(mesh, ("V", "D")).spec == P("tensor", None)


def test_one_process_holds_all_rows():
    mesh = make_mesh({"data": 2, "tensor": 2})
    assert local_rows(batch_sharding(mesh, ("B",)), 12) == list(range(12))
    assert len(jax.devices()) == 8
