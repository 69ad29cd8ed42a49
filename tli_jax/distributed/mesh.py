"""The device mesh, and the sharding rules of every array dim."""

import math
from collections.abc import Iterable, Mapping, Sequence
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

    Any axis may span TPU slices (groups of devices with slow links between them): ``data`` first, then ``fsdp``,
    ``expert`` and ``tensor``, each as far as its size allows. The hosts of other devices count as one slice, but their
    devices are taken in order, so the same axes span the hosts.

    Args:
        degrees: axis -> size; -1 takes the remaining devices. By default, ``data`` is the number of slices, ``fsdp``
            takes the rest, and ``expert`` and ``tensor`` are 1. If only ``fsdp`` is given, ``data`` takes the rest.

    Raises:
        UsageError: the sizes do not multiply to the number of devices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices()) if devices is None else list(devices)
    slices = slice_count(devices)
    rest = len(devices) // math.prod(max(size, 1) for size in degrees.values())
    requested = {"data": math.gcd(slices, rest), "fsdp": -1, "expert": 1, "tensor": 1} | dict(degrees)
    if -1 in degrees.values():
        requested["fsdp"] = degrees.get("fsdp", 1)
    elif "fsdp" in degrees and "data" not in degrees:
        requested["data"] = -1
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
        across = across_slices(shape, slices)
        inner = [size // degree for size, degree in zip(shape, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(inner, across, devices=devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, **split)
    # Auto axes: the compiler propagates shardings from the constraints.
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_count(devices: Iterable[Any]) -> int:
    """Return the number of TPU slices. GPUs count as one: XLA gives each of their hosts another ``slice_index``."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def describe_slices(mesh: Mesh) -> str:
    """Which axes span slices, as "data 2 × fsdp 4 across slices"; empty with one slice."""
    across = across_slices(mesh.devices.shape, slice_count(mesh.devices.flat))
    axes = [f"{axis} {degree}" for axis, degree in zip(AXES, across, strict=True) if degree > 1]
    return f"{' × '.join(axes)} across slices" if axes else ""


def across_slices(shape: Sequence[int], slices: int) -> list[int]:
    """Return the degree of each axis that spans slices. Their product is ``slices``.

    Raises:
        UsageError: the sizes share too few factors with the number of slices.
    """
    degrees, left = [], slices
    for size in shape:
        degrees.append(math.gcd(size, left))
        left //= degrees[-1]
    if left > 1:
        sizes = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UsageError(f"mesh: {sizes} cannot be laid out over {slices} slices: make data a multiple of {slices}")
    return degrees


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


def axes_by_dim(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dim that a spec names."""
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


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
