"""Slices by the names that users know."""

import pytest

from tli_jax.distributed.topology import GENERATIONS, compile_only_devices, has_compiler, parse_topology
from tli_jax.errors import UsageError


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5p-256", "v5p:4x4x8"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-1024", "v5p:8x8x8"),
        ("v6e-256", "v6e:16x16"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("V5P:4x4x8", "v5p:4x4x8"),
    ],
)
def test_names(name, topology):
    assert str(parse_topology(name)) == topology
    assert str(parse_topology(name, 2)) == f"2 × {topology}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-257", "there is no v5p-257, there are v5p-8, v5p-16"),
        ("v5e-3", "there is no v5e-3, there are v5e-4"),
        ("v5x-8", "'v5x' is not known"),
        ("v5e:3x3", "v5e has no slice 3x3"),
        ("8", "is not a slice like"),
        ("v5e-8; reboot", "is not a slice like"),
    ],
)
def test_what_there_is_not(name, says):
    with pytest.raises(UsageError, match=says):
        parse_topology(name)


@pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")
@pytest.mark.parametrize("kind", [kind for kind in GENERATIONS if kind != "v5litepod"])
def test_the_compiler_knows_every_slice(kind):
    devices_per_chip = 2 if kind == "tpu7x" else 1
    for chips, shape in GENERATIONS[kind].shapes.items():
        if chips <= 512:  # beyond, the list alone takes seconds
            assert len(compile_only_devices(parse_topology(f"{kind}:{shape}"))) == chips * devices_per_chip
