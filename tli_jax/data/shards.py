"""Token ids on disk: a folder of shards, and a manifest that describes them.

::

    FOLDER/manifest.json   rules, sources, the size and SHA-256 of every shard, and the SHA-256 of all this
    FOLDER/00000.ids       token ids of the first shard, without a header
    FOLDER/00000.starts    int64: positions in this shard at which documents start

The shards are one stream, so a document may continue in the next shard. ``tli-jax prepare`` writes such a folder, and
the cache of a run contains one for each source of plain text.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tli_jax.cli.progress import progress
from tli_jax.data.tokenization import Rules
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.hf.files import sha256_file

MANIFEST = "manifest.json"
FIRST_SHARD = "00000.ids"
SHARD_BYTES = 2**30  # of ids, by default
_FORMAT, _VERSION = "tli_jax prepared data", 1
_MAX_MANIFEST = 2**26  # bytes; a shard takes about 300
_SUFFIXES = ("ids", "starts")
_MAX_NAMED = 5  # missing files in a message
_AGAIN = "copy the folder again, or prepare the text again"


class Shard(NamedTuple):
    """Memory-mapped arrays: token ids, and int64 positions in them at which documents start, ascending."""

    ids: np.ndarray
    starts: np.ndarray


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Writes a stream of token ids as shards of at most ``limit`` tokens to a folder. Call ``finish`` at the end.

    Attributes:
        shards: number of tokens and documents, and SHA-256, of each shard so far.
    """

    def __init__(self, folder: Path, rules: Rules, limit: int | None = None):
        self._folder, self._rules = folder, rules
        self._limit = limit or SHARD_BYTES // rules.dtype.itemsize
        self.shards: list[dict[str, Any]] = []
        self._files: dict[str, BinaryIO] = {}
        self._waiting = np.zeros(0, np.int64)  # starts of documents whose first token is yet to come
        self._largest = 0

    def write(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append ids, and the positions among them at which documents start."""
        starts = np.concatenate([self._waiting, starts])
        self._largest = max(self._largest, int(ids.max(initial=0)))
        while len(ids):
            if not self.shards or self.shards[-1]["tokens"] == self._limit:
                self._next_shard()
            shard = self.shards[-1]
            count = min(len(ids), self._limit - shard["tokens"])
            here = int(np.searchsorted(starts, count))
            self._append(ids[:count], starts[:here])
            ids, starts = ids[count:], starts[here:] - count
        self._waiting = starts

    def finish(self, sources: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        """Complete the shards and write the manifest.

        Args:
            sources: what ``tokenize`` returned for each source, with its path and digest.
            facts: further content of the manifest.
        """
        if len(self._waiting):
            self._append(np.zeros(0, self._rules.dtype), self._waiting)
        self._close()
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            **facts,
            "tokens": sum(source["tokens"] for source in sources),
            "documents": sum(source["documents"] for source in sources),
            "largest_id": self._largest,
            "rules": self._rules.to_json(),
            "sources": sources,
            "shards": self.shards,
        }
        manifest["sha256"] = sha256_json(manifest)
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for suffix, file in self._files.items():
            file.close()
            self.shards[-1]["sha256"][suffix] = self._digests[suffix].hexdigest()
        self._files = {}

    def _next_shard(self) -> None:
        self._close()
        number = len(self.shards)
        self._files = {suffix: (self._folder / f"{number:05}.{suffix}").open("wb") for suffix in _SUFFIXES}
        self._digests = {suffix: hashlib.sha256() for suffix in _SUFFIXES}
        self.shards.append({"tokens": 0, "documents": 0, "sha256": {}})

    def _append(self, ids: np.ndarray, starts: np.ndarray) -> None:
        shard = self.shards[-1]
        for suffix, array in (("ids", ids), ("starts", starts + shard["tokens"])):
            self._files[suffix].write(array.tobytes())
            self._digests[suffix].update(array.tobytes())
        shard["tokens"] += len(ids)
        shard["documents"] += len(starts)


def is_prepared(path: Path) -> bool:
    """Whether a source is a folder of prepared data, possibly a damaged one."""
    file = path / MANIFEST
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return (path / FIRST_SHARD).exists() or _FORMAT.encode() in opened.read(64)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A folder of shards whose manifest and sizes have been checked.

    Attributes:
        digest: of the text: that of its only source, or sha256 over those of all.
    """

    folder: Path
    manifest: dict[str, Any]
    digest: str
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, folder: Path, rules: Rules) -> "Prepared":
        """Open a folder. This reads the manifest and the sizes of all files, not their content.

        Raises:
            MissingInputError: the manifest or shards are missing.
            DataError: the manifest is damaged, a shard has another size, or an id is outside the model's vocabulary.
            UsageError: the folder was prepared with other rules.
        """
        try:
            manifest = _read_manifest(folder / MANIFEST)
            _check_rules(folder, manifest, rules)
            digests = [source["digest"] for source in manifest["sources"]]
            prepared = cls(folder, manifest, digests[0] if len(digests) == 1 else sha256_json(digests), rules.dtype)
            prepared._check_sizes()
        except (TypeError, LookupError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST}: is damaged ({error!r}): {_AGAIN}") from None
        return prepared

    def shards(self) -> tuple[Shard, ...]:
        """Map all shards into memory."""

        def open_map(number: int, suffix: str, dtype: Any, length: int) -> np.ndarray:
            # An empty file cannot be mapped.
            return np.memmap(self._file(number, suffix), dtype, "r") if length else np.zeros(0, dtype)

        return tuple(
            Shard(
                open_map(number, "ids", self.dtype, shard["tokens"]),
                open_map(number, "starts", np.int64, shard["documents"]),
            )
            for number, shard in enumerate(self.manifest["shards"])
        )

    def verify(self, name: str) -> None:
        """Hash all files.

        Args:
            name: of the source, for the progress.

        Raises:
            DataError: a file has changed.
        """
        recorded = {
            self._file(number, suffix): digest
            for number, shard in enumerate(self.manifest["shards"])
            for suffix, digest in shard["sha256"].items()
        }
        total = sum(file.stat().st_size for file in recorded)
        with progress(f"verify {name}", total) as advance:

            def is_intact(file: Path) -> bool:
                digest = sha256_file(file)
                advance(file.stat().st_size)
                return digest == recorded[file]

            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                changed = [
                    file for file, intact in zip(recorded, pool.map(is_intact, recorded), strict=True) if not intact
                ]
        if changed:
            raise DataError(f"{changed[0]}: its content has changed, by its SHA-256 in {MANIFEST}: {_AGAIN}")

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05}.{suffix}"

    def _check_sizes(self) -> None:
        expected = {}
        for number, shard in enumerate(self.manifest["shards"]):
            expected[self._file(number, "ids")] = shard["tokens"] * self.dtype.itemsize
            expected[self._file(number, "starts")] = shard["documents"] * 8
        sizes = {file: file.stat().st_size if file.is_file() else None for file in expected}
        if missing := [file.name for file, size in sizes.items() if size is None]:
            more = f" and {len(missing) - _MAX_NAMED:,} more" if len(missing) > _MAX_NAMED else ""
            raise MissingInputError(f"{self.folder}: {', '.join(missing[:_MAX_NAMED])}{more} missing: {_AGAIN}")
        for file, size in expected.items():
            if sizes[file] != size:
                raise DataError(f"{file}: has {sizes[file]:,} bytes, must have {size:,}: {_AGAIN}")


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MissingInputError(f"{file}: is missing: {_AGAIN}")
    with file.open("rb") as opened:
        content = opened.read(_MAX_MANIFEST)
    try:
        manifest = json.loads(content)
        checksum = manifest.pop("sha256")
    except (ValueError, LookupError, AttributeError, RecursionError):
        raise DataError(f"{file}: is damaged: {_AGAIN}") from None
    if checksum != sha256_json(manifest):
        raise DataError(f"{file}: has changed, by the SHA-256 in it: {_AGAIN}")
    if (manifest["format"], manifest["version"]) != (_FORMAT, _VERSION):
        raise DataError(f"{file}: is in version {manifest['version']} of the format, not {_VERSION}: {_AGAIN}")
    return manifest


def _check_rules(folder: Path, manifest: dict[str, Any], rules: Rules) -> None:
    theirs, ours = manifest["rules"], rules.to_json()
    if other := [key for key in ours if theirs[key] != ours[key]]:
        parts = (f"{key} {_short(theirs[key])} (here {_short(ours[key])})" for key in other)
        raise UsageError(
            f"{folder}: was prepared with {', '.join(parts)}: use the tokenizer and the options that it was prepared"
            " with, or prepare the text again"
        )
    if (largest := manifest["largest_id"]) >= rules.vocab_size:
        raise DataError(
            f"{folder}: has the id {largest:,}, the model's vocabulary has {rules.vocab_size:,}: use the model that the"
            " text was prepared for"
        )


def _short(value: Any) -> str:
    """A value of the rules; of a digest its start."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
