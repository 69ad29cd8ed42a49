"""Read the GGUF file of a Llama: it is converted once, to a Hugging Face folder in the user's cache."""

import functools
import hashlib
import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.cli.console import say
from tli_jax.errors import DataError, UsageError
from tli_jax.hf.checkpoint import expected_shapes, tensor_names
from tli_jax.hf.encoding import as_data_error, silence_stderr
from tli_jax.hf.files import cache_folder, lock
from tli_jax.hf.inputs import refuse_failed_download
from tli_jax.hf.shards import OutputTensor, as_chunks, parse_size, split_shards
from tli_jax.hf.tensors import CODES, DTYPES
from tli_jax.hf.write import write_model
from tli_jax.models.attention import inverse_frequencies
from tli_jax.models.config import LlamaConfig
from tli_jax.version import __version__

_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "self_attn.o_proj": "attn_output"}
_NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_NAMES |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
_NAMES |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
}
_KEYS |= {"attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
# Without these, llama.cpp has the defaults of transformers.
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}


def open_gguf(file: Path) -> Path:
    """The Hugging Face folder of a GGUF file. It is written when the file is first opened, and again if it changes.

    Quantised weights become bfloat16. Others keep their dtype; if it differs between matrices, or does not hold the
    values of the norms, all become float32.

    Raises:
        UsageError: the extra ``gguf`` is not installed.
        DataError: the file is damaged, or not a plain Llama.
        OutputError, StorageError, OSError: the folder cannot be written.
    """
    stat, root = file.stat(), cache_folder() / "gguf"
    key = json.dumps([__version__, os.path.realpath(file), stat.st_size, stat.st_mtime_ns])
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16] / file.stem
    root.mkdir(parents=True, exist_ok=True)
    with lock(root):  # other processes wait
        if not folder.is_dir():
            _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    try:
        import gguf
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:
        raise UsageError(f"{file}: GGUF needs more packages: pip install 'gguf>=0.19' 'transformers>=5.24'") from None
    with file.open("rb") as stream:
        refuse_failed_download(file, stream.read(128), "a model")
    with as_data_error(f"{file}: cannot be read", "download it again, or use another file"), silence_stderr():
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if reader.byte_order == "S":
            raise DataError(f"{file}: is big-endian: convert it with gguf-convert-endian")
        if (parts := fields.get("split.count", 0)) > 1:
            raise DataError(f"{file}: is one of {parts} parts: merge them with llama-gguf-split")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        kinds = {tensor.tensor_type: tensor for tensor in reader.tensors}
        for kind, tensor in kinds.items():
            gguf.dequantize(tensor.data[:1], kind)  # raises if it cannot
        config = _read_config(fields, tensors, file)
        tokenizer = _make_tokenizer(fields, convert_gguf_tokenizer) if "tokenizer.ggml.tokens" in fields else None
    outputs, shapes = [], expected_shapes(config)
    for hf_name, short, index in tensor_names(config, config.num_hidden_layers):
        name = "".join(f"blk.{layer}." for layer in index) + _NAMES[short.removesuffix(".weight")] + ".weight"
        found = tuple(tensors[name].shape[::-1].tolist()) if name in tensors else "missing"
        if found != shapes[hf_name]:
            raise DataError(f"{file}: tensor {name} is {found}, must be {shapes[hf_name]}")
        make = as_chunks(functools.partial(_read, tensors.pop(name), config))
        outputs.append(OutputTensor(hf_name, CODES[np.dtype(config.dtype)], shapes[hf_name], make=make))
    if tensors:
        raise DataError(f"{file}: a plain Llama does not have {min(tensors)} ({len(tensors)} such tensors)")
    with write_model(folder, split_shards(outputs, parse_size("5GB")), config.to_hf(), title="convert") as model:
        if tokenizer is not None:
            tokenizer.save_pretrained(model.folder)
        if "general.license" in fields:  # for the cards of models that are made from it
            model.write_card(f"---\nlicense: {json.dumps(fields['general.license'])}\n---\n")
    say(f"{file}: {', '.join(sorted(kind.name for kind in kinds))} converted to {config.dtype}, kept in {folder}")


