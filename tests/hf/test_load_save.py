"""Loading folders as layer-stacked params and saving them: the same bytes, and each device holds only its shard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file

from tli_jax.errors import OutputError, UsageError
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import dus, tli
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import expected_shapes, open_checkpoint
from tli_jax.hf.load import load_hf
from tli_jax.hf.save import save_hf
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import forward, init_params
from tli_jax.models.tree import nest

MAKE = Callable[..., Path]
READ = Callable[[Path], dict[str, bytes]]
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def make_shardings(config: LlamaConfig) -> dict[str, Any]:
    """Shardings over a mesh of 2 by 4: dim D over one axis; heads, F and V over the other."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharding(dims: tuple[str, ...]) -> NamedSharding:
        axes = ["fsdp" if dim == "D" else "tensor" if dim else None for dim in dims]
        return NamedSharding(mesh, PartitionSpec(*axes))

    outer = {name: sharding(dims) for name, dims in config.outer_tensors.items()}
    return nest(outer | {f"layers.{name}": sharding(("", *dims)) for name, dims in config.layer_tensors.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(make_model: MAKE, read_bytes: READ, tmp_path: Path, dtype: str, shards: int):
    base = make_model(tmp_path / "base", dtype, tied=shards == 1, shards=shards, extra={"a key of its own": [1, "ü"]})
    config, params = load_hf(base)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    save_hf(tmp_path / "back", config, params, max_shard_size="5GB" if shards == 1 else "4KB")
    assert read_bytes(tmp_path / "back") == read_bytes(base)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (shards > 1)
    assert not (tmp_path / "back" / "growth.json").exists()


def test_params_have_the_names_of_the_tensors(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base", tied=False)
    config, params = load_hf(base)
    tensors = load_file(base / "model.safetensors")
    assert params.keys() == {"embed_tokens", "layers", "norm", "lm_head"}
    np.testing.assert_array_equal(params["lm_head"]["weight"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], tensors["model.norm.weight"])
    for name, dims in config.layer_tensors.items():
        leaf: Any = params["layers"]
        for key in name.split("."):
            leaf = leaf[key]
        assert leaf.shape == (4, *config.shape(dims))
        for layer in range(4):
            np.testing.assert_array_equal(leaf[layer], tensors[f"model.layers.{layer}.{name}"])


def test_dtype(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base")
    params, halved = load_hf(base)[1], load_hf(base, dtype=jnp.bfloat16)[1]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(halved), strict=True):
        assert b.dtype == jnp.bfloat16
        assert np.asarray(a).astype(ml_dtypes.bfloat16).tobytes() == np.asarray(b).tobytes()
    save_hf(tmp_path / "half", load_hf(base)[0], halved)
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "half").tensors.values()} == {"BF16"}
    widened = load_hf(tmp_path / "half", dtype="float32")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {np.dtype(np.float32)}
    for a, b in zip(jax.tree.leaves(halved), jax.tree.leaves(widened), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), b)


