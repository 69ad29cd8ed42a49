"""Token ids for a model from text, with the model's own tokenizer."""

import hashlib
import importlib.util
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tli_jax.errors import DataError, MissingInputError
from tli_jax.models.config import LlamaConfig

FEWEST = 128  # tokens that a proof needs at least
_HELD_OUT_EVERY = 40
_LEFT_OUT = frozenset(
    ["test", "tests", "pydoc_data", "encodings", "idlelib", "turtledemo", "lib2to3", "site-packages", "ensurepip"]
)


class Tokenizer(Protocol):
    """The little that is needed of one. ``prefix`` is what it puts in front of a text by default: BOS, or nothing."""

    @property
    def size(self) -> int: ...
    @property
    def prefix(self) -> list[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...


class _Fast:
    """``tokenizer.json``, read by the tokenizers library: transformers, which wraps it, takes seconds to import."""

    def __init__(self, file: Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.prefix = _first_special(self._tokenizer.encode("a", add_special_tokens=True).ids, self.encode("a"))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


class _Slow:
    """Whatever else transformers can read, e.g. a lone ``tokenizer.model``."""

    def __init__(self, folder: Path):
        import transformers

        loaded: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self._tokenizer = loaded
        self.size: int = 1 + max(loaded.get_vocab().values())
        self.prefix = _first_special(self._tokenizer.encode("a"), self.encode("a"))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _first_special(ids: list[int], text: list[int]) -> list[int]:
    """What stands in front of a text's own ids."""
    return next(ids[:i] for i in range(len(ids)) if ids[i : i + len(text)] == text)


def open_tokenizer(folder: Path, config: LlamaConfig) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer in a model folder, None where there is none, and warnings.

    Raises:
        DataError: it cannot be read, or has more tokens than the model.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        if not (folder / "tokenizer.model").exists():
            return None, [f"{folder}: no tokenizer, so text cannot be read"]
        if importlib.util.find_spec("sentencepiece") is None:
            return None, [f"{folder}: reading tokenizer.model, and so text, needs pip install 'tli_jax[sentencepiece]'"]
    try:
        tokenizer: Tokenizer = _Fast(file) if file.exists() else _Slow(folder)
    except Exception as error:  # the libraries raise bare Exception
        message = " ".join(str(error).split())[:160]
        raise DataError(f"{folder}: the tokenizer cannot be read ({message}): mend or remove it") from error
    if tokenizer.size > config.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.size:,} tokens, the model's vocabulary {config.vocab_size:,}:"
            " they do not belong together"
        )
    if tokenizer.size < config.vocab_size:
        unused = f"uses {tokenizer.size:,} of the {config.vocab_size:,} in the model's vocabulary"
        return tokenizer, [f"{folder}: the tokenizer {unused}"]
    return tokenizer, []


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


def read_text(file: Path) -> str:
    """A UTF-8 text.

    Raises:
        MissingInputError: it is not there.
        DataError: it is empty or not UTF-8; names the line.
    """
    if not file.is_file():
        raise MissingInputError(f"{file}: no such text file")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}: line {line} is not UTF-8 (byte {error.start:,}): convert the file") from None
    if not text.strip():
        raise DataError(f"{file}: is empty, text is needed")
    return text


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
