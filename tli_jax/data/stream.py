"""One stream of token ids per source: tokenized once into a file that is memory-mapped from then on."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tli_jax.cli.config import Recipe
from tli_jax.cli.progress import progress
from tli_jax.data.documents import Documents
from tli_jax.data.formats import CHUNK
from tli_jax.data.sources import Found, find_files
from tli_jax.errors import DataError, MissingInputError
from tli_jax.hf.encoding import Tokenizer

_PIECE = 2**16  # characters from which on a document is encoded in pieces
_NEAR = 1000  # characters on either side that tell whether it may be cut
_CUT = re.compile(r"(?<=\w)(?=\s\w)")
_BATCH = 2**21  # characters that are encoded at a time


@dataclasses.dataclass(frozen=True)
class Stream:
    """Token ids of a whole source.

    Attributes:
        ids: ``[N]``, unsigned or signed integers, memory-mapped.
        starts: ``[documents]`` int64, ascending: where in ``ids`` each document starts. Empty if nothing tells.
        digest: sha256 of the source's files, see ``digest_files``.
        notes: what was left out, one line each.
    """

    path: Path
    ids: np.ndarray
    starts: np.ndarray
    digest: str
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """How documents become token ids.

    Attributes:
        bos, eos: ids in front of and behind each document.
        tokenizer_digest: of the files that the tokenizer was made of.
    """

    config: Recipe
    tokenizer: Tokenizer | None
    tokenizer_digest: str
    vocab_size: int
    bos: int | None
    eos: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of ids in the cache: the smaller one that holds the vocabulary."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def to_json(self) -> dict[str, Any]:
        """All that the ids depend on, but for the source."""
        config = {key: getattr(self.config, key) for key in ("separator", "field", "on_bad", "special_tokens")}
        return config | {
            "version": 3,
            "tokenizer": self.tokenizer_digest,
            "bos": self.bos,
            "eos": self.eos,
            "dtype": str(self.dtype),
        }


def open_stream(path: Path, rules: Rules, cache: Path, known: str | None = None) -> Stream:
    """The token ids of a source: from the cache, or tokenized into it; ``.npy`` is used as it is.

    In a ``.npy`` a document starts at each BOS, or after each EOS where the model has no BOS.

    Args:
        known: digest of the source when it was last read. If the source is gone, its tokens in the cache still serve.

    Raises:
        MissingInputError, DataError, UsageError: see ``Documents``; also ids that the model does not have, and text
            without a tokenizer.
    """
    is_gone = known is not None and path.suffix != ".npy" and not path.exists()
    found = Found([], []) if is_gone else find_files(path)
    digest = known if known is not None and is_gone else digest_files(path, found.files)
    if path.suffix == ".npy":
        ids, starts = _open_npy(path, rules)
        return Stream(path, ids, starts, digest)
    if rules.tokenizer is None:
        raise DataError(f"{path}: the model has no tokenizer, so text cannot be read: give token ids, as .npy")
    key = rules.to_json() | {"source": digest}
    name = _sha256(key)[:32]
    files = {what: cache / f"{name}.{what}" for what in ("ids", "starts", "json")}
    cache.mkdir(parents=True, exist_ok=True)
    # Processes on one machine: the first one tokenizes, the others find it done.
    with _locked(cache):
        record = _read_record(files, key)
        if record is None:
            if is_gone:
                raise MissingInputError(f"{path}: no such file or folder, and its tokens are not in {cache}")
            record = {"key": key}
            with _replacing(files["ids"]) as output, _replacing(files["starts"]) as starts_output:
                record |= _tokenize(Documents(path, rules.config), rules, output, starts_output)
            with _replacing(files["json"]) as output:
                output.write(json.dumps({"record": record, "sha256": _sha256(record)}, indent=1).encode())
    notes = (*found.notes, *_describe(path, record))
    if is_gone:
        notes = (f"{path}: is gone, so the run goes on with its tokens in {cache}", *notes)
    ids, starts = np.memmap(files["ids"], rules.dtype, "r"), np.memmap(files["starts"], np.int64, "r")
    return Stream(path, ids, starts, digest, notes)


def guess_tokens(path: Path, rules: Rules, sample: int) -> int:
    """About how many tokens a source has, by what its first ``sample`` characters give; of token ids, exactly.

    Raises:
        MissingInputError, DataError, UsageError: see ``open_stream``, of what is read.
    """
    if path.suffix == ".npy":
        return len(_open_npy(path, rules)[0])
    assert rules.tokenizer is not None
    documents, found, seen = Documents(path, rules.config), 0, 0
    for text in documents:
        found += len(rules.tokenizer.encode(text[:sample]))
        seen += len(text[:sample].encode())
        if seen >= sample:
            # Of a document that is longer than the sample, only that much has been looked at.
            return max(found, int(found / seen * documents.nbytes))
    return found


def digest_files(path: Path, files: Iterable[Path]) -> str:
    """sha256 over the files of a source: the bytes of each, with its name relative to the source.

    Of a source that is one file, only the suffixes of its name count: it may move.
    """
    total = hashlib.sha256()
    for file in files:
        name = "".join(file.suffixes[-2:]) if file == path else file.relative_to(path).as_posix()
        total.update(json.dumps([name, _digest(file)]).encode())
    return total.hexdigest()


def _open_npy(path: Path, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and where documents start."""
    try:
        # Not np.load: it opens zip files too, whatever they are called.
        ids = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy hands a damaged header to Python's tokenizer and parser
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]}): write it again") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise DataError(f"{path}: is {ids.dtype} {list(ids.shape)}, must be one row of whole numbers, token ids")
    starts = [np.zeros(0, np.int64)]
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        wrong = (part < 0) | (part >= rules.vocab_size)
        if wrong.any():
            at = start + int(wrong.argmax())
            raise DataError(f"{path}: id {ids[at]} at position {at:,}, the model's vocabulary has {rules.vocab_size:,}")
        if rules.bos is not None:
            starts.append(start + np.flatnonzero(part == rules.bos))
        elif rules.eos is not None:
            starts.append(start + np.flatnonzero(part == rules.eos) + 1)
    return ids, np.concatenate(starts)


