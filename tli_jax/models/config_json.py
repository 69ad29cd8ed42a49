"""Reading a ``config.json`` of old or new transformers: types, defaults and refusals."""

import json
import reprlib
import sys
from collections.abc import Mapping
from typing import Any, Literal

from tli_jax.errors import DataError, nearest

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
# Other names that torch has for them; a leading ``torch.`` is dropped too.
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
_ACTIVATIONS = ("silu", "swish")  # two names for the same function
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
# RoPE type -> its factors. A model of another type can be grown, which only needs its tensors, but not run.
ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys by which families close to Llama change the computation, and the only value that does not.
_REQUIRED = {
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "logit_scale": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "router_jitter_noise": 0.0,
    "tie_encoder_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def read_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of ``LlamaConfig``. A missing key gets its default in transformers.

    Raises:
        DataError: a key is missing, has the wrong type or a value that is not supported.
    """
    is_mixtral = _check_architecture(raw, where)
    read = _Reader(raw, where)
    experts = read.integer("num_local_experts", 8) if is_mixtral else 0
    chosen = read.integer("num_experts_per_tok", 2) if is_mixtral else 0
    if chosen > experts:
        raise DataError(
            f"{where}: num_experts_per_tok {chosen} is more than num_local_experts {experts}: fix one of them"
        )
    heads = read.integer("num_attention_heads", 32)
    # In a Mixtral, a missing key means 8. In both, null means the number of query heads.
    kv_default = 8 if is_mixtral and "num_key_value_heads" not in raw else heads
    kv_heads = read.integer("num_key_value_heads", kv_default)
    hidden = read.integer("hidden_size", 4096)
    if raw.get("head_dim") is None and hidden % heads:
        raise DataError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}: fix one of them"
        )
    head_dim = read.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise DataError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: fix one of them"
        )
    if head_dim % 2:
        raise DataError(f"{where}: head_dim {head_dim} is odd, but rotary embedding needs an even size")
    context = read.integer("max_position_embeddings", 131072 if is_mixtral else 2048)
    if context < 2:
        raise DataError(f"{where}: max_position_embeddings is {context}, must be 2 or more to predict a token")
    rope_theta, rope_type, rope_factors = _read_rope(raw, where, 1e6 if is_mixtral else 1e4, context)
    dtype_key = "dtype" if raw.get("dtype") else "torch_dtype"
    dtype = raw.get(dtype_key) or "float32"
    if isinstance(dtype, str) and dtype not in DTYPES:
        dtype = dtype.removeprefix("torch.")
        dtype = _DTYPE_ALIASES.get(dtype, dtype)
        # Written back under the name that every version of transformers reads.
        raw = {**raw, dtype_key: dtype} if dtype in DTYPES else raw
    if dtype not in DTYPES:
        raise DataError(f"{where}: {dtype_key} {raw[dtype_key]!r} is not supported, use one of {', '.join(DTYPES)}")
    bos = read.token_ids("bos_token_id", 1)
    if len(bos) > 1:
        raise DataError(f"{where}: bos_token_id is {raw['bos_token_id']!r}, must be one token id or null")
    return {
        "vocab_size": read.integer("vocab_size", 32000),
        "hidden_size": hidden,
        "intermediate_size": read.integer("intermediate_size", 14336 if is_mixtral else 11008),
        "num_hidden_layers": read.integer("num_hidden_layers", None),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": read.number("rms_norm_eps", 1e-5 if is_mixtral else 1e-6, can_be_zero=True),
        "initializer_range": read.number("initializer_range", 0.02, can_be_zero=True),
        "tie_word_embeddings": read.boolean("tie_word_embeddings", False),
        "rope_theta": rope_theta,
        "rope_type": rope_type,
        "rope_factors": rope_factors,
        "dtype": dtype,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": read.token_ids("eos_token_id", 2),
        "num_experts": experts,
        "experts_per_token": chosen,
        "source": json.dumps(raw),
    }


def _check_architecture(raw: Mapping[str, Any], where: str) -> bool:
    """Refuse unsupported architectures. Returns whether it is a Mixtral."""
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or [_ARCHITECTURES.get(str(kind))]
    if architectures != [_ARCHITECTURES.get(str(kind))]:
        given = f"architectures {reprlib.repr(architectures)}, model_type {reprlib.repr(kind)}"
        known = " and ".join(f"{name} of model_type {kind!r}" for kind, name in _ARCHITECTURES.items())
        raise DataError(f"{where}: {given} is not supported, only {known} are")
    for key, only in _REQUIRED.items():
        if raw.get(key, only) not in (only, None):
            raise DataError(f"{where}: {key} = {reprlib.repr(raw[key])} is not supported, only {only!r} is")
    if raw.get("hidden_act", "silu") not in (*_ACTIVATIONS, None):
        raise DataError(f"{where}: hidden_act = {reprlib.repr(raw['hidden_act'])} is not supported, only 'silu' is")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise DataError(f"{where}: layer_types is {reprlib.repr(layer_types)}, must be a list")
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise DataError(f"{where}: layer_types has {reprlib.repr(layer_type)}, only 'full_attention' is supported")
    return kind == "mixtral"


def _read_rope(
    raw: Mapping[str, Any], where: str, default_theta: float, context: int
) -> tuple[float, str, tuple[tuple[str, float], ...]]:
    """Theta, type and factors, from ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling``.

    The factors of an unknown type are not read.
    """
    # If both are given, transformers uses the old key.
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise DataError(f"{where}: {key} is {reprlib.repr(rope)}, must be one object for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise DataError(f"{where}: {key} has rope type {reprlib.repr(kind)}, must be a string")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise DataError(
            f"{where}: {key} has partial_rotary_factor {rope['partial_rotary_factor']!r}, only 1.0 is supported"
        )
    read = _Reader(rope, f"{where}: {key}")
    theta = (
        read.number("rope_theta", None)
        if "rope_theta" in rope
        else _Reader(raw, where).number("rope_theta", default_theta)
    )
    if kind == "llama3":
        # As in transformers 5: the model's own key takes precedence, and the context length is the default.
        original = "original_max_position_embeddings"
        value = raw[original] if original in raw else rope.get(original, context)
        read = _Reader({**rope, original: value}, f"{where}: {key}")
    factors = {name: read.number(name, None) for name in ROPE_FACTORS.get(kind, ())}
    if kind == "llama3" and factors["high_freq_factor"] <= factors["low_freq_factor"]:
        high, low = factors["high_freq_factor"], factors["low_freq_factor"]
        raise DataError(f"{where}: {key} has high_freq_factor {high}, must be above its low_freq_factor {low}")
    return theta, kind, tuple(factors.items())


class _Reader:
    """Typed access to a parsed JSON object. Every error names the key and the value."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise DataError(f"{self.where}: key {key!r} is missing{nearest(key, self.raw)}: add it")
        return value

    def integer(self, key: str, default: int | None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 2**63:
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}, must be a whole number above 0")
        return value

    def number(self, key: str, default: float | None, can_be_zero: bool = False) -> float:
        value = self._get(key, default)
        # An int of any size compares with a float, but not every int converts to one.
        is_number = type(value) in (int, float) and 0 <= value <= sys.float_info.max
        if not is_number or not (value or can_be_zero):
            floor = "of 0 or more" if can_be_zero else "above 0"
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}, must be a number {floor}")
        return float(value)

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        """A token id, a list of them, or null for none."""
        value = self.raw.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}, must be a token id, a list of them or null")
        return tuple(ids)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise DataError(f"{self.where}: {key} is {reprlib.repr(value)}, must be true or false")
        return value
