"""The device mesh, and the sharding rules of every array dim."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tli_jax.errors import UsageError

AXES = ("data", "fsdp", "expert", "tensor")
# Dim letters (see models.config) -> mesh axes. Dims without a rule are replicated. An axis shards the first dim of an
# array that names it. Parameters shard D over fsdp but activations do not, so the weights of a layer are all-gathered
# when it runs (ZeRO, arXiv 1910.02054). Heads, F and V are sharded over tensor (Megatron, arXiv 1909.08053), experts
# over expert. Parameters without experts use the expert axis like fsdp.
PARAM_RULES: dict[str, tuple[str, ...]] = {"E": ("expert",), "D": ("fsdp", "expert"), "F": ("tensor",)}
PARAM_RULES |= {"Hh": ("tensor",), "Kh": ("tensor",), "V": ("tensor",)}
BATCH = ("data", "fsdp", "expert")
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {"B": BATCH, "V": ("tensor",), "H": ("tensor",)}


def make_mesh(degrees: Mapping[Any, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with the axes ``data``, ``fsdp``, ``expert`` and ``tensor``, laid out for the links between devices.

    With several slices (groups of devices with slow links between them), ``data`` spans the slices.

    Args:
        degrees: axis -> size; -1 takes the remaining devices. Defaults: ``data`` is the number of slices, ``fsdp`` -1,
            ``expert`` and ``tensor`` 1.

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices()) if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    requested = {"data": slices, "fsdp": -1, "expert": 1, "tensor": 1} | dict(degrees)
    if "fsdp" not in degrees and -1 in degrees.values():
        requested["fsdp"] = 1
    product = " × ".join(f"{axis} {requested[axis]}" for axis in AXES)
    inferred = [axis for axis in AXES if requested[axis] == -1]
    fixed = math.prod(size for size in requested.values() if size != -1)
    if len(inferred) > 1 or any(size < 1 and size != -1 for size in requested.values()):
        raise UsageError(f"mesh: {product}: every axis must be 1 or more, and at most one may be -1")
    shape = [requested[axis] if requested[axis] != -1 else len(devices) // max(fixed, 1) for axis in AXES]
    if math.prod(shape) != len(devices):
        raise UsageError(f"mesh: {product} does not give the {len(devices)} devices of this run: change mesh")
    split = {"allow_split_physical_axes": True}  # else JAX refuses some shapes that are merely slower
    if slices > 1:
        if shape[0] % slices:
            raise UsageError(f"mesh: data is {shape[0]}, but must be a multiple of the number of slices ({slices})")
        inner = [shape[0] // slices, *shape[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1, 1], devices=devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, **split)
    # Auto axes: the compiler propagates shardings from the constraints.
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_fits(mesh: Mesh, sizes: Mapping[str, int], batch: int) -> None:
    """Check that every dim divides evenly over its mesh axes.

    Args:
        sizes: dim letter -> size, for the dims of the parameters, the heads ``H`` and the key/value heads ``K``. ``E``
            is 0 without experts.
        batch: sequences per microbatch.

    Raises:
        UsageError: a size is not divisible. The message names the dim, its size and the axis.
    """
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    if expert > 1 and not sizes["E"]:
        raise UsageError(f"mesh: expert is {expert}, but the model has no experts: change mesh")

    def named(axes: Sequence[str]) -> str:
        return " × ".join(axis for axis in axes if mesh.shape[axis] > 1)

    checks = [("hidden size", sizes["D"], named(("fsdp", "expert")), mesh.shape["fsdp"] * expert)]
    checks += [("number of experts", sizes["E"], "expert", expert)]
    checks += [
        (name, sizes[dim], "tensor", tensor)
        for name, dim in (("heads", "H"), ("key/value heads", "K"), ("feed-forward size", "F"), ("vocabulary", "V"))
    ]
    checks += [("batch size / grad_accum_steps", batch, named(BATCH), batch_degree(mesh))]
    for name, size, axis, degree in checks:
        if size % degree:
            raise UsageError(f"mesh: {name} {size} is not divisible by {axis} = {degree}: change mesh or {name}")


def batch_degree(mesh: Mesh) -> int:
    """Return the number of batch shards."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def _spec(mesh: Mesh, dims: Sequence[str], rules: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    free, spec = {axis for axis in AXES if mesh.shape[axis] > 1}, []
    for dim in dims:
        axes = tuple(axis for axis in rules.get(dim, ()) if axis in free)
        free -= set(axes)
        spec.append(axes or None)
    return PartitionSpec(*spec)


def param_sharding(mesh: Mesh, dims: Sequence[str]) -> NamedSharding:
    """Return the sharding of a parameter or its moments: ``("L", "Hh", "D")`` shards Hh over tensor and D over fsdp."""
    return NamedSharding(mesh, _spec(mesh, dims, PARAM_RULES))


def batch_sharding(mesh: Mesh, dims: Sequence[str]) -> NamedSharding:
    """Return the sharding of an input or activation: ``("A", "B", "T")`` shards B over data, fsdp and expert."""
    return NamedSharding(mesh, _spec(mesh, dims, ACTIVATION_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(mesh: Mesh, x: jax.Array, dims: str) -> jax.Array:
    """Constrain the sharding of an activation under ``jit``. Each letter of ``dims`` is a dim."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, dims))


def local_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Return the rows of a global batch that this process holds, sorted. ``sharding`` is that of ``("B",)``."""
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in indices if index is not None for row in range(*index[0].indices(rows))})
