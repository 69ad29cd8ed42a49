"""TPU topologies by slice name, as devices to compile for."""

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


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more identical slices.

    Attributes:
        name: the compiler's name, such as ``v5p:4x4x8``.
        slices: number of slices, connected by the data center network.
    """

    name: str
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.slices} × {self.name}" if self.slices > 1 else self.name

    @property
    def hbm(self) -> float:
        """Bytes of memory per device."""
        return GENERATIONS[self.name.split(":")[0]].hbm


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse a topology such as ``v5p:4x4x8``, or a slice name such as ``v5p-256``.

    Raises:
        UsageError: the text is neither, or no such slice exists. The message lists the valid ones.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower())
    if match is None:
        raise UsageError(f"topology: {text!r} is neither a slice name like v5p-256 nor a topology like v5p:4x4x8")
    kind, units, shape = match.groups()
    generation = GENERATIONS.get(kind)
    if generation is None:
        raise UsageError(f"topology: {kind!r} is not known{nearest(kind, GENERATIONS)}; use {', '.join(GENERATIONS)}")
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
    """Return devices of a TPU that this machine does not need to have, to compile for.

    Raises:
        UsageError: the compiler does not know the topology.
    """
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU here, so nothing is shared
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except Exception as error:
        raise UsageError(f"topology {topology}: {' '.join(str(error).split())[:200]}") from error
