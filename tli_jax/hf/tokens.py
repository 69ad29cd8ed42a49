"""Texts to run a model on, and windows of their token ids."""

import hashlib
import sysconfig
from importlib import resources
from pathlib import Path

import numpy as np

from tli_jax.errors import DataError
from tli_jax.hf.encoding import Tokenizer as Tokenizer
from tli_jax.hf.tokenizer import open_tokenizer as open_tokenizer
from tli_jax.models.config import LlamaConfig

FEWEST = 128  # tokens that a proof needs at least
_HELD_OUT_EVERY = 40
_LEFT_OUT = frozenset(
    ["test", "tests", "pydoc_data", "encodings", "idlelib", "turtledemo", "lib2to3", "site-packages", "ensurepip"]
)


def embedded_text() -> str:
    """The text that the package carries, written by the project: Python, English, and a little of other languages."""
    return (resources.files("tli_jax") / "assets" / "text.txt").read_text(encoding="utf-8")


def topics() -> list[str]:
    """The documentation topics of the Python that runs this: the text kept out of the embedded base's training."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def library_files() -> tuple[list[Path], list[Path]]:
    """Sources of the standard library of the Python that runs this: those that the embedded base was trained on, and
    those held out, one in forty, chosen by the digest of its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            is_held_out = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % _HELD_OUT_EVERY == 0
            parts[is_held_out].append(path)
    return parts


def held_out_modules() -> list[str]:
    """Texts of the modules held out of the embedded base's training."""
    return [file.read_text(encoding="utf-8") for file in library_files()[1]]


def windows(ids: list[int], config: LlamaConfig, tokens: int, length: int) -> np.ndarray:
    """Ids as ``[B, T]``: a stream cut in windows that do not overlap, each with BOS in front where the model has one.

    Args:
        tokens: how many to return, at most; B * T.
        length: T, at most; no longer than the model's context.

    Raises:
        DataError: there are fewer than ``FEWEST`` tokens, or than ``tokens``.
    """
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    T = min(length, config.max_position_embeddings, tokens)
    fresh = T - len(bos)
    B = min(tokens // T, len(ids) // fresh)
    if B == 0:
        # Less than one window: a single shorter one.
        B, fresh = 1, len(ids)
        needed = min(FEWEST, tokens) - len(bos)
        if fresh < needed:
            raise DataError(f"the text has {fresh} tokens, the proof needs {needed}: give more text")
    rows = np.asarray(ids[: B * fresh], np.int32).reshape(B, fresh)
    return np.pad(rows, ((0, 0), (len(bos), 0)), constant_values=config.bos_token_id or 0)


def random_windows(config: LlamaConfig, tokens: int, length: int) -> np.ndarray:
    """Random ids as ``[B, T]``, for a model without a tokenizer."""
    T = min(length, config.max_position_embeddings, tokens)
    return np.random.default_rng(0).integers(0, config.vocab_size, (tokens // T, T), dtype=np.int32)
