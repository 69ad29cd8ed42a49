"""GGUF files: weights, configuration and tokenizer of the model they were written from; everything else is refused."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tli_jax
from tli_jax import train, upscale
from tli_jax.cli.frame import run_command
from tli_jax.errors import DataError, UsageError
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint, tensor_names
from tli_jax.hf.tensors import read_tensor
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.attention import inverse_frequencies
from tli_jax.models.config import LlamaConfig

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'tli_jax[gguf]'")

BASE = hub.resolve("embedded")
TEXTS = [
    "Once upon a time",
    "  def f(x):\n\treturn x  # 12345",
    "한국어 문장 🙂 café",
    "<|end_of_text|>a",
    " ",
    "I'll 've\n\n\n",
]
NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def weights() -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """The embedded base: its configuration, and its tensors in float32."""
    base = open_checkpoint(BASE)
    return base.config, {name: read_tensor(tensor).astype(np.float32) for name, tensor in base.tensors.items()}


def vocabulary() -> dict[str, Any]:
    """The embedded base's tokenizer, a byte-level BPE, as the metadata of a GGUF file."""
    stored = json.loads((BASE / "tokenizer.json").read_text())
    tokens = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__)
    special = {token["content"] for token in stored["added_tokens"]}
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "token_type": [3 if token in special else 1 for token in tokens],
        "add_bos_token": True,
    }


def sentencepiece_vocabulary() -> dict[str, Any]:
    """A vocabulary of the kind of Llama 2: pieces with scores, and a token for each byte."""
    pieces = ["▁", "a", "e", "i", "m", "n", "o", "p", "t", "u", "c", "O", "on", "▁t", "im", "ime", "▁time", "▁a", "On"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "unknown_token_id": 0}