def _read_config(fields: dict[str, Any], tensors: dict[str, Any], file: Path) -> LlamaConfig:
    """Removes ``rope_freqs.weight``, which is a part of the configuration, from the tensors."""
    if (kind := fields["general.architecture"]) != "llama":
        raise DataError(f"{file}: architecture {kind!r} is not supported, only 'llama' is")
    own = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    # Numbers as the shortest decimals that are the same in fp32, the type of the file.
    own = {key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in own.items()}
    if missing := sorted(_KEYS.keys() - own.keys()):
        raise DataError(f"{file}: llama.{missing[0]} is missing: download it again, or use another file")
    divisors = tensors.pop("rope_freqs.weight", None)
    raw = {key: own.pop(name) for name, key in _KEYS.items()}
    raw |= {key: own.pop(name) for name, key in _OPTIONAL.items() if name in own}
    raw |= {f"{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    raw |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    raw |= {"tie_word_embeddings": "output.weight" not in tensors, "torch_dtype": _dtype(tensors)}
    raw |= {"vocab_size": int(tensors["token_embd.weight"].shape[1])}
    raw |= {"num_hidden_layers": sum(name.endswith(".attn_norm.weight") for name in tensors)}
    raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    if own.get("rope.scaling.type") == "linear":
        raw["rope_scaling"] = {"rope_type": own.pop("rope.scaling.type"), "factor": own.pop("rope.scaling.factor")}
    only = dict.fromkeys(("attention.value_length", "rope.dimension_count"), raw["head_dim"])
    only |= {"block_count": raw["num_hidden_layers"], "vocab_size": raw["vocab_size"]}
    only |= {"expert_count": 0, "rope.scaling.type": "none"}
    for key, value in own.items():
        if only.get(key) != value:
            raise DataError(f"{file}: llama.{key} is {reprlib.repr(value)}, must be {only.get(key, 'absent')}")
    config = LlamaConfig.from_hf(raw, str(file))
    if divisors is None:
        return config
    # Of the RoPE of Llama 3.1, a file has only the numbers by which the frequencies are divided.
    rope = {"rope_type": "llama3", "factor": float(divisors.data.max()), "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = LlamaConfig.from_hf(raw | {"rope_scaling": rope}, str(file))
    if not np.allclose(inverse_frequencies(config) / inverse_frequencies(scaled), divisors.data, rtol=1e-5, atol=0):
        raise DataError(f"{file}: rope_freqs.weight is not that of Llama 3.1, so it is not supported")
    return scaled


def _dtype(tensors: dict[str, Any]) -> str:
    from gguf import dequantize

    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if not kinds <= DTYPES.keys():
        return "bfloat16"
    dtype = DTYPES[kinds.pop() if len(kinds) == 1 else "F32"]
    norms = [dequantize(tensor.data, tensor.tensor_type) for tensor in tensors.values() if len(tensor.shape) == 1]
    with np.errstate(over="ignore"):
        return dtype.name if all((norm.astype(dtype) == norm).all() for norm in norms) else "float32"


def _read(tensor: Any, config: LlamaConfig) -> np.ndarray:
    from gguf import dequantize

    array = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):  # the halves of a head are interleaved
        array = array.reshape(-1, config.head_dim // 2, 2, array.shape[-1]).swapaxes(1, 2)
    return array.astype(config.dtype)


def _make_tokenizer(fields: dict[str, Any], convert: Callable[..., Any]) -> Any:
    """The tokenizer that transformers makes of the file. Its own reader of GGUF files needs torch."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING

    stored, options = (
        {name: fields[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in fields}
        for names in (GGUF_TOKENIZER_MAPPING[part] for part in ("tokenizer", "tokenizer_config"))
    )
    if stored["tokenizer_type"] == "llama":
        options.setdefault("add_bos_token", True)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        options[f"{name}_token"] = None if index is None else stored["tokens"][index]
    state = json.loads(convert("llama", stored)[0].to_str())
    # It adds "<|endoftext|>" to a vocabulary that lacks it, with an id that the model does not have.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(stored["tokens"])]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)
