"""Files of a model folder, read as what they are: files that anyone may have written. Faults raise ``DataError``."""

import collections
import json
import math
import os
from pathlib import Path
from typing import Any

from tli_jax.errors import DataError

# 4 MiB of JSON describe 25,000 tensors; the most expensive such text takes 110 MB to parse.
MAX_JSON = 4 * 2**20
_MAX_DEPTH = 100  # levels of nesting; JSON that is nested deeper can be read, but not written again


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object. Duplicate keys, ``NaN`` and ``Infinity`` are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            duplicate = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{where}: key {duplicate!r} appears twice")
        return content

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise DataError(f"{where}: contains the number {text[:20]}, which is not finite: fix it")
        return number

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: is {type(content).__name__}, must be a JSON object")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file, unless it is too large or nested too deeply for one of a model folder."""
    size = file.stat().st_size
    if size > MAX_JSON:
        raise DataError(f"{file}: has {size:,} bytes, the limit is {MAX_JSON:,}: download it again")
    content = parse_json(file.read_bytes(), str(file))
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in children if isinstance(child, dict | list)]
    if level:
        raise DataError(f"{file}: is nested more than {_MAX_DEPTH} levels deep: fix it")
    return content


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Links out of the folder are errors, except into the hub's cache of blobs."""
    file = folder / name
    root = folder.resolve()
    target = Path(os.path.realpath(file))  # Path.resolve raises on circular links
    allowed = [root / Path(name).parent]
    if root.parent.name == "snapshots":
        # The blobs of this model, or the cache's shared ones, which are one folder deeper.
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs" / target.parent.name]
    if target.parent not in allowed:
        raise DataError(f"{file}: links to {target}, outside the folder: copy the file into the folder")
    if file.exists() and not file.is_file():
        raise DataError(f"{file}: is not a regular file")
    return file


def refuse_failed_download(file: Path, head: bytes, expected: str) -> None:
    """Refuse a file whose first 128 bytes, ``head``, are those of a Git-LFS pointer or an HTML page."""
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: is a Git-LFS pointer, not {expected}: run 'git lfs pull' in its folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{file}: is an HTML page, not {expected}: the download failed, download it again")
