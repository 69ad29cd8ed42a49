"""Growth from folder to folder: the same bytes as in memory, correct digests, every way of copying, sidecar files."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.custom import custom
from tli_jax.growth.inject import inject
from tli_jax.growth.methods import (
    adept,
    average,
    dus,
    interpose,
    lesa,
    lidas,
    llama_pro,
    midas,
    opt_deus,
    slayer,
    stack,
    tli,
)
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import COMPUTED_INITS, Row
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.headers import read_folder, read_header
from tli_jax.hf.load import load_hf
from tli_jax.hf.save import unstack
from tli_jax.hf.shards import OutputTensor, parse_size, split_shards, write_shards
from tli_jax.hf.tensors import check_tensors

PLANS = {
    "tli-identity": tli(4, 2),
    "tli-copy": tli(4, 1, "copy"),
    "tli-scaled": tli(4, 2, "scaled", scale=0.3),
    "tli-half": tli(4, 3, "half"),
    "tli-average": tli(4, 1, "average"),
    "tli-average_identity": tli(4, 3, "average_identity"),
    "tli-next_identity": tli(4, 1, "next_identity"),
    "tli-noise": tli(4, 2, "noise", noise_ratio=0.1, seed=5),
    "tli-noise-scaled": tli(4, 4, "noise", scale=0.5),
    "tli-random": tli(4, 2, "random", std=0.1, seed=5),
    "tli-random-zeroed": tli(4, 4, "random", scale=0.0),
    "dus": dus(4, 1),
    "llama_pro": llama_pro(4, 2, 2),
    "slayer": slayer(4),
    "average": average(4, 2),
    "stack": stack(4),
    "interpose": interpose(4, after=[0, 3]),
    "opt_deus": opt_deus(4),
    "tli-transport": tli(4, 3, "transport", scale=0.5),
    "lesa": lesa(4, epochs=2),
    "lesa-first": lesa(4, norms="first", seed=3, epochs=1),
    "midas": midas(4),
    "lidas": lidas(4, 2),
    "adept": adept(4, 2, importance=[1, 0, 3, 2]),
    "custom": custom(4, "3, 0-1*0.7, 3*0, 2*1e-3"),
    "explicit": Plan(
        "explicit", 4, (Row(((0, 0.7), (2, -0.1), (3, 0.4)), 0.3), Row(((1, 2.0),)), Row(((2, 1.0),), -1.0))
    ),
}
GROW = Callable[..., Any]
READ = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, Path]:
    """A base in one fp32 file, one in three bf16 files, and one in one fp16 file."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "float32": make_model(folder / "float32"),
        "bfloat16": make_model(folder / "bfloat16", "bfloat16", tied=False, shards=3),
        "float16": make_model(folder / "float16", "float16"),
    }


LINEAR = [name for name, plan in PLANS.items() if not any(row.init in COMPUTED_INITS for row in plan.rows)]
LINEAR.remove("explicit")


@pytest.mark.parametrize(
    ("dtype", "plan", "jitted"),
    [
        *[(dtype, plan, True) for dtype in ("float32", "bfloat16") for plan in LINEAR],
        ("float16", "tli-scaled", True),
        ("float32", "tli-noise", True),
        ("float32", "tli-random", True),
        # Fused on the host, under jit by a callback.
        *[(dtype, "opt_deus", jitted) for dtype in ("float32", "bfloat16") for jitted in (True, False)],
        ("float32", "tli-transport", True),
        ("float32", "lesa", False),
        ("bfloat16", "lesa-first", False),
        ("float32", "tli-average", False),
        ("bfloat16", "tli-noise-scaled", False),
        ("bfloat16", "tli-random-zeroed", False),
        # Under jit, an inexact product may be fused with the sum that follows, and rounded once less.
        ("float32", "explicit", False),
        ("bfloat16", "explicit", False),
    ],
)
def test_same_bytes_as_injection_in_memory(
    bases: dict[str, Path], grow: GROW, read_bytes: READ, tmp_path: Path, dtype: str, plan: str, jitted: bool
):
    base, plan = bases[dtype], PLANS[plan]
    growth = grow(base, plan, tmp_path / "grown", "9KB" if dtype == "bfloat16" else "5GB")
    config, params = load_hf(base)
    in_memory = (jax.jit(injector(plan)) if jitted else injector(plan))(params)
    in_memory = {name: np.asarray(get()).tobytes() for name, get in unstack(config, in_memory)}
    from_files = read_bytes(growth.folder)
    assert from_files.keys() == in_memory.keys()
    assert [name for name in in_memory if in_memory[name] != from_files[name]] == []
    # The digests are those of the files.
    assert growth.digests == {name: hashlib.sha256(data).hexdigest() for name, data in from_files.items()}
    assert growth.base_digests == {name: hashlib.sha256(data).hexdigest() for name, data in read_bytes(base).items()}
    assert growth.bytes_written == sum(map(len, from_files.values()))
    if dtype == "bfloat16":
        files = sorted(growth.folder.glob("model-*.safetensors"))
        assert len(files) > 1 and not (growth.folder / "model.safetensors").exists()


