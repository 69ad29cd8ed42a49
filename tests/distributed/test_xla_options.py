"""Compiler options are ones that the compilers know, and give way to flags in the environment."""

from types import SimpleNamespace

import jax
import pytest

from tli_jax.cli.libtpu import has_compiler
from tli_jax.distributed.topology import compile_only_devices, parse_topology
from tli_jax.distributed.xla_options import OPTIONS, xla_options


def compile_with(options, sharding=None):
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
    return jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


def device(kind):
    return SimpleNamespace(device_kind=kind)


def test_options_by_device():
    assert xla_options(jax.devices("cpu")[0]) == {}
    assert xla_options(device("TPU v5 lite")) == OPTIONS["TPU v5"]
    assert "xla_tpu_scoped_vmem_limit_kib" in xla_options(device("TPU v6 lite"))
    assert xla_options(device("NVIDIA H100 80GB HBM3")) == OPTIONS["NVIDIA"]


def test_a_flag_in_the_environment_wins(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=1 --other")
    assert "xla_tpu_scoped_vmem_limit_kib" not in xla_options(device("TPU v6 lite"))
    assert len(xla_options(device("TPU v6 lite"))) == len(OPTIONS["TPU v6"]) - 1


def test_xla_knows_the_gpu_options():
    """XLA has one list of options for all backends but TPUs."""
    assert compile_with(OPTIONS["NVIDIA"])
    with pytest.raises(Exception, match="xla_gpu_enable_latency_hidin_scheduler"):
        compile_with({"xla_gpu_enable_latency_hidin_scheduler": True})


@pytest.mark.skipif(not has_compiler(), reason="the TPU compiler is not installed, jax[tpu]")
@pytest.mark.parametrize("slice_", ["v5e-4", "v5p-8", "v6e-4"])
def test_the_tpu_compiler_knows_the_options(slice_):
    first = compile_only_devices(parse_topology(slice_))[0]
    assert xla_options(first), first.device_kind
    sharding = jax.sharding.SingleDeviceSharding(first)
    assert compile_with(xla_options(first), sharding)
    with pytest.raises(Exception, match="xla_tpu_enable_async_colective_fusion"):
        compile_with({"xla_tpu_enable_async_colective_fusion": True}, sharding)
