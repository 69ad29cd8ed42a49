"""A base that is grown while it is loaded gives the arrays of the folder that growth would write."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tli_jax.distributed.mesh import make_mesh, param_sharding
from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import average, dus, lesa, moe, opt_deus, tli
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.grown_checkpoint import grow_checkpoint
from tli_jax.hf.load import load_arrays

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

PLANS = {
    "copies": lambda: dus(4, 1),
    "zeros": lambda: tli(4, 2),
    "scaled": lambda: tli(4, 2, "half"),
    "sums": lambda: average(4, 2),
    "random": lambda: tli(4, 2, "noise", seed=3),
    "predicted": lambda: lesa(4),
    "fused": lambda: opt_deus(4),
    "experts": lambda: dataclasses.replace(moe(4), experts=Experts(count=2)),
    "random experts": lambda: dataclasses.replace(tli(4, 2), experts=Experts(count=2, upcycle="drop")),
}


def load(checkpoint: Checkpoint, mesh: Any) -> dict[str, jax.Array]:
    config, layers = checkpoint.config, range(checkpoint.config.num_hidden_layers)
    stacks = {name: checkpoint.stack(name) for name in config.outer_tensors}
    stacks |= {name: checkpoint.stack(name, layers) for name in config.layer_tensors}
    dims = config.outer_tensors | {name: ("L", *dims) for name, dims in config.layer_tensors.items()}
    shardings = {name: param_sharding(mesh, dims[name]) for name in stacks}
    return load_arrays(stacks, shardings, dict.fromkeys(stacks, np.float32))


@pytest.mark.parametrize("name", PLANS)
def test_same_arrays_as_a_grown_folder(
    make_model: Callable[..., Path], grow: Callable[..., Any], tmp_path: Path, name: str
):
    if name == "fused":
        pytest.importorskip("ot")
    plan = PLANS[name]()
    base = make_model(tmp_path / "base", "bfloat16", shards=2)
    folder = open_checkpoint(grow(base, plan, tmp_path / "grown").folder)
    grown = grow_checkpoint(open_checkpoint(base), plan, {})
    assert (grown.config, grown.raw) == (folder.config, folder.raw)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    expected, found = load(folder, mesh), load(grown, mesh)
    assert found.keys() == expected.keys()
    for key, array in found.items():
        assert array.sharding == expected[key].sharding
        assert np.asarray(array).tobytes() == np.asarray(expected[key]).tobytes(), key
