"""The mesh of devices, and one table that says where every dim of every array lies on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tli_jax.errors import UsageError

AXES = ("data", "fsdp", "expert", "tensor")
# Dim, by its letters in models.config -> mesh axes. What is not here lies whole on every device. T is left whole until
# there is an axis for it. As D is cut over fsdp in parameters and B in activations, a layer's weights are brought
# together when it runs (ZeRO, arXiv 1910.02054); heads, F and V are cut over tensor (Megatron, arXiv 1909.08053).
# Over expert lie the experts of each layer; what has none is cut over it as over fsdp. An axis cuts the first dim of an
# array that it can.
PARAM_RULES: dict[str, tuple[str, ...]] = {"E": ("expert",), "D": ("fsdp", "expert"), "F": ("tensor",)}
PARAM_RULES |= {"Hh": ("tensor",), "Kh": ("tensor",), "V": ("tensor",)}
BATCH = ("data", "fsdp", "expert")
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {"B": BATCH, "V": ("tensor",), "H": ("tensor",)}


def make_mesh(degrees: Mapping[Any, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp``, ``expert`` and ``tensor``, whose order suits the links between devices.

    Over several slices (or other groups of devices with slow links between), ``data`` spans the slices.

    Args:
        degrees: devices along an axis; -1 takes what is left. By default ``fsdp`` does, ``expert`` and ``tensor`` are
            1, and ``data`` the number of slices.

    Raises:
        UsageError: the degrees do not multiply to the number of devices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices()) if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    asked = {"data": slices, "fsdp": -1, "expert": 1, "tensor": 1} | dict(degrees)
    if "fsdp" not in degrees and -1 in degrees.values():
        asked["fsdp"] = 1
    product = " × ".join(f"{axis} {asked[axis]}" for axis in AXES)
    rest = [axis for axis in AXES if asked[axis] == -1]
    fixed = math.prod(size for size in asked.values() if size != -1)
    if len(rest) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise UsageError(f"mesh: {product}: every axis must be 1 or more, and one at most -1")
    shape = [asked[axis] if asked[axis] != -1 else len(devices) // max(fixed, 1) for axis in AXES]
    if math.prod(shape) != len(devices):
        raise UsageError(f"mesh: {product} does not give the {len(devices)} devices that there are: change mesh")
    split = {"allow_split_physical_axes": True}  # or some shapes are refused that are only not the fastest
    if slices > 1:
        if shape[0] % slices:
            raise UsageError(f"mesh: data is {shape[0]}, must be a multiple of the {slices} slices")
        inner = [shape[0] // slices, *shape[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1, 1], devices=devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, **split)
    # Auto axes: the compiler propagates places from those that are pinned.
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_fits(mesh: Mesh, sizes: Mapping[str, int], batch: int) -> None:
    """Refuse sizes that an axis of the mesh cannot cut evenly.

    Args:
        sizes: of the dims of the parameters, by letter, and ``H`` and ``K`` heads; ``E`` is 0 without experts.
        batch: sequences that run at a time.

    Raises:
        UsageError: names the dim, its size and the axis.
    """
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    if expert > 1 and not sizes["E"]:
        raise UsageError(f"mesh: expert is {expert}, but the model has no experts: change mesh")

    def named(axes: Sequence[str]) -> str:
        return " × ".join(axis for axis in axes if mesh.shape[axis] > 1)

    wanted = [("hidden size", sizes["D"], named(("fsdp", "expert")), mesh.shape["fsdp"] * expert)]
    wanted += [("number of experts", sizes["E"], "expert", expert)]
    wanted += [
        (name, sizes[dim], "tensor", tensor)
        for name, dim in (("heads", "H"), ("key/value heads", "K"), ("feed-forward size", "F"), ("vocabulary", "V"))
    ]
    wanted += [("batch size / grad_accum_steps", batch, named(BATCH), batch_degree(mesh))]
    for name, size, axis, degree in wanted:
        if size % degree:
            raise UsageError(f"mesh: {name} {size} cannot be cut over {axis} = {degree}: change mesh or {name}")


def batch_degree(mesh: Mesh) -> int:
    """Parts into which a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def _spec(mesh: Mesh, dims: Sequence[str], rules: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    free, parts = {axis for axis in AXES if mesh.shape[axis] > 1}, []
    for dim in dims:
        axes = tuple(axis for axis in rules.get(dim, ()) if axis in free)
        free -= set(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def param_sharding(mesh: Mesh, dims: Sequence[str]) -> NamedSharding:
    """Where a parameter lies, or a moment of it: ``("L", "Hh", "D")`` is L whole, Hh over tensor, D over fsdp."""
    return NamedSharding(mesh, _spec(mesh, dims, PARAM_RULES))


def batch_sharding(mesh: Mesh, dims: Sequence[str]) -> NamedSharding:
    """Where an activation lies, or input: ``("A", "B", "T")`` is B over data and fsdp."""
    return NamedSharding(mesh, _spec(mesh, dims, ACTIVATION_RULES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(mesh: Mesh, x: jax.Array, dims: str) -> jax.Array:
    """Pin an activation under ``jit``; its dims are spelled by one letter each."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, dims))


def local_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Rows of a global batch that this process holds, in ascending order; ``sharding`` is of ``("B", …)``."""
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(*index[0].indices(rows))})
