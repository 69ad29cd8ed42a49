"""Documents to token ids."""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from tli_jax.cli.progress import progress
from tli_jax.cli.train_config import Reading
from tli_jax.data.documents import Documents
from tli_jax.errors import DataError
from tli_jax.hf.encoding import Tokenizer
from tli_jax.models.config import LlamaConfig

_PIECE = 2**16  # characters above which a document is encoded in pieces
_CONTEXT = 1000  # characters on either side that show whether a split changes the ids
_SPLIT = re.compile(r"(?<=\w)(?=\s\w)")
_BATCH = 2**21  # characters encoded at a time


@dataclasses.dataclass(frozen=True)
class Rules:
    """How documents become token ids.

    Attributes:
        tokenizer_digest: digest of the tokenizer's files.
        bos, eos: ids before and after each document, if any.
    """

    config: Reading
    tokenizer: Tokenizer | None
    tokenizer_digest: str
    vocab_size: int
    bos: int | None
    eos: int | None

    @classmethod
    def of_model(
        cls, config: Reading, model: LlamaConfig, tokenizer: Tokenizer | None, tokenizer_digest: str
    ) -> "Rules":
        """Raises DataError: BOS or EOS is outside the model's vocabulary."""
        bos = model.bos_token_id if config.bos else None
        eos = next(iter(model.eos_token_ids), None) if config.eos else None
        for name, i in (("bos", bos), ("eos", eos)):
            if i is not None and i >= model.vocab_size:
                raise DataError(f"config.json: {name}_token_id {i} is outside the vocabulary of {model.vocab_size:,}")
        return cls(config, tokenizer, tokenizer_digest, model.vocab_size, bos, eos)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype of the cache that holds all ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def to_json(self) -> dict[str, Any]:
        """Everything besides the source that ids depend on."""
        config = {key: getattr(self.config, key) for key in ("separator", "field", "on_bad", "special_tokens")}
        return config | {
            "version": 3,
            "tokenizer": self.tokenizer_digest,
            "bos": self.bos,
            "eos": self.eos,
            "dtype": str(self.dtype),
        }


def tokenize(documents: Documents, rules: Rules, output: BinaryIO, starts_output: BinaryIO) -> dict[str, Any]:
    """Write the ids of all documents and the position at which each starts.

    Returns:
        Counts, digests and notes for the cache's record.

    Raises:
        DataError: there are no tokens. See ``Documents`` for other errors.
    """
    assert rules.tokenizer is not None
    encode = rules.tokenizer.encode
    before = [] if rules.bos is None else [rules.bos]
    after = [] if rules.eos is None else [rules.eos]
    special = re.compile("|".join(map(re.escape, rules.tokenizer.special_as_text)) or "(?!)")
    special_counts: collections.Counter[str] = collections.Counter()
    tokens, shown, digests = 0, 0, {"ids": hashlib.sha256(), "starts": hashlib.sha256()}
    with progress(f"tokenize {documents.path.name}", documents.nbytes) as advance:
        pieces = (piece for document in documents for piece in split_document(document, encode))
        for batch in _batched(pieces):
            ids: list[int] = []
            starts: list[int] = []
            texts = [text for _, text in batch]
            special_counts.update(match[0] for text in texts if (match := special.search(text)))
            for (part, _), piece_ids in zip(batch, rules.tokenizer.encode_batch(texts), strict=True):
                starts += [tokens + len(ids)] if "first" in part else []
                ids += (before if "first" in part else []) + piece_ids + (after if "last" in part else [])
            for name, file, array in (
                ("ids", output, np.array(ids, rules.dtype)),
                ("starts", starts_output, np.array(starts, np.int64)),
            ):
                file.write(array.tobytes())
                digests[name].update(array.tobytes())
            tokens += len(ids)
            advance(documents.done - shown)
            shown = documents.done
    if not tokens:
        raise DataError(f"{documents.path}: the tokenizer returns no tokens for it: give another text")
    notes = [*documents.notes]
    if special_counts:
        (token, _), *_ = special_counts.most_common(1)
        notes.append(
            f"special tokens such as {token!r} occur at least {special_counts.total():,} times and are read as text:"
            " special_tokens=parse turns them into their ids"
        )
    return {
        "tokens": tokens,
        "sha256": {name: digest.hexdigest() for name, digest in digests.items()},
        "documents": documents.count,
        "empty": documents.empty,
        "bad": documents.bad,
        "notes": notes,
        "places": [place.removeprefix(f"{documents.path}").lstrip("/: ") for place in documents.places],
    }


def _batched(pieces: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_document(text: str, encode: Callable[[str], list[int]]) -> Iterator[tuple[str, str]]:
    """Split a long document into pieces whose ids, joined, are its own: encoding takes 150 times a text's memory.

    It splits before the space between two words, and only where the ids nearby show that the tokenizer splits there
    too. Some tokenizers never do (they put a space before any text). Their documents stay in one piece.

    Yields:
        ``(part, text)``, where ``part`` contains "first" or "last" if the document starts or ends with this piece.
    """
    start, part = 0, "first"
    while len(text) - start > 2 * _PIECE:
        for match in itertools.islice(_SPLIT.finditer(text, start + _PIECE), 20):
            at = match.start()
            left, right = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
            if encode(left + right) == encode(left) + encode(right):
                break
        else:
            break
        yield part, text[start:at]
        start, part = at, ""
    yield part + " last", text[start:]
