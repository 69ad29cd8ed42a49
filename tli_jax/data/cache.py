"""The cache of tokenized sources. An entry is three files: token ids, document starts, and a record with digests."""

import contextlib
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.hf.files import replace_file, sha256_file

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
        with self.replace(self._json) as temporary:
            temporary.write_text(
                json.dumps({"record": record, "sha256": sha256_json(record)}, indent=1), encoding="utf-8"
            )
        return record

    @staticmethod
    def replace(file: Path) -> contextlib.AbstractContextManager[Path]:
        """``replace_file`` with a temporary name of this machine, so that machines do not share a partial file."""
        return replace_file(file, f"{platform.node()}.partial")


def sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
