"""The configuration of a Llama or Mixtral: its sizes, and one table of its tensors from which all else is derived.

Dims, by letter: B batch, T time, D model, H query heads, K key/value heads, h head size, F feed-forward,
V vocabulary, L layers, E experts. Tensors are stored as Hugging Face stores them, ``[out, in]``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from tli_jax.errors import DataError
from tli_jax.models.config_json import ROPE_FACTORS, DType, read_config

# Name within a layer -> dims. In layer-stacked params, each leaf has a leading dim L.
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
# w1 is gate, w2 down, w3 up. On disk, each expert has its own tensor: ``block_sparse_moe.experts.7.w1.weight``.
_EXPERTS: dict[str, tuple[str, ...]] = _ATTENTION | {
    "block_sparse_moe.gate.weight": ("E", "D"),
    "block_sparse_moe.experts.w1.weight": ("E", "F", "D"),
    "block_sparse_moe.experts.w2.weight": ("E", "D", "F"),
    "block_sparse_moe.experts.w3.weight": ("E", "F", "D"),
}

# Fields with the same name in config.json, in the order in which they are written.
_HF_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "rope_theta"),
)
_MIXTRAL_FIELDS = (
    *("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("vocab_size", "hidden_size", "num_attention_heads"),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama. Hashable, so it can be a static argument of ``jit``.

    If ``num_experts`` is not 0, it is a Mixtral: each layer has that many experts of ``intermediate_size``, and the
    router sends each token to ``experts_per_token`` of them.

    ``source`` is the text of ``config.json``, so that keys unknown to this class survive growth.

    Example:
        >>> config = LlamaConfig.from_hf(json.loads(Path("model/config.json").read_text()))
        >>> config.num_params, config.with_layers(24).num_params
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
        """Raise ``DataError`` if the RoPE type is not implemented. Such a model can only be grown, without a proof."""
        if not self.is_runnable:
            raise DataError(
                f"{where}: the model cannot be run, RoPE type {self.rope_type!r} is not supported"
                f" ({', '.join(ROPE_FACTORS)} are): grow it with --no-proof"
            )

    @property
    def is_runnable(self) -> bool:
        """Whether ``check_runnable`` passes."""
        return self.rope_type in ROPE_FACTORS

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dim of the tensor table."""
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
        """Names on disk of a layer's tensor: its own, or one per expert."""
        if len(self.layer_tensors[name]) < 3:
            return [name]
        before, _, after = name.rpartition("experts.")
        return [f"{before}experts.{expert}.{after}" for expert in range(self.num_experts)]

    @property
    def outer_tensors(self) -> dict[str, tuple[str, ...]]:
        """Name -> dims of the tensors outside the layers. A tied head is not among them."""
        outer: dict[str, tuple[str, ...]] = {"embed_tokens.weight": ("V", "D"), "norm.weight": ("D",)}
        return outer if self.tie_word_embeddings else outer | {"lm_head.weight": ("V", "D")}

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return sum(math.prod(self.shape(dims)) for dims in self.layer_tensors.values())

    @property
    def layer_matrix_params(self) -> int:
        """Active parameters in the matrices of one layer; a token costs 2 FLOPs for each."""
        return sum(self._active(dims) for dims in self.layer_tensors.values() if len(dims) > 1)

    def _active(self, dims: tuple[str, ...]) -> int:
        """Parameters of a tensor that a single token uses: those of its chosen experts."""
        sizes = self.sizes | ({"E": self.experts_per_token} if len(dims) == 3 else {})
        return math.prod(sizes[dim] for dim in dims)

    @property
    def num_params(self) -> int:
        """Parameters of the model. A tied embedding counts once."""
        outer = sum(math.prod(self.shape(dims)) for dims in self.outer_tensors.values())
        return outer + self.num_hidden_layers * self.layer_params

    @property
    def num_active_params(self) -> int:
        """Parameters that a single token uses, including the complete embedding."""
        idle = self.layer_params - sum(self._active(dims) for dims in self.layer_tensors.values())
        return self.num_params - self.num_hidden_layers * idle

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes per token in the KV cache, in the model's dtype."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.num_hidden_layers * self.sizes["Kh"] * itemsize

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the forward pass per token, at sequences of ``context`` tokens: 2 per weight of each matrix product
        (the head counts, the embedding look-up does not), and half of full attention, as it is causal."""
        attention = 4 * self.sizes["Hh"] * context / 2
        per_layer = 2 * self.layer_matrix_params + attention
        return self.num_hidden_layers * per_layer + 2 * self.vocab_size * self.hidden_size

    def with_layers(self, layers: int) -> "LlamaConfig":
        """The same model with a different number of layers."""
        return dataclasses.replace(self, num_hidden_layers=layers)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "LlamaConfig":
        """Read a ``config.json`` of old or new transformers.

        Args:
            where: the file, for error messages.

        Raises:
            DataError: a key is missing, has the wrong type, or asks for something that Llama does not have.
        """
        return cls(**read_config(raw, where))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model: all keys of the one it was read from, or a new one."""
        raw: dict[str, Any] = json.loads(self.source)
        if not raw:
            rope = {"rope_type": self.rope_type} | dict(self.rope_factors)
            eos = self.eos_token_ids
            raw = {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                **{name: getattr(self, name) for name in _HF_FIELDS},
                "rope_scaling": None if self.rope_type == "default" else rope,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "torch_dtype": self.dtype,
                "bos_token_id": self.bos_token_id,
                "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
            }
        dtype_key = "dtype" if raw.get("dtype") else "torch_dtype"
        if (raw.get(dtype_key) or "float32") != self.dtype:
            raw[dtype_key] = self.dtype
        if raw.get("layer_types"):
            # One entry per layer; from_hf refuses lists that mix types.
            raw["layer_types"] = raw["layer_types"][:1] * self.num_hidden_layers
        return self.as_mixtral(raw) | {"num_hidden_layers": self.num_hidden_layers}

    def as_mixtral(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Turn a dense ``config.json`` into one with this model's experts. A dense model's is returned unchanged."""
        if not self.num_experts:
            return dict(raw)
        dense_only = ("attention_bias", "mlp_bias", "pretraining_tp")
        return {
            **{key: value for key, value in raw.items() if key not in dense_only},
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": self.intermediate_size,
            # The defaults of Mixtral and Llama differ, so keys that may be missing are written out.
            **{name: getattr(self, name) for name in _MIXTRAL_FIELDS},
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "sliding_window": None,
            **({"rope_theta": self.rope_theta} if "rope_parameters" not in raw else {}),
        }