def test_config_names_the_dtype_of_the_weights(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base")
    save_hf(tmp_path / "half", *load_hf(base, dtype=jnp.bfloat16))
    assert open_checkpoint(tmp_path / "half").config.dtype == "bfloat16"


@needs_eight
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_each_device_holds_only_its_shard(make_model: MAKE, read_bytes: READ, tmp_path: Path, dtype: Any):
    base = make_model(tmp_path / "base", shards=2, tied=False)
    config, plain = load_hf(base, dtype=dtype)
    shardings = make_shardings(config)
    _, params = load_hf(base, dtype=dtype, shardings=shardings)

    def check(leaf: jax.Array, sharding: NamedSharding, full: jax.Array) -> None:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert len(leaf.addressable_shards) == 8
        ways = int(np.prod([{"fsdp": 2, "tensor": 4}[axis] for axis in sharding.spec if axis]))
        for shard in leaf.addressable_shards:
            assert shard.data.size * ways == leaf.size
            np.testing.assert_array_equal(shard.data, np.asarray(full)[shard.index])

    jax.tree.map(check, params, shardings, plain)
    # Sharded params are saved like any others.
    save_hf(tmp_path / "sharded", config, params)
    save_hf(tmp_path / "plain", config, plain)
    assert read_bytes(tmp_path / "sharded") == read_bytes(tmp_path / "plain")
    if dtype is None:
        assert read_bytes(tmp_path / "sharded") == read_bytes(base)


@needs_eight
def test_one_sharding_for_all_params(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base")
    _, plain = load_hf(base)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for sharding in (NamedSharding(mesh, PartitionSpec()), SingleDeviceSharding(jax.devices()[5])):
        _, params = load_hf(base, shardings=sharding)
        for leaf, full in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert {shard.data.shape for shard in leaf.addressable_shards} == {full.shape}
            assert all((np.asarray(shard.data) == full).all() for shard in leaf.addressable_shards)
    assert {leaf.device for leaf in jax.tree.leaves(plain)} == {jax.devices()[0]}


@needs_eight
def test_layer_dim_can_be_sharded(make_model: MAKE, tmp_path: Path):
    """Growth has no use for it, but loading supports what ``device_put`` supports."""
    base = make_model(tmp_path / "base", layers=8)
    config, plain = load_hf(base)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    over_layers, replicated = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree_util.tree_map_with_path(
        lambda p, _: over_layers if p[0].key == "layers" else replicated, plain
    )
    _, params = load_hf(base, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    assert {shard.data.shape for shard in params["layers"]["mlp"]["up_proj"]["weight"].addressable_shards} == {
        (1, 24, 16)
    }
    assert config.num_hidden_layers == 8


@needs_eight
def test_sharded_growth_is_saved(make_model: MAKE, grow: Callable[..., Any], read_bytes: READ, tmp_path: Path):
    """Loading, growing and saving on eight devices gives the same bytes as growth from folder to folder."""
    base, plan = make_model(tmp_path / "base", "bfloat16"), tli(4, 2, "half")
    config, params = load_hf(base, shardings=make_shardings(load_hf(base)[0]))
    grown = jax.jit(lambda params: inject(params, plan))(params)
    save_hf(tmp_path / "memory", config, grown, plan=plan)
    assert read_bytes(tmp_path / "memory") == read_bytes(grow(base, plan, tmp_path / "files").folder)


def test_files_beside_the_weights(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base", extra={"layer_types": ["full_attention"] * 4})
    (base / "LICENSE").write_text("free")
    (base / "modeling.py").write_text("raise SystemExit")
    plan = dus(4, 1)
    config, params = load_hf(base)
    save_hf(tmp_path / "grown", config, inject(params, plan), plan=plan, source=base)
    files = {file.name for file in (tmp_path / "grown").iterdir()}
    assert files == {"config.json", "growth.json", "model.safetensors", "LICENSE"}
    raw = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (raw["num_hidden_layers"], raw["layer_types"]) == (6, ["full_attention"] * 6)
    record = json.loads((tmp_path / "grown" / "growth.json").read_text())
    assert Plan.from_json(record) == plan
    reopened = open_checkpoint(tmp_path / "grown")
    assert reopened.growth == record
    assert {name: t.shape for name, t in reopened.tensors.items()} == expected_shapes(config.with_layers(6))


def test_source_makes_a_folder_that_any_loader_opens(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config, params = load_hf("embedded")
    plan = tli(config.num_hidden_layers, 4)
    save_hf(tmp_path / "grown", config, inject(params, plan), plan=plan, source="embedded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert tokenizer.decode(tokenizer("import os")["input_ids"], skip_special_tokens=True) == "import os"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "grown").num_hidden_layers == len(plan)
    assert open_tokenizer(tmp_path / "grown", config)[0] is not None
    written, base = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "grown", hub.resolve("embedded")))
    assert written == base | {"num_hidden_layers": len(plan)}


def test_params_of_a_new_model(tmp_path: Path, read_bytes: READ):
    config = LlamaConfig(48, 16, 24, 2, 4, 2, 4, rope_theta=500000.0, bos_token_id=1, eos_token_ids=(2,))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_hf(tmp_path / "new", config, params)
    reread, again = load_hf(tmp_path / "new")
    assert reread == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tokens = jnp.arange(16).reshape(2, 8)
    np.testing.assert_array_equal(forward(reread, again, tokens), forward(config, params, tokens))


def test_errors(make_model: MAKE, tmp_path: Path):
    base = make_model(tmp_path / "base")
    config, params = load_hf(base)
    with pytest.raises(UsageError, match="the plan makes 6 layers, the params have 4: inject first"):
        save_hf(tmp_path / "grown", config, params, plan=tli(4, 2))
    integers = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), params)
    with pytest.raises(UsageError, match=r"model.embed_tokens.weight: dtype int32 cannot be written"):
        save_hf(tmp_path / "grown", config, integers)
    with pytest.raises(UsageError, match="must not be the same"):
        save_hf(base, config, params, source=base, overwrite=True)
    with pytest.raises(UsageError, match="is not a size"):
        save_hf(tmp_path / "grown", config, params, max_shard_size="huge")
    assert not (tmp_path / "grown").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises((UsageError, OutputError), match="not empty"):
        save_hf(tmp_path / "taken", config, params)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_folder_is_replaced_only_with_overwrite(make_model: MAKE, read_bytes: READ, tmp_path: Path):
    base = make_model(tmp_path / "base")
    config, params = load_hf(base)
    save_hf(tmp_path / "out", config, params)
    with pytest.raises((UsageError, OutputError), match="not empty"):
        save_hf(tmp_path / "out", config, params)
    save_hf(tmp_path / "out", config, inject(params, dus(4, 1)), overwrite=True)
    assert open_checkpoint(tmp_path / "out").config.num_hidden_layers == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert len(read_bytes(tmp_path / "out")) == 6 * 9 + 2


def test_overwriting_replaces_model_folders_only(make_model: MAKE, tmp_path: Path):
    config, params = load_hf(make_model(tmp_path / "base"))
    diary = tmp_path / "mine" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear diary")
    with pytest.raises(OutputError, match="is not a model folder"):
        save_hf(diary.parent, config, params, overwrite=True)
    assert diary.read_text() == "dear diary"
