"""One stream of token ids per source: tokenized once into the cache, then memory-mapped."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.data.cache import CacheEntry
from tli_jax.data.documents import Documents
from tli_jax.data.sources import Found, find_files
from tli_jax.data.tokenization import Rules, tokenize
from tli_jax.errors import DataError, MissingInputError
from tli_jax.hf.files import lock, sha256_file

_CHUNK = 2**20  # ids checked at a time


@dataclasses.dataclass(frozen=True)
class Stream:
    """The token ids of a source.

    Attributes:
        ids: ``[N]``, any integer dtype, memory-mapped.
        starts: ``[documents]`` int64, ascending: positions in ``ids`` at which documents start. Empty if unknown.
        digest: sha256 of the source's files, see ``digest_files``.
        notes: one line for each thing that was skipped.
    """

    path: Path
    ids: np.ndarray
    starts: np.ndarray
    digest: str
    notes: tuple[str, ...] = ()


def open_stream(path: Path, rules: Rules, cache: Path, known_digest: str | None = None) -> Stream:
    """Open the token ids of a source: from the cache, or tokenized into it. A ``.npy`` file is used directly.

    In a ``.npy`` file a document starts at each BOS, or after each EOS if the model has no BOS.

    Args:
        known_digest: digest of the source when it was last read. If the source is gone, the cache is searched for it.

    Raises:
        MissingInputError, DataError, UsageError: see ``Documents``. Also: ids that the model does not have, or text
            without a tokenizer.
    """
    is_gone = known_digest is not None and path.suffix != ".npy" and not path.exists()
    found = Found([], []) if is_gone else find_files(path)
    digest = known_digest if known_digest is not None and is_gone else digest_files(path, found.files)
    if path.suffix == ".npy":
        ids, starts = _open_npy(path, rules)
        note = f"warning: {path}: no BOS or EOS among these ids, so they count as one document"
        return Stream(path, ids, starts, digest, () if len(starts) else (note,))
    if rules.tokenizer is None:
        raise DataError(f"{path}: the model has no tokenizer, so text cannot be read: give token ids as .npy")
    entry = CacheEntry(cache, rules.to_json() | {"source": digest})
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache):  # one process of a machine tokenizes, the others find the result
        record = entry.read_record()
        if record is None:
            if is_gone:
                raise MissingInputError(f"{path}: no such file or folder, and its tokens are not in {cache}")
            with (
                entry.replace(entry.ids) as ids_file,
                entry.replace(entry.starts) as starts_file,
                ids_file.open("wb") as output,
                starts_file.open("wb") as starts_output,
            ):
                facts = tokenize(Documents(path, rules.config), rules, output, starts_output)
            record = entry.write_record(facts)
    notes = [*found.notes, *_describe(path, record)]
    if is_gone:
        notes.insert(0, f"{path}: no longer exists, so its tokens in {cache} are used")
    ids, starts = np.memmap(entry.ids, rules.dtype, "r"), np.memmap(entry.starts, np.int64, "r")
    return Stream(path, ids, starts, digest, tuple(notes))


def estimate_tokens(path: Path, rules: Rules, sample: int) -> int:
    """Estimate the tokens of a source from its first ``sample`` characters. For token ids the count is exact.

    Raises:
        MissingInputError, DataError, UsageError: see ``open_stream``.
    """
    if path.suffix == ".npy":
        return len(_open_npy(path, rules)[0])
    assert rules.tokenizer is not None
    documents, tokens, nbytes = Documents(path, rules.config), 0, 0
    for text in documents:
        tokens += len(rules.tokenizer.encode(text[:sample]))
        nbytes += len(text[:sample].encode())
        if nbytes >= sample:
            return max(tokens, int(tokens / nbytes * documents.nbytes))
    return tokens


def digest_files(path: Path, files: Iterable[Path]) -> str:
    """sha256 over the files of a source: the bytes of each, and its name relative to the source.

    For a source that is one file, only the suffixes of its name count, so the file may move.
    """
    total = hashlib.sha256()
    for file in files:
        name = "".join(file.suffixes[-2:]) if file == path else file.relative_to(path).as_posix()
        total.update(json.dumps([name, sha256_file(file)]).encode())
    return total.hexdigest()


def _open_npy(path: Path, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Ids and the positions at which documents start."""
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # np.load would open zip files too, whatever their name
    except OSError:
        raise
    except Exception as error:  # numpy passes a damaged header to Python's own parser
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]}): write it again") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise DataError(f"{path}: is {ids.dtype} {list(ids.shape)}, must be a one-dimensional array of token ids")
    starts = [np.zeros(0, np.int64)]
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        wrong = (chunk < 0) | (chunk >= rules.vocab_size)
        if wrong.any():
            at = start + int(wrong.argmax())
            raise DataError(f"{path}: id {ids[at]} at position {at:,}, the model's vocabulary has {rules.vocab_size:,}")
        if rules.bos is not None:
            starts.append(start + np.flatnonzero(chunk == rules.bos))
        elif rules.eos is not None:
            starts.append(start + np.flatnonzero(chunk == rules.eos) + 1)
    return ids, np.concatenate(starts)


def _describe(path: Path, record: dict[str, Any]) -> list[str]:
    notes = []
    if record["bad"]:
        kinds = ", ".join(f"{count:,} × {reason}" for reason, count in record["bad"].items())
        total = sum(record["bad"].values())
        notes.append(f"{path}: skipped {_count(total, 'bad')} ({kinds}): {'; '.join(record['places'])}")
    if record["empty"]:
        notes.append(f"{path}: skipped {_count(record['empty'], 'empty')}")
    return notes + [f"{path}: {note}" for note in record["notes"]]


def _count(documents: int, kind: str) -> str:
    return f"{documents:,} {kind} document" + "s" * (documents != 1)
