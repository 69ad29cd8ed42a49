"""Loaded tokenizers: text to token ids and back, through tokenizers or transformers."""

import abc
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(abc.ABC):
    """Converts text to token ids and back. Encoding adds no special tokens; decoding skips them.

    Attributes:
        size: largest id plus one.
        vocab: id of every token.
        added: ids of the added tokens, which are matched before the text is split.
        named: special tokens by key, such as ``bos_token``.
        prefix, suffix: ids that the tokenizer puts before and after a text by default.
        special_as_text: special tokens that are encoded as ordinary text; empty if they are parsed.
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
        # Some tokenizers cannot encode an "a", so try until a text works.
        for text in itertools.islice(itertools.chain("aA0", vocab), 1000):
            with contextlib.suppress(DataError):
                ids = self.encode(text)
                if ids and (affixes := self._affixes(text, ids)) is not None:
                    self.prefix, self.suffix = affixes
                    break

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Raises DataError: a text cannot be encoded, or its ids are outside the model's vocabulary."""
        with as_data_error(f"{self.folder}: the tokenizer cannot encode the text", "use another text or tokenizer"):
            batch = self._encode(texts)
        if self.size > self.vocab_size:
            for text, ids in zip(texts, batch, strict=True):
                if (largest := max(ids, default=0)) >= self.vocab_size:
                    token = next(token for token, index in self.vocab.items() if index == largest)
                    raise DataError(
                        f"{self.folder}: the text {text[:40]!r} contains {token!r} with id {largest:,}, outside the"
                        f" model's vocabulary of {self.vocab_size:,}: remove it from the text"
                    )
        return batch

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        """Ids added before and after the ids of a text; None if this text does not show them."""


class RustTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, whether it or transformers built it."""

    def __init__(self, folder: Path, vocab_size: int, tokenizer: "tokenizers.Tokenizer", parse_special: bool):
        # The file may keep settings of whoever saved it. transformers resets these too.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not parse_special
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        super().__init__(folder, vocab_size, tokenizer.get_vocab(), added, parse_special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
        if 0 not in encoding.special_tokens_mask:
            return None
        first = encoding.special_tokens_mask.index(0)
        return encoding.ids[:first], encoding.ids[first + len(ids) :]

    def always_parsed(self) -> list[str]:
        """Special tokens that are parsed in any text because the vocabulary itself contains them.

        The unknown token is not one of them: other text maps to it as well.
        """

        def encode(text: str) -> list[int]:
            with contextlib.suppress(DataError):
                return self.encode(text)
            return []

        unknown = {*encode("\U0010fffd"), self.vocab.get(self.named.get("unk_token", ""))}
        special = self.special_as_text
        return [token for token in special if (i := self.vocab[token]) not in unknown and i in encode(token)]


class PythonTokenizer(Tokenizer):
    """A tokenizer that transformers implements in Python alone, such as one for bytes."""

    def __init__(self, folder: Path, vocab_size: int, tokenizer: Any, parse_special: bool):
        if not parse_special:
            tokenizer.split_special_tokens = True
        self._tokenizer = tokenizer
        super().__init__(folder, vocab_size, tokenizer.get_vocab(), tokenizer.added_tokens_decoder, parse_special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]

    def _affixes(self, text: str, ids: list[int]) -> tuple[list[int], list[int]] | None:
        full = self._tokenizer.encode(text, verbose=False)
        for first in range(len(full)):
            if full[first : first + len(ids)] == ids:
                return full[:first], full[first + len(ids) :]
        return None


@contextlib.contextmanager
def as_data_error(problem: str, advice: str) -> Iterator[None]:
    """Raise DataError in place of any error of the libraries, which raise bare exceptions and Rust panics."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = " ".join(str(error).split())[:160]
        raise DataError(f"{problem} ({message}): {advice}") from error


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard what Rust prints about a panic and what transformers logs while it loads."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:  # noqa: PTH123
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
