"""Shapes of the published Llamas, to plan and compile a run without their weights."""

from collections.abc import Mapping
from typing import Any

from tli_jax.errors import DataError, UsageError, nearest
from tli_jax.models.config import LlamaConfig


def _llama3(D: int, F: int, L: int, H: int, *, h: int = 128, factor: float = 8.0, tied: bool = False) -> LlamaConfig:
    """A Llama 3.1 or 3.2 (arXiv 2407.21783), with the values of its ``config.json``."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=8,
        head_dim=h,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_theta=500000.0,
        rope_type="llama3",
        rope_factors=(
            ("factor", factor),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 8192),
        ),
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


SHAPES: dict[str, LlamaConfig] = {
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, h=64, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0, tied=True),
    "llama3.1-8b": _llama3(4096, 14336, 32, 32),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64),
    "llama3.1-405b": _llama3(16384, 53248, 126, 128),
}

# The fields that determine the compiled program.
_SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "dtype"),
)


def read_shape(shape: str | Mapping[str, Any]) -> LlamaConfig:
    """Return a published Llama by name, or read the keys of a ``config.json``; the architecture is optional.

    Raises:
        UsageError: an unknown name.
        DataError: see ``LlamaConfig.from_hf``.
    """
    if not isinstance(shape, str):
        return LlamaConfig.from_hf({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape}, "shape")
    if shape not in SHAPES:
        raise UsageError(f"shape: {shape!r} is not known{nearest(shape, SHAPES)}; use one of {', '.join(SHAPES)}")
    return SHAPES[shape]


def check_shape(config: LlamaConfig, shape: str | Mapping[str, Any] | None, where: str) -> None:
    """Check that a model has the configured shape, if any.

    Raises:
        DataError: names each differing field with both values.
        UsageError: see ``read_shape``.
    """
    expected = config if shape is None else read_shape(shape)
    differing = [name for name in _SHAPE_FIELDS if getattr(config, name) != getattr(expected, name)]
    if differing:
        what = ", ".join(f"{name} is {getattr(config, name)}, not {getattr(expected, name)}" for name in differing)
        raise DataError(f"{where}: does not have the configured shape: {what}: change shape or model")
