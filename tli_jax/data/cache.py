"""The cache of tokenized sources. An entry is three files: token ids, document starts, and a record with digests."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MAX_RECORD = 2**20  # bytes


class CacheEntry:
    """The files of one key in a cache folder.

    Attributes:
        ids, starts: files of the arrays of ``Stream``, without a header.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.key = key
        name = sha256_json(key)[:32]
        self.ids, self.starts, self._json = (folder / f"{name}.{suffix}" for suffix in ("ids", "starts", "json"))

    def read_record(self) -> dict[str, Any] | None:
        """The record of the entry; None if the entry is missing or damaged."""
        if not all(file.is_file() for file in (self.ids, self.starts, self._json)):
            return None
        try:
            with self._json.open("rb") as opened:
                document = json.loads(opened.read(_MAX_RECORD))
            record = document["record"]
            sizes = {self.ids: record["tokens"] * np.dtype(self.key["dtype"]).itemsize}
            sizes[self.starts] = record["documents"] * 8
            is_intact = (
                document["sha256"] == sha256_json(record)
                and record["key"] == self.key
                and all(file.stat().st_size == size for file, size in sizes.items())
                and all(sha256_file(file) == record["sha256"][file.suffix[1:]] for file in sizes)
            )
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        return record if is_intact else None

    def write_record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Complete the entry. Returns the record: the key and the facts."""
        record = {"key": self.key} | facts
        with replacing(self._json) as output:
            output.write(json.dumps({"record": record, "sha256": sha256_json(record)}, indent=1).encode())
        return record


def sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for and hold the lock of a cache folder: one process of a machine tokenizes, the others find the result."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file that appears only once it is complete.

    The temporary name is unique to the machine, so the next run overwrites what a killed one left.
    """
    partial = file.with_name(f".{file.name}.{platform.node()}.partial")
    try:
        with partial.open("wb") as output:
            yield output
            output.flush()
            os.fsync(output.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
