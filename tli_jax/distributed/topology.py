"""TPU slices and GPU clusters by name, as devices to compile for or to plan with."""

import dataclasses
import os
import re
from typing import Any

from tli_jax.cli.libtpu import silence_libtpu
from tli_jax.errors import UsageError, nearest

# Chips per slice -> the topology that Google Cloud assigns by default.
_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_3D |= {512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 3072: "12x16x16", 4096: "16x16x16"}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
        shapes: chips per slice -> topology.
        units_per_chip: what the number in a slice name counts, per chip. ``v5p-256`` counts TensorCores.
        hbm: bytes per JAX device that a program can use, as reported by the compiler.
    """

    shapes: dict[int, str]
    units_per_chip: int
    hbm: float


_GIB = 2**30
GENERATIONS = {
    "v5e": Generation(_2D, 1, 15.75 * _GIB),
    "v6e": Generation(_2D, 1, 31.25 * _GIB),
    "v5p": Generation(_3D, 2, 95.74 * _GIB),
    "tpu7x": Generation(_3D, 1, 94.75 * _GIB),  # two devices per chip
}
GENERATIONS |= {"v5litepod": GENERATIONS["v5e"]}  # the name in Cloud TPU commands


# GPUs in a node, and bytes of a GPU that a program can use: 0.9 of its memory (XLA_PYTHON_CLIENT_MEM_FRACTION in
# launch/worker.sh) as nvidia-smi reports it.
GPUS_PER_NODE = 8
GPUS = {"h100": 0.9 * 79.6 * _GIB, "h200": 0.9 * 140.4 * _GIB}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that this machine does not have. Nothing compiles for it, but a mesh of them has shardings and sizes."""

    id: int
    device_kind: str
    platform: str = "gpu"

    @property
    def process_index(self) -> int:
        return self.id // GPUS_PER_NODE


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more identical slices of TPUs, or a cluster of GPUs.

    Attributes:
        name: the compiler's name of a slice, such as ``v5p:4x4x8``; or kind and number of GPUs, ``h100:64``.
        slices: number of slices, connected by the data center network.
    """

    name: str
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.slices} × {self.name}" if self.slices > 1 else self.name

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def hbm(self) -> float:
        """Bytes of memory per device that a program can use."""
        return GPUS[self.kind] if self.is_gpu else GENERATIONS[self.kind].hbm


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse a topology such as ``v5p:4x4x8``, a slice name such as ``v5p-256``, or a GPU cluster, ``h100-64``.

    Raises:
        UsageError: the text is none of these, or no such slice exists. The message lists the valid ones.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower())
    if match is None:
        raise UsageError(f"topology: {text!r} is neither a slice name like v5p-256 nor a topology like v5p:4x4x8")
    kind, units, shape = match.groups()
    if kind in GPUS:
        count = int(units or 0)
        if count < 1 or (count > GPUS_PER_NODE and count % GPUS_PER_NODE):
            nodes = f"1 to {GPUS_PER_NODE} GPUs, or nodes of {GPUS_PER_NODE}"
            raise UsageError(f"topology: {text}: give {nodes}: {kind}-64")
        if slices > 1:
            raise UsageError(f"slices: {text} has none: give the number of GPUs, {kind}-{count * slices}")
        return Topology(f"{kind}:{count}")
    generation = GENERATIONS.get(kind)
    if generation is None:
        known = [*GENERATIONS, *GPUS]
        raise UsageError(f"topology: {kind!r} is not known{nearest(kind, known)}; use {', '.join(known)}")
    kind = "v5e" if kind == "v5litepod" else kind
    if shape:
        if shape not in generation.shapes.values():
            raise UsageError(f"topology: {kind} has no slice {shape}; use {', '.join(generation.shapes.values())}")
        return Topology(f"{kind}:{shape}", slices)
    chips, rest = divmod(int(units), generation.units_per_chip)
    if rest or chips not in generation.shapes:
        valid = ", ".join(f"{kind}-{chips * generation.units_per_chip}" for chips in generation.shapes)
        raise UsageError(f"topology: {text} does not exist; use {valid}")
    return Topology(f"{kind}:{generation.shapes[chips]}", slices)


def compile_only_devices(topology: Topology) -> list[Any]:
    """Return devices that this machine does not need to have: TPUs to compile for, or GPUs to plan with.

    Raises:
        UsageError: the compiler does not know the topology.
    """
    if topology.is_gpu:
        return [Gpu(i, f"NVIDIA {topology.kind.upper()}") for i in range(int(topology.name.split(":")[1]))]
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU here, so nothing is shared
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:
        raise UsageError(f"topology {topology}: {' '.join(str(error).split())[:200]}") from error
