"""Documents to token ids."""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tli_jax.cli.progress import progress
from tli_jax.cli.train_config import TextConfig
from tli_jax.data.documents import Documents
from tli_jax.errors import DataError
from tli_jax.hf.encoding import Tokenizer
from tli_jax.models.config import LlamaConfig

_PIECE = 2**16  # characters above which a document is encoded in pieces
_CONTEXT = 1000  # characters on either side that show whether a split changes the ids
_SPLIT = re.compile(r"(?<=\w)(?=\s\w)")
_BATCH = 2**21  # characters encoded at a time

Piece = tuple[str, str]  # ``(part, text)``, see ``split_document``


@dataclasses.dataclass(frozen=True)
class Rules:
    """How documents become token ids.

    Attributes:
        tokenizer_digest: digest of the tokenizer's files.
        bos, eos: ids before and after each document, if any.
    """

    config: TextConfig
    tokenizer: Tokenizer | None
    tokenizer_digest: str
    vocab_size: int
    bos: int | None
    eos: int | None

    @classmethod
    def of_model(
        cls, config: TextConfig, model: LlamaConfig, tokenizer: Tokenizer | None, tokenizer_digest: str
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


class Encoded(NamedTuple):
    """A batch of pieces as token ids.

    Attributes:
        ids: ``[N]``, in the dtype of the rules.
        starts: int64 positions in ``ids`` at which documents start.
        special: special tokens that are read as text, each counted once per piece.
    """

    ids: np.ndarray
    starts: np.ndarray
    special: dict[str, int]


EncodeAll = Callable[[Iterable[list[Piece]]], Iterable[Encoded]]


def encode(rules: Rules, batch: Sequence[Piece]) -> Encoded:
    """Encode pieces, with BOS before and EOS after each document."""
    assert rules.tokenizer is not None
    before = [] if rules.bos is None else [rules.bos]
    after = [] if rules.eos is None else [rules.eos]
    special = re.compile("|".join(map(re.escape, rules.tokenizer.special_as_text)) or "(?!)")
    texts = [text for _, text in batch]
    ids: list[int] = []
    starts: list[int] = []
    for (part, _), piece_ids in zip(batch, rules.tokenizer.encode_batch(texts), strict=True):
        starts += [len(ids)] if "first" in part else []
        ids += (before if "first" in part else []) + piece_ids + (after if "last" in part else [])
    counts = collections.Counter(match[0] for text in texts if (match := special.search(text)))
    return Encoded(np.array(ids, rules.dtype), np.array(starts, np.int64), dict(counts))


def tokenize(
    documents: Documents,
    rules: Rules,
    write: Callable[[np.ndarray, np.ndarray], None],
    encode_all: EncodeAll | None = None,
    batch_size: int = _BATCH,
) -> dict[str, Any]:
    """Write the ids of all documents and the positions at which they start.

    Args:
        write: called with the arrays of ``Encoded``, in order.
        encode_all: encodes batches of pieces, in order; by default one after the other, in this process.
        batch_size: characters per batch. The ids do not depend on it.

    Returns:
        Counts and notes.

    Raises:
        DataError: there are no tokens. See ``Documents`` for other errors.
    """
    assert rules.tokenizer is not None
    encode_all = encode_all or functools.partial(map, functools.partial(encode, rules))
    special: collections.Counter[str] = collections.Counter()
    tokens, shown = 0, 0
    with progress(f"tokenize {documents.path.name}", documents.nbytes) as advance:
        pieces = (piece for document in documents for piece in split_document(document, rules.tokenizer.encode))
        for encoded in encode_all(_batched(pieces, batch_size)):
            write(encoded.ids, encoded.starts)
            special.update(encoded.special)
            tokens += len(encoded.ids)
            advance(documents.done - shown)
            shown = documents.done
    if not tokens:
        raise DataError(f"{documents.path}: the tokenizer returns no tokens for it: give another text")
    notes = [*documents.notes]
    if special:
        (token, _), *_ = special.most_common(1)
        notes.append(
            f"special tokens such as {token!r} occur at least {special.total():,} times and are read as text:"
            " special_tokens=parse turns them into their ids"
        )
    return {
        "tokens": tokens,
        "documents": documents.count,
        "empty": documents.empty,
        "bad": documents.bad,
        "notes": notes,
        "places": [place.removeprefix(f"{documents.path}").lstrip("/: ") for place in documents.places],
    }


def _batched(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_document(text: str, encode: Callable[[str], list[int]]) -> Iterator[Piece]:
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
