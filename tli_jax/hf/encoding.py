"""A tokenizer that is loaded: texts to ids and back, whichever library does it."""

import abc
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tli_jax.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """Text to ids and back. No special tokens are added; special tokens in the ids do not appear in decoded text.

    Attributes:
        size: one more than the largest id.
        prefix: ids that the tokenizer puts in front of a text by default: BOS, or nothing.
        special_as_text: special tokens that are text like any other in a text; none if they are parsed.
    """

    @property
    def size(self) -> int: ...
    @property
    def prefix(self) -> list[int]: ...
    @property
    def special_as_text(self) -> list[str]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...


class Loaded(abc.ABC):
    """What both kinds of tokenizers have in common: no id outside the model's vocabulary gets out.

    Attributes:
        vocab: ids of all tokens.
        added: ids of tokens that are found in a text before it is split into tokens.
        named: special tokens by their key, such as ``bos_token``.
        prefix, suffix: ids that are put around a text by default.
        special_as_text: see ``Tokenizer``.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        vocab: dict[str, int],
        added: "Mapping[int, tokenizers.AddedToken]",
        parse_special: bool,
    ):
        self.folder, self.vocab_size, self.vocab, self.added = folder, vocab_size, vocab, set(added)
        special = sorted(token.content for token in added.values() if token.special)
        self.special_as_text = [] if parse_special else special
        self.size = 1 + max(vocab.values(), default=-1)
        self.named: dict[str, str] = {}
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        # Not every tokenizer can encode an "a".
        for text in itertools.islice(itertools.chain("aA0", vocab), 1000):
            with contextlib.suppress(DataError):
                ids = self.encode(text)
                if ids and (affixes := self._affixes(text, ids)) is not None:
                    self.prefix, self.suffix = affixes
                    break

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with refusing(f"{self.folder}: the tokenizer cannot encode the text", "use another text or tokenizer"):
            found = self._encode(texts)
        if self.size > self.vocab_size:
            for text, ids in zip(texts, found, strict=True):
                if (largest := max(ids, default=0)) >= self.vocab_size:
                    token = next(token for token, index in self.vocab.items() if index == largest)
                    raise DataError(
                        f"{self.folder}: the text {text[:40]!r} holds {token!r}, id {largest:,}, which the model's"
                        f" vocabulary of {self.vocab_size:,} does not have: remove it from the text"
                    )
        return found

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        """What stands before and after the ids of a text; None if this text does not tell."""


class RustTokenizer(Loaded):
    """A tokenizer of the tokenizers library, read by it or built by transformers."""

    def __init__(self, folder: Path, vocab_size: int, tokenizer: "tokenizers.Tokenizer", parse_special: bool):
        # transformers, too, drops what another tool left in the file.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not parse_special
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        super().__init__(folder, vocab_size, tokenizer.get_vocab(), added, parse_special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        whole = self._tokenizer.encode(text, add_special_tokens=True)
        if 0 not in whole.special_tokens_mask:
            return None
        first = whole.special_tokens_mask.index(0)
        return whole.ids[:first], whole.ids[first + len(ids) :]

    def parsed_anyway(self) -> list[str]:
        """Special tokens that the vocabulary itself finds in a text, but for the one that stands for unknown text."""

        def encode(text: str) -> list[int]:
            with contextlib.suppress(DataError):
                return self.encode(text)
            return []

        unknown = {*encode("\U0010fffd"), self.vocab.get(self.named.get("unk_token", ""))}
        special = self.special_as_text
        return [token for token in special if (i := self.vocab[token]) not in unknown and i in encode(token)]


class PythonTokenizer(Loaded):
    """One of the few tokenizers that transformers has in Python alone, such as bytes."""

    def __init__(self, folder: Path, vocab_size: int, tokenizer: Any, parse_special: bool):
        if not parse_special:
            tokenizer.split_special_tokens = True
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        super().__init__(folder, vocab_size, tokenizer.get_vocab(), added, parse_special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]

    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        whole = self._tokenizer.encode(text, verbose=False)
        for first in range(len(whole)):
            if whole[first : first + len(ids)] == ids:
                return whole[:first], whole[first + len(ids) :]
        return None


@contextlib.contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a DataError: bare exceptions, and panics of Rust, which are no Exception.

    Raises:
        DataError: always, in place of what was raised.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = " ".join(str(error).split())[:160]
        raise DataError(f"{what} ({message}): {advice}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off stderr what Rust writes there about a panic, and what transformers logs while it loads."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
