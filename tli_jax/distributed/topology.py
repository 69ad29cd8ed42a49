"""TPU slices by the names that users know, as devices to compile for where there is no TPU."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tli_jax.errors import UsageError, nearest

# Chips of a slice -> how they are linked, as Google Cloud hands them out where no topology is asked for.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_CUBE |= {512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 3072: "12x16x16", 4096: "16x16x16"}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
        shapes: chips of a slice -> topology.
        units: what the number in a slice's name counts, for each chip: v5p-256 counts TensorCores.
        hbm: bytes of memory that a program on one of JAX's devices can have, as its compiler says.
    """

    shapes: dict[int, str]
    units: int
    hbm: float


_GIB = 2**30
GENERATIONS = {
    "v5e": Generation(_FLAT, 1, 15.75 * _GIB),
    "v6e": Generation(_FLAT, 1, 31.25 * _GIB),
    "v5p": Generation(_CUBE, 2, 95.74 * _GIB),
    "tpu7x": Generation(_CUBE, 1, 94.75 * _GIB),  # two devices a chip
}
GENERATIONS |= {"v5litepod": GENERATIONS["v5e"]}  # what Cloud TPU's own commands call it


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind.

    Attributes:
        name: as the compiler knows it, e.g. ``v5p:4x4x8``.
        slices: how many of them, linked by the data centre's network.
    """

    name: str
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.slices} × {self.name}" if self.slices > 1 else self.name

    @property
    def hbm(self) -> float:
        """Bytes of memory a device."""
        return GENERATIONS[self.name.split(":")[0]].hbm


def parse_topology(text: str, slices: int = 1) -> Topology:
    """``v5p:4x4x8`` or, by the name of a slice, ``v5p-256``.

    Raises:
        UsageError: not one of the two, or a slice of that size does not exist; says which do.
    """
    found = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower())
    if found is None:
        raise UsageError(f"topology: {text!r} is not a slice like v5p-256, or a topology like v5p:4x4x8")
    generation = GENERATIONS.get(found[1])
    if generation is None:
        raise UsageError(
            f"topology: {found[1]!r} is not known{nearest(found[1], GENERATIONS)}; there are {', '.join(GENERATIONS)}"
        )
    kind = "v5e" if found[1] == "v5litepod" else found[1]
    if found[3]:
        if found[3] not in generation.shapes.values():
            there = ", ".join(generation.shapes.values())
            raise UsageError(f"topology: {kind} has no slice {found[3]}, it has {there}")
        return Topology(f"{kind}:{found[3]}", slices)
    chips, rest = divmod(int(found[2]), generation.units)
    if rest or chips not in generation.shapes:
        there = ", ".join(f"{kind}-{chips * generation.units}" for chips in generation.shapes)
        raise UsageError(f"topology: there is no {text}, there are {there}")
    return Topology(f"{kind}:{generation.shapes[chips]}", slices)


def has_compiler() -> bool:
    """Whether the TPU compiler is installed, the extra ``tpu``."""
    return importlib.util.find_spec("libtpu") is not None


def compile_only_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, none of which is there.

    Raises:
        UsageError: the compiler does not know the topology.
    """
    from jax.experimental import topologies

    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    with _quiet():
        try:
            return list(topologies.get_topology_desc(topology.name, platform="tpu", **several).devices)
        except Exception as error:
            raise UsageError(f"topology {topology}: {' '.join(str(error).split())[:200]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu looks for a TPU around it when it is loaded, and complains at length, from C++, that there is none."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here runs on a TPU, so nothing is shared
    before = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
