"""TPU topologies by slice name, and libtpu on machines without a TPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tli_jax.cli import libtpu
from tli_jax.cli.libtpu import has_compiler, silence_libtpu
from tli_jax.distributed.topology import GENERATIONS, compile_only_devices, parse_topology
from tli_jax.errors import UsageError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p-256", "v5p:4x4x8"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-1024", "v5p:8x8x8"),
        ("v6e-256", "v6e:16x16"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("V5P:4x4x8", "v5p:4x4x8"),
        ("h100-64", "h100:64"),
    ],
)
def test_names(name, expected):
    assert str(parse_topology(name)) == expected
    if not parse_topology(name).is_gpu:
        assert str(parse_topology(name, 2)) == f"2 × {expected}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-257", "v5p-257 does not exist; use v5p-8, v5p-16"),
        ("v5e-3", "v5e-3 does not exist; use v5e-4"),
        ("v5x-8", "'v5x' is not known"),
        ("v5e:3x3", "v5e has no slice 3x3"),
        ("8", "is neither a slice name like"),
        ("v5e-8; reboot", "is neither a slice name like"),
        ("h100-12", "h100-12: give 1 to 8 GPUs, or nodes of 8: h100-64"),
        ("h100:2x2", "h100:2x2: give 1 to 8 GPUs"),
    ],
)
def test_unknown_slices_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        parse_topology(name)


@pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")
@pytest.mark.parametrize("kind", [kind for kind in GENERATIONS if kind != "v5litepod"])
def test_the_compiler_knows_every_slice(kind):
    devices_per_chip = 2 if kind == "tpu7x" else 1
    for chips, shape in GENERATIONS[kind].shapes.items():
        if chips <= 512:  # listing the devices of larger ones takes seconds
            assert len(compile_only_devices(parse_topology(f"{kind}:{shape}"))) == chips * devices_per_chip


@pytest.fixture
def environ(monkeypatch):
    """An environment without variables of JAX or libtpu, on a machine that has the TPU compiler but no TPU."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))}
    monkeypatch.setattr(os, "environ", clean)
    monkeypatch.setattr(libtpu, "has_compiler", lambda: True)
    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [])
    return clean


def test_libtpu_is_quiet_without_a_tpu(environ):
    before = dict(environ)
    silence_libtpu()
    added = {name: value for name, value in environ.items() if name not in before}
    assert added.items() >= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items()
    assert added.get("JAX_PLATFORMS", "cpu") == "cpu"


def test_a_choice_of_platform_is_kept(environ):
    environ["JAX_PLATFORMS"] = "cuda,cpu"
    silence_libtpu()
    assert environ["JAX_PLATFORMS"] == "cuda,cpu"


@pytest.mark.parametrize("sign", ["/dev/accel0", "/dev/vfio/0", "TPU_WORKER_ID", "no libtpu"])
def test_libtpu_may_report_errors_of_a_tpu(environ, monkeypatch, sign):
    if sign == "no libtpu":
        monkeypatch.setattr(libtpu, "has_compiler", lambda: False)
    elif sign.startswith("/dev"):
        monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [sign] if pattern[:8] == sign[:8] else [])
    else:
        environ[sign] = "0"
    before = dict(environ)
    silence_libtpu()
    assert environ == before


@pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")
def test_jax_starts_in_silence_without_a_tpu():
    if [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]:
        pytest.skip("this machine may have a TPU")
    code = "from tli_jax.cli.libtpu import silence_libtpu; silence_libtpu(); import jax; print(jax.devices())"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
