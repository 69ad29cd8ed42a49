"""Windows of token ids to run a model on."""

import numpy as np

from tli_jax.errors import DataError
from tli_jax.models.config import LlamaConfig

MIN_TOKENS = 128  # fewer tokens prove nothing


def windows(ids: list[int], config: LlamaConfig, tokens: int, length: int) -> np.ndarray:
    """Split ids into windows that do not overlap, each preceded by BOS if the model has one.

    Args:
        tokens: how many tokens to return at most, BOS included.
        length: T at most; it never exceeds the model's context.

    Returns:
        ``[B, T]`` int32.

    Raises:
        DataError: there are fewer tokens than ``MIN_TOKENS`` and than ``tokens``.
    """
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    T = min(length, config.max_position_embeddings, tokens)
    fresh = T - len(bos)
    B = min(tokens // T, len(ids) // fresh)
    if B == 0:  # shorter than one window: return one shorter window
        B, fresh = 1, len(ids)
        needed = min(MIN_TOKENS, tokens) - len(bos)
        if fresh < needed:
            raise DataError(f"the text has {fresh} tokens, the proof needs {needed}: give more text")
    rows = np.asarray(ids[: B * fresh], np.int32).reshape(B, fresh)
    return np.pad(rows, ((0, 0), (len(bos), 0)), constant_values=config.bos_token_id or 0)


def random_windows(config: LlamaConfig, tokens: int, length: int) -> np.ndarray:
    """Random ids as ``[B, T]`` int32, for a model without a tokenizer."""
    T = min(length, config.max_position_embeddings, tokens)
    return np.random.default_rng(0).integers(0, config.vocab_size, (tokens // T, T), dtype=np.int32)
