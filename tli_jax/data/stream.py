"""One stream of token ids per source: prepared, or tokenized once into the cache, and then memory-mapped."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.data.documents import Documents
from tli_jax.data.shards import Prepared, Shard, Writer, is_prepared, sha256_json
from tli_jax.data.sources import Found, find_files
from tli_jax.data.tokenization import Rules, tokenize
from tli_jax.errors import DataError, MissingInputError, TliError
from tli_jax.hf.files import fsync, lock, sha256_file

_CHUNK = 2**20  # ids checked at a time


@dataclasses.dataclass(frozen=True)
class Stream:
    """The token ids of a source, in shards that are read as one.

    Attributes:
        digest: sha256 of the source's files, see ``digest_files``.
        notes: one line for each thing that was skipped.
    """

    path: Path
    shards: tuple[Shard, ...]
    digest: str
    vocab_size: int
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard.ids) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids from ``start`` up to ``end`` or the end of the stream, int32, and whether a document starts at each.

        Raises:
            DataError: prepared data is damaged: the model does not have an id, or a start is out of place.
        """
        end = min(end, len(self))
        ids, is_start = np.empty(end - start, np.int32), np.zeros(end - start, bool)
        number = int(np.searchsorted(self._ends, start, side="right"))
        done, is_damaged = 0, False
        while done < len(ids):
            shard = self.shards[number]
            first = start + done - (int(self._ends[number]) - len(shard.ids))
            part = shard.ids[first : first + len(ids) - done]
            ids[done : done + len(part)] = part
            here = shard.starts[slice(*np.searchsorted(shard.starts, (first, first + len(part))))] - first
            is_damaged |= ((here < 0) | (here >= len(part))).any() or part.max() >= self.vocab_size
            if not is_damaged:
                is_start[done + here] = True
            done, number = done + len(part), number + 1
        if is_damaged:
            raise DataError(
                f"{self.path}: is damaged between tokens {start:,} and {end:,}: find the shard with --verify"
            )
        return ids, is_start


def open_stream(
    path: Path,
    rules: Rules,
    cache: Path,
    known_digest: str | None = None,
    *,
    is_checked: bool = False,
    verify: bool = False,
) -> Stream:
    """Open the token ids of a source: prepared, from the cache, or tokenized into it. A ``.npy`` file is used directly.

    In a ``.npy`` file a document starts at each BOS, or after each EOS if the model has no BOS.

    Args:
        known_digest: digest of the source when it was last read. If the source is gone, the cache is searched for it.
        is_checked: another process has just computed ``known_digest`` and checked the cache, so neither the source nor
            the cache is hashed.
        verify: hash prepared data, and the cache in any case.

    Raises:
        MissingInputError, DataError, UsageError: see ``Documents`` and ``Prepared``. Also: ids that the model does not
            have, text without a tokenizer, or a source that is not the one of ``is_checked``.
    """

    def check(digest: str) -> str:
        if is_checked and digest != known_digest:
            raise DataError(
                f"{path}: differs from the one that the first process reads: give all machines the same data"
            )
        return digest

    if is_prepared(path):
        prepared = Prepared.open(path, rules)
        if verify:
            prepared.verify(path.name)
        return _stream(path, prepared, check(prepared.digest), rules)
    is_npy = path.suffix == ".npy"
    is_gone = known_digest is not None and not is_npy and not path.exists()
    found = Found([], []) if is_gone else find_files(path)
    if is_npy:
        shard = _open_npy(path, rules)
        note = f"warning: {path}: no BOS or EOS among these ids, so they count as one document"
        notes = () if len(shard.starts) else (note,)
        return Stream(path, (shard,), check(digest_files(path, found.files)), rules.vocab_size, notes)
    if rules.tokenizer is None:
        raise DataError(f"{path}: the model has no tokenizer, so text cannot be read: give token ids as .npy")
    digest = known_digest if known_digest and (is_gone or is_checked) else digest_files(path, found.files)
    entry = cache / sha256_json(rules.to_json() | {"source": digest})[:32]
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache):  # one process of a machine tokenizes, the others find the result
        try:
            prepared = Prepared.open(entry, rules)
            if verify or not is_checked:
                prepared.verify(path.name)
        except TliError as error:
            if is_gone:
                state = "missing" if isinstance(error, MissingInputError) else "damaged"
                raise MissingInputError(
                    f"{path}: no such file or folder, and its token ids, {entry}, are {state}: restore one of them, or"
                    " prepared data of the same text"
                ) from None
            check(digest if not is_checked else digest_files(path, found.files))
            with _replaced(entry) as folder, Writer(folder, rules) as writer:
                facts = tokenize(Documents(path, rules.config), rules, writer.write)
                writer.finish([{"path": str(path), "digest": digest} | facts], {})
            prepared = Prepared.open(entry, rules)
    gone = (f"{path}: no longer exists, so its token ids in {cache} are used",) * is_gone
    return _stream(path, prepared, digest, rules, (*gone, *found.notes))


def _stream(path: Path, prepared: Prepared, digest: str, rules: Rules, notes: tuple[str, ...] = ()) -> Stream:
    sources = prepared.manifest["sources"]
    described = [note for source in sources for note in describe(path if len(sources) == 1 else source["path"], source)]
    return Stream(path, prepared.shards(), digest, rules.vocab_size, (*notes, *described))


@contextlib.contextmanager
def _replaced(entry: Path) -> Iterator[Path]:
    """A folder that replaces an entry of the cache, which is missing or damaged, when the block succeeds."""
    # Machines may share the cache on a file system without locks, so each writes to a folder of its own.
    folder = entry.with_name(f".{entry.name}.{platform.node()}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            fsync(path)
        shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def estimate_tokens(path: Path, rules: Rules, sample: int) -> int:
    """Estimate the tokens of a source from its first ``sample`` characters. It is exact for token ids.

    Raises:
        MissingInputError, DataError, UsageError: see ``open_stream``.
    """
    if path.suffix == ".npy":
        return len(_open_npy(path, rules).ids)
    if is_prepared(path):
        return Prepared.open(path, rules).manifest["tokens"]
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


def _open_npy(path: Path, rules: Rules) -> Shard:
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
    return Shard(ids, np.concatenate(starts))


def describe(path: Path | str, record: dict[str, Any]) -> list[str]:
    """One line for each thing that was skipped or may surprise, from the counts and notes of ``tokenize``."""
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
