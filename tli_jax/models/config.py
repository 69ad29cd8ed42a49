"""What a Llama is, or a mixture of experts made of one (Mixtral): its sizes, and one table of its tensors from which
everything else is derived.

Dims, by letter: B batch, T time, D model, H query heads, K key/value heads, h head size, F feed-forward,
V vocabulary, L layers, E experts. A tensor is stored as Hugging Face stores it, ``[out, in]``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from tli_jax.errors import DataError
from tli_jax.models.fields import Reader, shorten

# Name within a layer -> dims. In the layer-stacked tree each leaf has the dim L in front.
_ATTENTION: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("D",),
    "self_attn.q_proj.weight": ("Hh", "D"),
    "self_attn.k_proj.weight": ("Kh", "D"),
    "self_attn.v_proj.weight": ("Kh", "D"),
    "self_attn.o_proj.weight": ("D", "Hh"),
    "post_attention_layernorm.weight": ("D",),
}
_DENSE: dict[str, tuple[str, ...]] = _ATTENTION | {
    "mlp.gate_proj.weight": ("F", "D"),
    "mlp.up_proj.weight": ("F", "D"),
    "mlp.down_proj.weight": ("D", "F"),
}
# w1 is the gate, w3 up, w2 down. Each expert's is stored by itself: ``block_sparse_moe.experts.7.w1.weight``.
_EXPERTS: dict[str, tuple[str, ...]] = _ATTENTION | {
    "block_sparse_moe.gate.weight": ("E", "D"),
    "block_sparse_moe.experts.w1.weight": ("E", "F", "D"),
    "block_sparse_moe.experts.w2.weight": ("E", "D", "F"),
    "block_sparse_moe.experts.w3.weight": ("E", "F", "D"),
}

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_ACTIVATIONS = ("silu", "swish")  # two names of one function
# Names that torch has for two of them; ``from_hf`` also drops a leading ``torch.``.
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}
# RoPE type -> its factors. Other types can be grown, because a plan needs tensors only, but not run.
_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys under which families close to Llama change the mathematics, with the only value that leaves it Llama's.
_MUST_BE = {
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


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama, hashable, so that it can be a static argument under ``jit``.

    With ``num_experts`` it is a Mixtral: that many experts in each layer, of ``intermediate_size``, of which a token's
    router chooses ``experts_per_token``. 0 is a dense model.

    ``source`` keeps the whole ``config.json`` as text, so that what is not understood here survives growth.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factors: tuple[tuple[str, float], ...] = ()
    dtype: DType = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def check_runnable(self, where: str = "config.json") -> None:
        """Refuse what can be grown from file to file but not run: a RoPE type whose frequencies are not computed here.

        Raises:
            DataError: names the type and the way around.
        """
        if self.rope_type not in _ROPE_FACTORS:
            raise DataError(
                f"{where}: the model cannot be run, RoPE type {self.rope_type!r} is not supported"
                f" ({', '.join(_ROPE_FACTORS)} are): growing it works with --no-proof"
            )

    @property
    def is_runnable(self) -> bool:
        """Whether ``check_runnable`` passes."""
        return self.rope_type in _ROPE_FACTORS

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every dim that a tensor can have."""
        h = self.head_dim
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "Hh": self.num_attention_heads * h,
            "Kh": self.num_key_value_heads * h,
            "E": self.num_experts,
        }

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.sizes[d] for d in dims)

    @property
    def layer_tensors(self) -> dict[str, tuple[str, ...]]:
        """Name within a layer -> dims."""
        return _EXPERTS if self.num_experts else _DENSE

    def stored_tensors(self, name: str) -> list[str]:
        """The names under which a layer's tensor is stored: its own, or one for each expert."""
        if len(self.layer_tensors[name]) < 3:
            return [name]
        before, _, after = name.rpartition("experts.")
        return [f"{before}experts.{expert}.{after}" for expert in range(self.num_experts)]

    @property
    def outer_tensors(self) -> dict[str, tuple[str, ...]]:
        """Name -> dims of the tensors outside the layers; a tied head is not stored."""
        outer: dict[str, tuple[str, ...]] = {"embed_tokens.weight": ("V", "D"), "norm.weight": ("D",)}
        return outer if self.tie_word_embeddings else outer | {"lm_head.weight": ("V", "D")}

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return sum(math.prod(self.shape(dims)) for dims in self.layer_tensors.values())

    @property
    def layer_matrix_params(self) -> int:
        """Parameters of one layer's matrices that a token goes through, which is what its matrix products cost."""
        return sum(self._active(dims) for dims in self.layer_tensors.values() if len(dims) > 1)

    def _active(self, dims: tuple[str, ...]) -> int:
        """Parameters of a tensor that one token goes through: of the chosen experts alone."""
        sizes = self.sizes | ({"E": self.experts_per_token} if len(dims) == 3 else {})
        return math.prod(sizes[dim] for dim in dims)

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, a tied embedding counted once."""
        outer = sum(math.prod(self.shape(dims)) for dims in self.outer_tensors.values())
        return outer + self.num_hidden_layers * self.layer_params

    @property
    def num_active_params(self) -> int:
        """Parameters that one token goes through, the whole embedding counted."""
        idle = self.layer_params - sum(self._active(dims) for dims in self.layer_tensors.values())
        return self.num_params - self.num_hidden_layers * idle

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache, in the model's own dtype."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.num_hidden_layers * self.sizes["Kh"] * itemsize

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the forward pass per token: 2 per weight of each matrix product (head included, look-up of
        the embedding not) and causal attention counted half, at a sequence of ``context`` tokens."""
        attention = 4 * self.sizes["Hh"] * context / 2
        per_layer = 2 * self.layer_matrix_params + attention
        return self.num_hidden_layers * per_layer + 2 * self.vocab_size * self.hidden_size

    def with_layers(self, layers: int) -> "LlamaConfig":
        """The same model with another number of layers."""
        return dataclasses.replace(self, num_hidden_layers=layers)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "LlamaConfig":
        """Read a ``config.json``, of old or new transformers.

        Keys that transformers' ``LlamaConfig`` or ``MixtralConfig`` defaults get that default; all else that is needed
        must be there.

        Raises:
            DataError: a key is missing, has the wrong type, or asks for something that is not plain Llama.
        """
        is_mixtral = _refuse_other_architectures(raw, where)
        read = Reader(raw, where)
        experts = read.integer("num_local_experts", 8) if is_mixtral else 0
        chosen = read.integer("num_experts_per_tok", 2) if is_mixtral else 0
        if chosen > experts:
            raise DataError(f"{where}: num_experts_per_tok {chosen} is more than num_local_experts {experts}: mend one")
        heads = read.integer("num_attention_heads", 32)
        # A missing key means 8 in a Mixtral, null means as many as query heads in both.
        kv_default = 8 if is_mixtral and "num_key_value_heads" not in raw else heads
        kv_heads = read.integer("num_key_value_heads", kv_default)
        hidden = read.integer("hidden_size", 4096)
        if raw.get("head_dim") is None and hidden % heads:
            raise DataError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}: mend one")
        head_dim = read.integer("head_dim", hidden // heads)
        if heads % kv_heads:
            raise DataError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: mend one"
            )
        if head_dim % 2:
            raise DataError(f"{where}: head_dim {head_dim} is odd, rotary embedding needs an even one")
        context = read.integer("max_position_embeddings", 131072 if is_mixtral else 2048)
        if context < 2:
            raise DataError(f"{where}: max_position_embeddings is {context}, no token has a successor in that context")
        rope_theta, rope_type, rope_factors = _read_rope(raw, where, 1e6 if is_mixtral else 1e4, context)
        dtype_key = "dtype" if raw.get("dtype") else "torch_dtype"
        dtype = raw.get(dtype_key) or "float32"
        if isinstance(dtype, str) and dtype not in DTYPES:
            dtype = dtype.removeprefix("torch.")
            dtype = _DTYPE_ALIASES.get(dtype, dtype)
            # Written by the name that every version of transformers reads.
            raw = {**raw, dtype_key: dtype} if dtype in DTYPES else raw
        if dtype not in DTYPES:
            raise DataError(f"{where}: {dtype_key} {raw[dtype_key]!r} is not supported, use one of {', '.join(DTYPES)}")
        bos = read.token_ids("bos_token_id", 1)
        if len(bos) > 1:
            raise DataError(f"{where}: bos_token_id is {raw['bos_token_id']!r}, must be one token id or null")
        return cls(
            vocab_size=read.integer("vocab_size", 32000),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", 14336 if is_mixtral else 11008),
            num_hidden_layers=read.integer("num_hidden_layers", None),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5 if is_mixtral else 1e-6, can_be_zero=True),
            initializer_range=read.number("initializer_range", 0.02, can_be_zero=True),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            rope_theta=rope_theta,
            rope_type=rope_type,
            rope_factors=rope_factors,
            dtype=dtype,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=read.token_ids("eos_token_id", 2),
            num_experts=experts,
            experts_per_token=chosen,
            source=json.dumps(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model: what was read, key by key, with this depth; or a new one."""
        raw: dict[str, Any] = json.loads(self.source)
        if not raw:
            raw = {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head_dim,
                "max_position_embeddings": self.max_position_embeddings,
                "rms_norm_eps": self.rms_norm_eps,
                "initializer_range": self.initializer_range,
                "tie_word_embeddings": self.tie_word_embeddings,
                "rope_theta": self.rope_theta,
                "rope_scaling": None
                if self.rope_type == "default"
                else {"rope_type": self.rope_type} | dict(self.rope_factors),
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "torch_dtype": self.dtype,
                "bos_token_id": self.bos_token_id,
                "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
            }
        dtype_key = "dtype" if raw.get("dtype") else "torch_dtype"
        if (raw.get(dtype_key) or "float32") != self.dtype:
            raw[dtype_key] = self.dtype
        if raw.get("layer_types"):
            # One entry a layer, and all the same, or it would not have been read.
            raw["layer_types"] = raw["layer_types"][:1] * self.num_hidden_layers
        return self.as_mixtral(raw) | {"num_hidden_layers": self.num_hidden_layers}

    def as_mixtral(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A ``config.json`` as one of a model with these experts; unchanged where there are none."""
        if not self.num_experts:
            return dict(raw)
        dense = ("attention_bias", "mlp_bias", "pretraining_tp")
        return (
            {key: value for key, value in raw.items() if key not in dense}
            | {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "intermediate_size": self.intermediate_size,
                # Mixtral's defaults are others than Llama's, so all that may have been left out is said.
                "head_dim": self.head_dim,
                "num_key_value_heads": self.num_key_value_heads,
                "max_position_embeddings": self.max_position_embeddings,
                "rms_norm_eps": self.rms_norm_eps,
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "num_attention_heads": self.num_attention_heads,
                "num_local_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "sliding_window": None,
            }
            | ({"rope_theta": self.rope_theta} if "rope_parameters" not in raw else {})
        )


_SUPPORTED = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}


