"""config.json: both formats, the defaults of transformers, invalid keys, and the sizes of public models."""

import dataclasses
import json
import math

import pytest
import transformers

from tli_jax.errors import DataError
from tli_jax.models.attention import inverse_frequencies
from tli_jax.models.config import LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Llama-3.2-1B as published, in the format of transformers 4.
OLD = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}
FACTORS = ("linear", "llama3")  # types whose factors are read
MINIMAL = {"model_type": "llama", "num_hidden_layers": 2}


def new_format(old: dict) -> dict:
    """The same model as transformers 5 writes it."""
    raw = {key: old[key] for key in old if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = old["rope_scaling"] or {}
    rope = {"rope_type": scaling.get("type", "default")} | scaling | {"rope_theta": old["rope_theta"]}
    return raw | {"dtype": old["torch_dtype"], "rope_parameters": rope, "transformers_version": "5.23.0"}


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def as_transformers_reads(raw: dict) -> dict:
    """The fields of ``LlamaConfig`` as transformers reads them."""
    theirs = transformers.LlamaConfig.from_dict(json.loads(json.dumps(raw)))
    theirs.standardize_rope_params()  # as transformers' model does
    rope = dict(theirs.rope_parameters)
    eos = theirs.eos_token_id
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    same = [f.name for f in dataclasses.fields(LlamaConfig) if hasattr(theirs, f.name) and f.name != "dtype"]
    return {name: getattr(theirs, name) for name in same} | {
        "rope_theta": rope["rope_theta"],
        "rope_type": rope["rope_type"],
        "rope_factors": tuple((name, rope[name]) for name in names if name in rope and rope["rope_type"] in FACTORS),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "num_experts": 0,
        "experts_per_token": 0,
    }


def our_reading(raw: dict) -> dict:
    """The fields that transformers has too: it leaves a missing dtype open and has no source."""
    return without(
        {f.name: getattr(LlamaConfig.from_hf(raw), f.name) for f in dataclasses.fields(LlamaConfig)}, "dtype", "source"
    )


@pytest.mark.parametrize("scaling", [LLAMA3, None, {"type": "linear", "factor": 4.0}], ids=["llama3", "none", "linear"])
def test_old_and_new_format_give_equal_configs(scaling):
    old = LlamaConfig.from_hf(OLD | {"rope_scaling": scaling})
    new = LlamaConfig.from_hf(new_format(OLD | {"rope_scaling": scaling}))
    assert old == new and hash(old) == hash(new)
    assert old.dtype == "bfloat16" and old.rope_theta == 500000.0
    assert old.rope_type == ((scaling or {}).get("rope_type") or (scaling or {}).get("type", "default"))
    assert (inverse_frequencies(old) == inverse_frequencies(new)).all()


READABLE = {
    "minimal": MINIMAL,
    "old": OLD,
    "new": new_format(OLD),
    "both, the old key takes precedence": new_format(OLD)
    | {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "theta beside rope_parameters": MINIMAL | {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "nulls": MINIMAL | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "eos_token_id": None},
    "no bos": MINIMAL | {"bos_token_id": None},
    "one eos": MINIMAL | {"eos_token_id": 7},
    "no eos at all": MINIMAL | {"eos_token_id": []},
    "llama3 without an original context": OLD | {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
    "the original context outside of rope_scaling": OLD
    | {"rope_scaling": without(LLAMA3, "original_max_position_embeddings"), "original_max_position_embeddings": 512},
    "two original contexts": OLD | {"original_max_position_embeddings": 512},
    "the original context of another type": MINIMAL | {"original_max_position_embeddings": 512},
    "type and rope_type": MINIMAL | {"rope_scaling": {"type": "linear", "rope_type": "default"}},
    "no type": MINIMAL | {"rope_scaling": {"factor": 2.0}},
    "an empty rope_scaling": MINIMAL | {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "false for none": MINIMAL | {"rope_scaling": False, "rope_theta": 5e5},
    "two thetas": MINIMAL | {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": 1e6},
    "a theta in rope_scaling": MINIMAL | {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    "whole numbers": MINIMAL | {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2}},
    "full rotation": MINIMAL | {"partial_rotary_factor": 1},
    "null partial rotation": MINIMAL | {"rope_parameters": {"partial_rotary_factor": None}},
    "another name for silu": MINIMAL | {"hidden_act": "swish"},
    "zeros": MINIMAL | {"rms_norm_eps": 0.0, "initializer_range": 0.0},
    "a head of another size": MINIMAL | {"head_dim": 64},
    "dynamic": MINIMAL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5e5},
    "yarn": MINIMAL | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5}},
}


@pytest.mark.parametrize("raw", READABLE.values(), ids=READABLE.keys())
def test_reads_what_transformers_reads(raw):
    assert our_reading(raw) == as_transformers_reads(raw)


@pytest.mark.parametrize("key", sorted(OLD))
def test_a_missing_key_has_the_default_of_transformers(key):
    if key in ("model_type", "num_hidden_layers"):
        # The architecture and the depth have no sensible default.
        with pytest.raises(DataError, match=key):
            LlamaConfig.from_hf(without(OLD, key))
    else:
        assert our_reading(without(OLD, key)) == as_transformers_reads(without(OLD, key))


def test_dtype_is_read_under_both_names():
    assert LlamaConfig.from_hf(MINIMAL).dtype == "float32"
    assert LlamaConfig.from_hf(MINIMAL | {"dtype": "float16"}).dtype == "float16"
    assert LlamaConfig.from_hf(MINIMAL | {"torch_dtype": "bfloat16", "dtype": None}).dtype == "bfloat16"
    assert LlamaConfig.from_hf(MINIMAL | {"torch_dtype": None}).dtype == "float32"
    assert LlamaConfig.from_hf(MINIMAL | {"torch_dtype": "bfloat16", "dtype": "float16"}).dtype == "float16"


SPELLINGS = {"float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16"}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_accept_the_spelling_of_torch(key, name):
    for spelt in (name, f"torch.{name}"):
        ours = LlamaConfig.from_hf(MINIMAL | {key: spelt})
        assert ours.dtype == SPELLINGS[name]
        # transformers 4 accepts the prefix torch. and 5 does not, so it is written without.
        assert ours.to_hf()[key] == SPELLINGS[name]


@pytest.mark.parametrize("name", SPELLINGS)
def test_dtypes_have_the_names_of_torch(name):
    pytest.importorskip("torch", reason="without torch transformers keeps the name as it is written")
    for key in ("dtype", "torch_dtype"):
        theirs = transformers.LlamaConfig.from_dict(MINIMAL | {key: name}).dtype
        ours = LlamaConfig.from_hf(MINIMAL | {key: name})
        assert f"torch.{ours.dtype}" == str(theirs)
        assert transformers.LlamaConfig.from_dict(ours.to_hf()).dtype == theirs


def test_mixtral_reads_missing_and_null_heads_as_transformers_does():
    raw = {"model_type": "mixtral", "num_hidden_layers": 2}
    assert LlamaConfig.from_hf(raw).num_key_value_heads == transformers.MixtralConfig().num_key_value_heads == 8
    # As in transformers 4; 5 refuses null.
    assert LlamaConfig.from_hf(raw | {"num_key_value_heads": None}).num_key_value_heads == 32


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "unknown"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_type_is_read_but_not_run(key, kind):
    raw = MINIMAL | {key: {"rope_type": kind, "factor": 4.0}}
    config = LlamaConfig.from_hf(raw, "here/config.json")
    assert config.rope_type == kind and not config.is_runnable and config.to_hf() == raw
    with pytest.raises(DataError, match=f"^there: .*{kind}.*default, linear, llama3.*--no-proof"):
        config.check_runnable("there")
    with pytest.raises(DataError, match=kind):
        inverse_frequencies(config)


REFUSED = {
    "sliding_window": 4096,
    "attention_bias": True,
    "mlp_bias": True,
    "quantization_config": {"quant_method": "fp8"},
    "hidden_act": "gelu",
    "partial_rotary_factor": 0.5,
    "is_encoder_decoder": True,
    "layer_types": ["full_attention"] * 15 + ["sliding_attention"],
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rope_scaling": {"rope_type": None, "type": "linear", "factor": 4.0},
    "rope_parameters": {"rope_type": ["dynamic"], "factor": 4.0},
    "dtype": "float8_e4m3fn",
    "torch_dtype": "int8",
    # Wrong types and values.
    "vocab_size": "128256",
    "hidden_size": 2048.0,
    "intermediate_size": True,
    "num_hidden_layers": 0,
    "max_position_embeddings": -1,
    "rms_norm_eps": "1e-5",
    "rope_theta": math.inf,
    "initializer_range": math.nan,
    "tie_word_embeddings": "true",
    "bos_token_id": [1, 2],
    "eos_token_id": [128001, "</s>"],
    # Sizes that do not fit together.
    "num_attention_heads": 33,
    "num_key_value_heads": 5,
    "head_dim": 63,
}


@pytest.mark.parametrize("key", REFUSED)
def test_errors_name_the_file_the_key_and_the_value(key):
    # A new key is not read if the old key with the same meaning is present.
    raw = without(OLD, "rope_scaling") if key == "rope_parameters" else OLD
    with pytest.raises(DataError) as refusal:
        LlamaConfig.from_hf(raw | {key: REFUSED[key]}, "here/config.json")
    message = str(refusal.value)
    assert message.startswith("here/config.json") and key in message and "\n" not in message
    found = REFUSED[key]
    if key == "layer_types":
        assert "sliding_attention" in message
    elif key in ("rope_scaling", "rope_parameters"):
        assert f"rope type {found['rope_type']}, must be a string" in message
    else:
        assert str(found) in message


@pytest.mark.parametrize("value", [10**400, -(10**400), [[0]] * 10_000, "9" * 10_000, {"a": {}}, math.inf])
def test_errors_are_short_for_values_of_any_size_and_type(value):
    # These keys are used; others are kept as they are.
    for key in ("vocab_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "rope_theta", "bos_token_id"):
        with pytest.raises(DataError) as refusal:
            LlamaConfig.from_hf(OLD | {key: value})
        assert key in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", ["8", 0, None])
def test_errors_name_the_rope_factor(name, value):
    with pytest.raises(DataError, match=f"rope_scaling.*{name}"):
        LlamaConfig.from_hf(OLD | {"rope_scaling": LLAMA3 | {name: value}})


def test_equal_rope_factors_are_refused():
    with pytest.raises(DataError, match=r"high_freq_factor 1\.0, .*low_freq_factor 1\.0"):
        LlamaConfig.from_hf(OLD | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}})


def test_rope_per_layer_type_is_refused():
    nested = {"full_attention": LLAMA3 | {"rope_theta": 5e5}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(DataError, match=r"rope_parameters .* one object for all layers"):
        LlamaConfig.from_hf(new_format(OLD) | {"rope_parameters": nested})


def test_heads_must_divide_hidden_size_without_head_dim():
    with pytest.raises(DataError, match=r"hidden_size 2050 .* num_attention_heads 32"):
        LlamaConfig.from_hf(without(OLD, "head_dim") | {"hidden_size": 2050})
    assert LlamaConfig.from_hf(OLD | {"hidden_size": 2050}).head_dim == 64


def test_a_misspelt_key_is_suggested():
    with pytest.raises(DataError, match=r"'num_hidden_layers' is missing.*did you mean num_hidden_layer\?"):
        LlamaConfig.from_hf(without(OLD, "num_hidden_layers") | {"num_hidden_layer": 16})


@pytest.mark.parametrize("raw", [OLD, new_format(OLD), MINIMAL | {"unknown_key": {"a": [1, None, "é"]}}])
def test_all_keys_survive_reading_and_writing(raw):
    config = LlamaConfig.from_hf(raw)
    assert config.to_hf() == raw
    assert config.with_layers(24).to_hf() == raw | {"num_hidden_layers": 24}


def test_per_layer_lists_follow_the_depth():
    raw = OLD | {"layer_types": ["full_attention"] * 16}
    grown = LlamaConfig.from_hf(raw).with_layers(20).to_hf()
    assert grown == raw | {"num_hidden_layers": 20, "layer_types": ["full_attention"] * 20}
    assert LlamaConfig.from_hf(raw).to_hf() == raw


@pytest.mark.parametrize(
    "raw", [OLD, new_format(OLD), MINIMAL, OLD | {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_a_config_without_a_source_is_written_in_full(raw):
    config = dataclasses.replace(LlamaConfig.from_hf(raw), source="{}")
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert as_transformers_reads(config.to_hf()) == our_reading(raw)


# Public configurations: D, F, L, H, K, h, tied; parameters of the model and of a layer; and of TLI at K = 8, 4 and 2.
PUBLIC = {
    "Llama-3.2-1B": ((2048, 8192, 16, 32, 8, 64, True), 1.236e9, 60.8e6, {18: 1.36e9, 20: 1.48e9, 24: 1.72e9}),
    "Llama-3.2-3B": ((3072, 8192, 28, 24, 8, 128, True), 3.213e9, 100.7e6, {31: 3.51e9, 35: 3.92e9, 42: 4.62e9}),
    "Llama-3.1-8B": ((4096, 14336, 32, 32, 8, 128, False), 8.030e9, 218.1e6, {36: 8.90e9, 40: 9.78e9, 48: 11.52e9}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_sizes_of_public_models(name):
    (D, F, L, H, K, h, tied), total, layer, grown = PUBLIC[name]
    config = LlamaConfig(128256, D, F, L, H, K, h, tie_word_embeddings=tied, dtype="bfloat16")
    assert config.num_params == pytest.approx(total, abs=0.5e6)
    assert config.layer_params == pytest.approx(layer, abs=0.05e6)
    for (layers, params), k in zip(grown.items(), (8, 4, 2), strict=True):
        assert layers == L + L // k
        assert config.with_layers(layers).num_params == pytest.approx(params, abs=0.005e9)
    assert config.kv_cache_bytes_per_token == 2 * L * K * h * 2


def test_flops_per_token():
    config = LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True)
    # Two per weight of a matrix, which are all but the 33 norms. The tied head counts, its look-up does not.
    matrices = config.num_params - 33 * 2048
    assert config.flops_per_token(0) == 2 * matrices
    # Scores and weighted values: two products with 2 FLOPs for each of H*h numbers and half of the positions.
    assert config.flops_per_token(4096) - config.flops_per_token(0) == 16 * 4 * 2048 * 4096 / 2
