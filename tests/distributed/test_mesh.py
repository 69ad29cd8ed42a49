"""Meshes, sharding rules, and the rows of a batch that a process holds."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tli_jax.cli.libtpu import has_compiler
from tli_jax.distributed.mesh import (
    AXES,
    across_slices,
    batch_sharding,
    check_fits,
    describe_slices,
    local_rows,
    make_mesh,
    param_sharding,
)
from tli_jax.distributed.topology import compile_only_devices, parse_topology
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
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 2)),
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


class Gpu:
    """A GPU as XLA presents it: each host has a slice_index of its own."""

    device_kind, platform = "NVIDIA H100", "gpu"

    def __init__(self, index):
        self.id, self.process_index, self.slice_index = index, index // 8, index // 8


@pytest.mark.parametrize(
    ("degrees", "shape", "axes_in_a_host"),
    [
        ({}, (1, 32, 1, 1), []),
        ({"fsdp": 32}, (1, 32, 1, 1), []),
        ({"fsdp": 4, "tensor": 8}, (1, 4, 1, 8), ["tensor"]),
        ({"data": 2, "fsdp": 16}, (2, 16, 1, 1), []),
        ({"data": 4}, (4, 8, 1, 1), ["fsdp"]),
        ({"fsdp": 2, "expert": 16}, (1, 2, 16, 1), []),
        ({"data": 3}, None, []),
    ],
)
def test_any_axis_spans_gpu_hosts(degrees, shape, axes_in_a_host):
    gpus = [Gpu(index) for index in range(32)]
    if shape is None:
        with pytest.raises(UsageError, match="does not give the 32 devices"):
            make_mesh(degrees, gpus)
        return
    mesh = make_mesh(degrees, gpus)
    assert mesh.devices.shape == shape and not describe_slices(mesh)
    assert {gpu.id for gpu in mesh.devices.flat} == set(range(32))
    hosts = np.vectorize(lambda gpu: gpu.process_index)(mesh.devices)
    within = [axis for i, axis in enumerate(AXES) if shape[i] > 1 and (np.ptp(hosts, axis=i) == 0).all()]
    assert within == axes_in_a_host


@pytest.mark.parametrize(
    ("shape", "slices", "across"),
    [
        ((4, 64, 1, 1), 4, [4, 1, 1, 1]),
        ((1, 256, 1, 1), 4, [1, 4, 1, 1]),
        ((2, 128, 1, 1), 4, [2, 2, 1, 1]),
        ((1, 3, 8, 1), 4, [1, 1, 4, 1]),
        ((2, 3, 2, 8), 8, [2, 1, 2, 2]),
        ((1, 3, 1, 2), 4, None),
    ],
)
def test_axes_across_slices(shape, slices, across):
    if across is None:
        with pytest.raises(UsageError, match="fsdp 3 × expert 1 × tensor 2 cannot be laid out over 4 slices"):
            across_slices(shape, slices)
    else:
        assert across_slices(shape, slices) == across


@pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")
def test_fsdp_spans_tpu_slices():
    devices = compile_only_devices(parse_topology("v5e-8", 2))
    mesh = make_mesh({"fsdp": 16}, devices)
    assert describe_slices(mesh) == "fsdp 2 across slices"
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(16)
    assert list(slices) == [0] * 8 + [1] * 8
    assert make_mesh({}, devices).devices.shape == (2, 8, 1, 1)


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