def _refuse_other_architectures(raw: Mapping[str, Any], where: str) -> bool:
    """Whether it is a Mixtral."""
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or [_SUPPORTED.get(str(kind))]
    if architectures != [_SUPPORTED.get(str(kind))]:
        found = f"architectures {shorten(architectures)}, model_type {shorten(kind)}"
        known = " and ".join(f"{name} of model_type {kind!r}" for kind, name in _SUPPORTED.items())
        raise DataError(f"{where}: {found} is not supported, only {known} are")
    for key, only in _MUST_BE.items():
        if raw.get(key, only) not in (only, None):
            raise DataError(f"{where}: {key} = {shorten(raw[key])} is not supported, only {only!r} is")
    if raw.get("hidden_act", "silu") not in (*_ACTIVATIONS, None):
        raise DataError(f"{where}: hidden_act = {shorten(raw['hidden_act'])} is not supported, only 'silu' is")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise DataError(f"{where}: layer_types is {shorten(layer_types)}, must be a list")
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise DataError(f"{where}: layer_types has {shorten(layer_type)}, only 'full_attention' is supported")
    return kind == "mixtral"


def _read_rope(
    raw: Mapping[str, Any], where: str, default_theta: float, context: int
) -> tuple[float, str, tuple[tuple[str, float], ...]]:
    """Rotary parameters, from ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling``.

    A type that is not known is returned without its factors: the model can be grown, but not run.
    """
    # With both, transformers goes by the old one.
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise DataError(f"{where}: {key} is {shorten(rope)}, must be one object for all layers")
    read = Reader(rope, f"{where}: {key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise DataError(f"{where}: {key} has rope type {shorten(kind)}, must be a string")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise DataError(
            f"{where}: {key} has partial_rotary_factor {rope['partial_rotary_factor']!r}, only 1.0 is supported"
        )
    theta = (
        read.number("rope_theta", None)
        if "rope_theta" in rope
        else Reader(raw, where).number("rope_theta", default_theta)
    )
    if kind == "llama3":
        # As transformers 5 resolves it: the key of the model counts first, the context where there is none at all.
        original = "original_max_position_embeddings"
        found = {original: raw[original]} if original in raw else {original: context} | dict(rope)
        read = Reader({**rope, original: found[original]}, f"{where}: {key}")
    factors = {name: read.number(name, None) for name in _ROPE_FACTORS.get(kind, ())}
    if kind == "llama3" and factors["high_freq_factor"] <= factors["low_freq_factor"]:
        high, low = factors["high_freq_factor"], factors["low_freq_factor"]
        raise DataError(f"{where}: {key} has high_freq_factor {high}, must be above its low_freq_factor {low}")
    return theta, kind, tuple(factors.items())