def write(
    file: Path,
    model: tuple[LlamaConfig, dict[str, np.ndarray]],
    kind: str = "F32",
    *,
    arch: str = "llama",
    tokenizer: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    endianess: Any = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a model as llama.cpp does: matrices of one kind, vectors in float32, q and k interleaved.

    Args:
        keys: more metadata; None removes a key.
        tensors: changes the float32 tensors, under their names in the file.
    """
    config, weights = model
    named: dict[str, np.ndarray] = {}
    for stored, short, index in tensor_names(config, config.num_hidden_layers):
        name, array = NAMES[short.removesuffix(".weight")], weights[stored]
        if name in ("attn_q", "attn_k"):
            array = array.reshape(-1, 2, config.head_dim // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        named["".join(f"blk.{layer}." for layer in index) + f"{name}.weight"] = array
    tensors(named)
    metadata: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
        "general.license": "apache-2.0",
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
    }
    metadata |= {
        f"tokenizer.ggml.{key}": value for key, value in (vocabulary() if tokenizer is None else tokenizer).items()
    }
    writer = gguf.GGUFWriter(file, arch, endianess=endianess)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (metadata | (keys or {})).items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in named.items():
        chosen = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def shorten(model, layers=2):
    config, weights = model
    return config.with_layers(layers), weights


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_1", "bfloat16")],
)
def test_weights_and_configuration(kind, dtype, weights, tmp_path):
    config, params = tli_jax.load_hf(write(tmp_path / "base.gguf", weights, kind))
    assert config == dataclasses.replace(weights[0], dtype=dtype)
    for stored, name, index in tensor_names(config, config.num_hidden_layers):
        expected = weights[1][stored]
        if expected.ndim > 1:
            number = gguf.GGMLQuantizationType[kind]
            expected = gguf.dequantize(gguf.quantize(expected, number), number)
        found: Any = params["layers"] if index else params
        for part in name.split("."):
            found = found[part]
        found = np.asarray(found[index] if index else found)
        np.testing.assert_array_equal(found, expected.astype(dtype), stored, strict=True)


def test_a_dtype_that_does_not_hold_every_value_becomes_float32(weights, tmp_path):
    def tiny_norm(tensors):
        tensors["output_norm.weight"] = np.full_like(tensors["output_norm.weight"], 1e-9)

    file = write(tmp_path / "base.gguf", shorten(weights), "F16", tensors=tiny_norm)
    config, params = tli_jax.load_hf(file)
    assert config.dtype == "float32" and set(np.asarray(params["norm"]["weight"])) == {np.float32(1e-9)}
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_defaults_of_missing_keys(weights, tmp_path):
    """llama.cpp and transformers agree on them."""
    config = dataclasses.replace(shorten(weights)[0], num_key_value_heads=weights[0].num_attention_heads)
    D = config.hidden_size
    square = {name: np.zeros((D, D), np.float32) for name in weights[1] if ".k_proj" in name or ".v_proj" in name}
    names = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size")
    keys = {f"llama.{name}": None for name in names} | {"tokenizer.ggml.eos_token_id": None}
    file = write(tmp_path / "base.gguf", (config, weights[1] | square), keys=keys)
    expected = dataclasses.replace(config, dtype="float32", rope_theta=1e4, eos_token_ids=())
    assert open_checkpoint(hub.resolve(file)).config == expected


def llama3(config, **changes):
    rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
    return dataclasses.replace(config, rope_type="llama3", rope_factors=tuple((rope | changes).items()))


def rope_freqs(plain, scaled):
    def add(tensors):
        tensors["rope_freqs.weight"] = inverse_frequencies(plain) / inverse_frequencies(scaled)

    return add


def test_rope_scaling(weights, tmp_path):
    short = shorten(weights)
    plain = dataclasses.replace(short[0], rope_theta=5e5, max_position_embeddings=131072)
    scaled = llama3(plain)
    file = write(tmp_path / "llama3.gguf", (plain, weights[1]), tensors=rope_freqs(plain, scaled))
    assert open_checkpoint(hub.resolve(file)).config == dataclasses.replace(scaled, dtype="float32")
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    found = open_checkpoint(hub.resolve(write(tmp_path / "linear.gguf", short, keys=keys))).config
    assert (found.rope_type, found.rope_factors) == ("linear", (("factor", 2.5),))
    other = rope_freqs(plain, llama3(plain, original_max_position_embeddings=4096.0))
    with pytest.raises(DataError, match=r"other\.gguf: rope_freqs\.weight is not that of Llama 3\.1"):
        hub.resolve(write(tmp_path / "other.gguf", (plain, weights[1]), tensors=other))


def change(name: str, array: np.ndarray | None) -> Callable[[dict[str, np.ndarray]], None]:
    def act(tensors):
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array

    return act


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama' is"),
        ({"keys": {"split.count": 2}}, "is one of 2 parts: merge them with llama-gguf-split"),
        ({"endianess": gguf.GGUFEndian.BIG}, "is big-endian: convert it with gguf-convert-endian"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count is 8, must be 0"),
        ({"keys": {"llama.rope.dimension_count": 16}}, "llama.rope.dimension_count is 16, must be 32"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn', must be none"),
        ({"keys": {"llama.logit_scale": 2.0}}, "llama.logit_scale is 2.0, must be absent"),
        ({"keys": {"llama.block_count": 3}}, "llama.block_count is 3, must be 2"),
        ({"keys": {"llama.attention.head_count": 3, "llama.rope.dimension_count": None}}, "heads 3 is not a multiple"),
        ({"keys": {"llama.embedding_length": None}}, "llama.embedding_length is missing"),
        ({"keys": {"tokenizer.ggml.model": "nonsense"}}, "'nonsense'"),
        ({"tensors": change("blk.1.attn_q.bias", np.zeros(128, np.float32))}, "not have blk.1.attn_q.bias (1 such"),
        ({"tensors": change("blk.1.ffn_up.weight", None)}, "blk.1.ffn_up.weight is missing, must be (256, 128)"),
        ({"tensors": change("output.weight", np.zeros((8, 128), np.float32))}, "output.weight is (8, 128), must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_a_plain_llama_is_refused(options, message, weights, tmp_path):
    file = write(tmp_path / "base.gguf", shorten(weights), **options)
    with pytest.raises(DataError) as caught:
        hub.resolve(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damaged_files_are_refused(weights, tmp_path):
    good, file = write(tmp_path / "good.gguf", shorten(weights), "Q8_0"), tmp_path / "bad.gguf"
    content = good.read_bytes()
    cut = [content[:size] for size in (0, 3, 20, 1000, 20_000, len(content) // 2, len(content) - 40)]
    for data in [*cut, b"PK\3\4" + content[4:]]:
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"bad\.gguf: cannot be read"):
            hub.resolve(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git-LFS pointer"):
        hub.resolve(file)


def test_a_file_is_converted_once_and_again_if_it_changes(weights, tmp_path, capsys):
    file = write(tmp_path / "a model.gguf", shorten(weights), "Q8_0")
    folder = hub.resolve(file)
    assert folder.name == "a model" and folder.is_relative_to(tmp_path / "cache")
    assert "a model.gguf: F32, Q8_0 converted to bfloat16, kept in" in capsys.readouterr().err
    link = tmp_path / "LINK.GGUF"
    link.symlink_to(file)
    assert hub.resolve(link) == folder.with_name("LINK")
    capsys.readouterr()
    assert hub.resolve(file) == folder and capsys.readouterr().err == ""
    os.utime(file, (1, 1))
    assert hub.resolve(file) != folder
    with pytest.raises(UsageError, match="is a local file, which has no revision"):
        hub.resolve(file, "main")


def test_a_missing_package_is_named(weights, tmp_path, monkeypatch):
    file = write(tmp_path / "base.gguf", shorten(weights))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'gguf>=0\.19' 'transformers>=5\.24'$"):
        hub.resolve(file)


def test_ids_are_those_of_the_original_tokenizer(weights, tmp_path):
    folder = hub.resolve(write(tmp_path / "base.gguf", shorten(weights)))
    (found, notes), (original, _) = (open_tokenizer(one, weights[0]) for one in (folder, BASE))
    assert found is not None and original is not None and notes == []
    for text in [*TEXTS, (BASE / "recipe.json").read_text()]:
        assert found.encode(text) == original.encode(text)
    assert (found.prefix, found.suffix) == (original.prefix, original.suffix) == ([0], [])


@pytest.mark.parametrize("make", [vocabulary, lambda: vocabulary() | {"pre": "llama-bpe"}, sentencepiece_vocabulary])
def test_weights_and_ids_are_those_of_transformers(make, weights, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers needs torch to read GGUF")
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = shorten(weights)[0]
    file = write(tmp_path / "base.gguf", shorten(weights), "Q8_0", tokenizer=make())
    folder = hub.resolve(file)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours, _ = open_tokenizer(folder, config)
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert [*ours.prefix, *ours.encode(text), *ours.suffix] == theirs.encode(text, split_special_tokens=True)
    read = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    model = transformers.LlamaForCausalLM(read)
    stored = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    for name, tensor in open_checkpoint(folder).tensors.items():
        expected = stored[name].to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(read_tensor(tensor).astype(np.float32), expected, name)


def test_growth_and_training_from_a_file(weights, start, tmp_path):
    file, grown = write(tmp_path / "my base.gguf", shorten(weights, 4), "Q8_0"), tmp_path / "grown"
    flags = ["--model", str(file), "--every", "2"]
    assert run_command(upscale.main, [*flags, "--output", str(grown)]) == 0
    record, card = (grown / "growth.json").read_text(), (grown / "README.md").read_text()
    assert json.loads(record)["proof"]["max_abs_logit_difference"] == 0
    assert "license: apache-2.0" in card and "my base.gguf, grown with" in card and str(tmp_path) not in card
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(file, inside)
    shutil.copy(grown / "config.json", inside)
    flags[1] = str(inside / file.name)
    assert run_command(upscale.main, [*flags, "--output", str(inside), "--overwrite"]) == 2  # it would delete the file
    run = tmp_path / "run"
    flags = ["--model", str(file), "--text", str(start / "ids.npy"), "--run", str(run), "--batch-size", "8"]
    flags += ["--sequence-length", "16", "--only", "all", "--save-every", "1"]
    assert run_command(train.main, [*flags, "--steps", "1"]) == 0
    export = tmp_path / "trained"
    assert run_command(train.main, [*flags, "--steps", "2", "--export", str(export)]) == 0
    trained = json.loads((export / "training.json").read_text())
    assert trained["base"] == {"name": "my base", "revision": None, "card": {"license": "apache-2.0"}}
    write(file, shorten(weights, 4), "F32")  # another model under the same name
    assert run_command(train.main, [*flags, "--steps", "3"]) == 2