def injector(plan: Plan) -> Callable[[Any], Any]:
    return lambda params: inject(params, plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_opens_the_output(bases: dict[str, Path], grow: GROW, tmp_path: Path, dtype: str):
    growth = grow(bases[dtype], PLANS["tli-half"], tmp_path / "grown", "9KB")
    weight_map = json.loads((growth.folder / "model.safetensors.index.json").read_text())["weight_map"]
    digests = {}
    for file in sorted(growth.folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in sorted(tensors.keys()):
                assert weight_map[name] == file.name
                tensor = tensors.get_tensor(name)
                assert tensor.dtype == np.dtype(dtype)
                digests[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
        # Data starts at a multiple of eight bytes, as in the files of the safetensors library.
        assert min(tensor.start for tensor in read_header(file).values()) % 8 == 0
    assert digests == growth.digests
    index = json.loads((growth.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == growth.bytes_written
    assert open_checkpoint(growth.folder).config.num_hidden_layers == 5


def failing(number: int) -> Callable[..., int]:
    def copy(*args: Any, **kwargs: Any) -> int:
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_fallback_if_the_kernel_cannot_copy(
    bases: dict[str, Path], grow: GROW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    by_kernel = grow(bases["bfloat16"], PLANS["tli-half"], tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", failing(number))
    by_buffer = grow(bases["bfloat16"], PLANS["tli-half"], tmp_path / "buffer")
    for file in by_kernel.folder.iterdir():
        assert (by_buffer.folder / file.name).read_bytes() == file.read_bytes()
    assert by_buffer.bytes_written == by_kernel.bytes_written


def test_copies_in_parts_and_copies_that_stop(
    bases: dict[str, Path], grow: GROW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = grow(bases["float32"], PLANS["dus"], tmp_path / "plain")
    kernel, calls = os.copy_file_range, []

    def copy(source: int, target: int, count: int, **kwargs: Any) -> int:
        calls.append(count)
        if len(calls) % 3 == 0:
            raise OSError(errno.EXDEV, "other file system")
        return kernel(source, target, min(count, 100), **kwargs)

    monkeypatch.setattr(os, "copy_file_range", copy)
    in_parts = grow(bases["float32"], PLANS["dus"], tmp_path / "parts")
    assert len(calls) > 50
    assert (in_parts.folder / "model.safetensors").read_bytes() == (plain.folder / "model.safetensors").read_bytes()
    assert in_parts.bytes_written == plain.bytes_written


def test_other_errors_of_the_kernel_are_raised(
    bases: dict[str, Path], grow: GROW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "copy_file_range", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        grow(bases["float32"], PLANS["dus"], tmp_path / "grown")


def test_base_that_shrinks_meanwhile(bases: dict[str, Path], grow: GROW, tmp_path: Path, monkeypatch: Any):
    base = shutil.copytree(bases["float32"], tmp_path / "base")
    checkpoint = open_checkpoint(base)
    outputs = grown_tensors(checkpoint, PLANS["tli-average"])
    os.truncate(base / "model.safetensors", 2000)
    with pytest.raises(DataError, match="the file was truncated while it was read"):
        write(outputs, checkpoint, tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    with pytest.raises(DataError, match="the file was truncated while it was read"):
        write(outputs, checkpoint, tmp_path / "buffer")


def write(outputs: list[OutputTensor], checkpoint: Any, output: Path) -> None:
    output.mkdir()
    write_shards(output, split_shards(outputs, 10**9), dict.fromkeys(checkpoint.tensors, ""), lambda _: None)


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def test_across_file_systems(bases: dict[str, Path], grow: GROW, tmp_path: Path, other_file_system: Path):
    near = grow(bases["bfloat16"], PLANS["custom"], tmp_path / "near")
    far = grow(bases["bfloat16"], PLANS["custom"], other_file_system / "far")
    back = grow(far.folder, tli(len(PLANS["custom"]), 1), tmp_path / "back")
    for file in near.folder.iterdir():
        assert (far.folder / file.name).read_bytes() == file.read_bytes()
    assert {back.digests[name] for name in back.digests} >= set(far.digests.values())


def test_configuration_keeps_every_key(make_model: Callable[..., Path], grow: GROW, tmp_path: Path):
    extra = {
        "layer_types": ["full_attention"] * 4,
        "per_layer_note": [10, 11, 12, 13],
        "eos_token_id": [2, 3, 4, 5],  # has as many items as layers, but is not a per-layer list
        "no_rope_layers": None,
        "a key of its own": {"nested": [1, 2, {"Ü": None}]},
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_theta": 500000.0,
        "transformers_version": "4.43.0",
    }
    base = make_model(tmp_path / "base", extra=extra)
    grow(base, PLANS["dus"], tmp_path / "grown")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "grown"))
    changed = {
        "num_hidden_layers": 6,
        "layer_types": ["full_attention"] * 6,
        "per_layer_note": [10, 11, 12, 11, 12, 13],
    }
    assert after == before | changed
    assert list(after) == list(before)


def test_sidecar_files(make_model: Callable[..., Path], grow: GROW, tmp_path: Path):
    base = make_model(tmp_path / "base")
    allowed = ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "tokenizer.json", "tokenizer.model"]
    allowed += ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"]
    allowed += ["vocab.json", "merges.txt", "added_tokens.json"]
    refused = ["modeling_llama.py", "LICENSE.py", "NOTICE.sh", "pytorch_model.bin", "LICENSE.bin", "training_args.pt"]
    refused += ["optimizer.pkl", "README.md", ".gitattributes", "model.gguf", "tokenizer.json.bak", "xtokenizer.json"]
    for name in allowed + refused:
        (base / name).write_bytes(f"bytes of {name}\r\n\xff".encode("latin1"))
    for folder in ("original", "LICENSES", "tokenizer_config.json.d"):
        (base / folder).mkdir()
        (base / folder / "LICENSE").write_text("not this one")
    grow(base, PLANS["dus"], tmp_path / "grown")
    found = {path.name for path in (tmp_path / "grown").iterdir()}
    assert found == {*allowed, "config.json", "model.safetensors"}
    for name in allowed:
        assert (tmp_path / "grown" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nonfinite_values_are_counted(bases: dict[str, Path], tmp_path: Path, dtype: str):
    base = shutil.copytree(bases[dtype], tmp_path / "base")
    spoil = {"model.layers.1.mlp.up_proj.weight": [np.nan, np.inf, -np.inf], "model.norm.weight": [-np.nan]}
    tensors = read_folder(base)[0]
    for name, values in spoil.items():
        with tensors[name].file.open("r+b") as file:
            # The last values: a count that stops early would miss them.
            data = np.asarray(values, np.float32).astype(np.dtype(dtype)).tobytes()
            file.seek(tensors[name].start + tensors[name].nbytes - len(data))
            file.write(data)
    seen: list[int] = []
    digests, nonfinite = check_tensors(read_folder(base)[0].values(), seen.append)
    assert nonfinite == {name: len(values) for name, values in spoil.items()}
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())
    assert digests.keys() == tensors.keys()
    # The largest finite value is finite.
    assert check_tensors(read_folder(bases[dtype])[0].values(), lambda _: None)[1] == {}


def test_the_largest_finite_value_is_finite(make_model: Callable[..., Path], tmp_path: Path):
    base = make_model(tmp_path / "base")
    tensor = read_folder(base)[0]["model.norm.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.asarray([np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45], np.float32).tobytes())
    assert check_tensors([tensor], lambda _: None)[1] == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 kb", 1500), ("7", 7), ("2tb", 2 * 10**12)],
)
def test_parse_size(text: str, expected: int):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5 apples", "5iB", "1e9"])
def test_invalid_sizes(text: str):
    with pytest.raises(UsageError, match="is not a size like 5GB"):
        parse_size(text)


def test_shards_keep_order_and_limit():
    outputs = [OutputTensor(str(i), "F32", (n,)) for i, n in enumerate([10, 10, 50, 1, 1, 30])]
    shards = split_shards(outputs, 100)
    assert list(shards) == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert [[tensor.name for tensor in shard] for shard in shards.values()] == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert list(split_shards(outputs, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize("plan", [average(4, after=[1]), slayer(4, after=[1]), dus(4, 1)], ids=lambda plan: plan.method)
def test_sources_of_different_dtypes(plan: Plan, make_model: Callable[..., Path], grow: GROW, tmp_path: Path):
    base, name = make_model(tmp_path / "base"), "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {name: tensors[name].astype(np.float16)}, base / "model.safetensors")
    grown = load_file(grow(base, plan, tmp_path / "grown").folder / "model.safetensors")
    with pytest.warns(UserWarning, match="down_proj.weight is stored in different dtypes"):
        config, params = load_hf(base)
    in_memory = dict(unstack(config, inject(params, plan)))
    assert in_memory.keys() == grown.keys()
    for name, get in in_memory.items():
        assert np.array_equal(np.asarray(get()), grown[name].astype(np.float32)), name
    # A tensor built from one layer keeps its dtype; one built from two is float32, like the array in memory.
    dtypes = {number: grown[f"model.layers.{number}.mlp.down_proj.weight"].dtype.name for number in range(len(plan))}
    halves = [2, 4] if plan.method == "dus" else [3]
    assert dtypes == {number: "float16" if number in halves else "float32" for number in range(len(plan))}


def test_number_of_tensors_in_a_file_is_limited():
    outputs = [OutputTensor(str(i), "F32", (1,)) for i in range(45_000)]
    assert [len(shard) for shard in split_shards(outputs, 10**9).values()] == [20_000, 20_000, 5_000]
