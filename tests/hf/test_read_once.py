"""Sharded loading: each byte is read once by all devices and processes together, and the values are equal."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tli_jax
from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.distributed.spread import insert
from tli_jax.hf import load
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.models.tree import nest

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

MESHES = {
    "fsdp": {"fsdp": 8},
    "fsdp and tensor": {"fsdp": 4, "tensor": 2},
    "tensor": {"tensor": 8},
    "data": {"data": 8},
    "three axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"fsdp": 2, "expert": 2, "tensor": 2},
}
# Every process loads a model as sharded as in training, and compares its shards with a plain load.
PROCESS = """
import json, sys
from tli_jax.distributed import processes

processes.start(False, sys.argv[1])
import jax
from tests.hf import test_read_once as test

mesh = test.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
read = test.count_reads()
_, params = test.tli_jax.load_hf(sys.argv[2], shardings=test.shardings(sys.argv[2], mesh))
nbytes = read[0]
_, plain = test.tli_jax.load_hf(sys.argv[2])
jax.tree.map(test.assert_equal, params, plain)
print(json.dumps({"devices": len(jax.local_devices()), "read": nbytes}))
processes.leave(0)
"""


def count_reads() -> list[int]:
    """A list whose only item grows with the bytes that ``os.preadv`` reads: the one call by which weights are read."""
    total, preadv = [0], os.preadv

    def counted(*arguments: Any) -> int:
        count = preadv(*arguments)
        total[0] += count
        return count

    os.preadv = counted
    return total


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    monkeypatch.setattr(os, "preadv", os.preadv)  # restores it
    return count_reads()


def shardings(folder: Path | str, mesh: Any) -> dict[str, Any]:
    config = open_checkpoint(folder).config
    outer = {name: param_sharding(mesh, dims) for name, dims in config.outer_tensors.items()}
    layers = {f"layers.{name}": param_sharding(mesh, ("L", *dims)) for name, dims in config.layer_tensors.items()}
    return nest(outer | layers)


def assert_equal(sharded: jax.Array, plain: jax.Array) -> None:
    assert sharded.shape == plain.shape and sharded.dtype == plain.dtype
    for shard in sharded.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.asarray(plain[shard.index]).tobytes()


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path], tmp_path_factory) -> dict[str, Path]:
    """Some dims are no multiple of eight, so their rows need padding."""
    folder = tmp_path_factory.mktemp("models")
    config = tli_jax.LlamaConfig(48, 16, 24, 3, 4, 2, 4, num_experts=2, experts_per_token=1, tie_word_embeddings=False)
    tli_jax.save_hf(folder / "experts", config, tli_jax.init_params(config, jax.random.key(0)))
    return {
        "dense": make_model(folder / "dense", "bfloat16", layers=5, tied=False, shards=2),
        "odd": make_model(folder / "odd", "bfloat16", layers=5, extra={"vocab_size": 50, "intermediate_size": 22}),
        "experts": folder / "experts",
    }


@pytest.mark.parametrize("groups", [False, True], ids=["whole", "in groups"])
@pytest.mark.parametrize("name", MESHES)
def test_each_byte_is_read_once(models, reads, monkeypatch, name: str, groups: bool):
    folder = models["experts" if "expert" in name else "dense" if "tensor" in MESHES[name] else "odd"]
    if groups:  # of two layers; pieces of a few rows
        monkeypatch.setattr(load, "_GROUP", 2 * 24 * 16 * 4)
        monkeypatch.setattr(load, "_PIECE", 100)
    mesh = make_mesh(MESHES[name])
    _, plain = tli_jax.load_hf(folder, dtype="float32")
    nbytes = open_checkpoint(folder).nbytes
    assert reads[0] == nbytes
    inserts = insert.cache_info()
    _, params = tli_jax.load_hf(folder, "float32", shardings(folder, mesh))
    assert nbytes <= reads[0] - nbytes <= 1.05 * nbytes
    assert (insert.cache_info() != inserts) == groups
    jax.tree.map(assert_equal, params, plain)


@pytest.mark.all_cores
def test_two_processes_read_each_byte_once(models):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-W", "error", "-c", PROCESS]
    root = Path(__file__).parents[2]
    group = [
        subprocess.Popen(
            [*command, f"{index}/2@{address}", str(models["dense"])],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in group]
    assert [process.returncode for process in group] == [0, 0], outputs
    results = [json.loads(out) for out, _ in outputs]
    nbytes = open_checkpoint(models["dense"]).nbytes
    assert [result["devices"] for result in results] == [4, 4]
    assert nbytes <= sum(result["read"] for result in results) <= 1.05 * nbytes
    assert all(0.3 * nbytes < result["read"] < 0.7 * nbytes for result in results)