def _tokenize(documents: Documents, rules: Rules, output: BinaryIO, starts_output: BinaryIO) -> dict[str, Any]:
    """Write the ids of all documents and where each starts; returns what the record says of them."""
    assert rules.tokenizer is not None
    encode = rules.tokenizer.encode
    front = [] if rules.bos is None else [rules.bos]
    behind = [] if rules.eos is None else [rules.eos]
    special = re.compile("|".join(map(re.escape, rules.tokenizer.special_as_text)) or "(?!)")
    seen: collections.Counter[str] = collections.Counter()
    tokens, shown, digests = 0, 0, {"ids": hashlib.sha256(), "starts": hashlib.sha256()}
    with progress(f"tokens of {documents.path.name}", documents.nbytes) as advance:
        pieces = ((part, text) for document in documents for part, text in _cut(document, encode))
        for batch in _batched(pieces):
            ids: list[int] = []
            starts: list[int] = []
            texts = [text for _, text in batch]
            seen.update(found[0] for text in texts if (found := special.search(text)))
            for (part, _), some in zip(batch, rules.tokenizer.encode_batch(texts), strict=True):
                starts += [tokens + len(ids)] if "first" in part else []
                ids += (front if "first" in part else []) + some + (behind if "last" in part else [])
            for what, file, values in (
                ("ids", output, np.array(ids, rules.dtype)),
                ("starts", starts_output, np.array(starts, np.int64)),
            ):
                file.write(values.tobytes())
                digests[what].update(values.tobytes())
            tokens += len(ids)
            advance(documents.done - shown)
            shown = documents.done
    counts = {"documents": documents.count, "empty": documents.empty, "bad": documents.bad}
    counts |= {"notes": [*documents.notes]}
    if seen:
        (token, _), *_ = seen.most_common(1)
        counts["notes"].append(
            f"{documents.path}: special tokens such as {token!r} occur in {seen.total():,} places or more and are read"
            " as text: special_tokens=parse turns them into their ids"
        )
    places = [place.removeprefix(f"{documents.path}").lstrip("/: ") for place in documents.places]
    if not tokens:
        raise DataError(f"{documents.path}: the tokenizer turns all of it into nothing: give another text")
    return {"tokens": tokens, "sha256": {k: v.hexdigest() for k, v in digests.items()}} | counts | {"places": places}


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


def _cut(text: str, encode: Callable[[str], list[int]]) -> Iterator[tuple[str, str]]:
    """A document in pieces whose ids, put together, are its own: encoding needs 150 times the memory of a text.

    It is cut in front of the space between two words, and only where the ids nearby show that the tokenizer cuts there
    too. Some never do (they put a space in front of any text), and then the document stays whole.
    """
    start, part = 0, "first"
    while len(text) - start > 2 * _PIECE:
        for found in itertools.islice(_CUT.finditer(text, start + _PIECE), 20):
            at = found.start()
            before, after = text[at - _NEAR : at], text[at : at + _NEAR]
            if encode(before + after) == encode(before) + encode(after):
                break
        else:
            break
        yield part, text[start:at]
        start, part = at, ""
    yield part + " last", text[start:]


def _read_record(files: Mapping[str, Path], key: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a cache entry, None where there is none or it is damaged."""
    if not all(file.is_file() for file in files.values()):
        return None
    try:
        with files["json"].open("rb") as opened:
            document = json.loads(opened.read(CHUNK))
        record = document["record"]
        sizes = {"ids": record["tokens"] * np.dtype(key["dtype"]).itemsize, "starts": record["documents"] * 8}
        is_whole = (
            document["sha256"] == _sha256(record)
            and record["key"] == key
            and all(files[what].stat().st_size == size for what, size in sizes.items())
            and all(_digest(files[what]) == record["sha256"][what] for what in sizes)
        )
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if is_whole else None


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _describe(path: Path, record: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if record["bad"]:
        kinds = ", ".join(f"{count:,} × {reason}" for reason, count in record["bad"].items())
        notes.append(f"{path}: {sum(record['bad'].values()):,} left out ({kinds}): {'; '.join(record['places'])}")
    if record["empty"]:
        notes.append(f"{path}: {record['empty']:,} empty documents left out")
    return tuple(notes + [f"{path}: {note}" for note in record["notes"]])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """A file that is whole or not there. Its temporary name is this machine's own, so a killed one is written over."""
    partial = file.with_name(f".{file.name}.{platform.node()}.partial")
    try:
        with partial.open("wb") as output:
            yield output
            output.flush()
            os.fsync(output.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
