"""What a folder of safetensors holds, from its headers and index alone, and nothing that does not add up.

Nothing is memory-mapped: a file that is cut while mapped kills the process.
"""

import collections
import dataclasses
import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tli_jax.errors import DataError, MissingInputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# JSON of 4 MiB describes 25,000 tensors; parsed, the worst of it takes 110 MB.
MAX_HEADER = 4 * 2**20
_MAX_DEPTH = 100  # of nested JSON: what is deeper than this could be read, but not written again
# Put in front of every name by torch.compile, DataParallel, Lightning, PEFT.
_PREFIX = re.compile(r"(?:_orig_mod\.|module\.|model\.|base_model\.model\.)+")
_FIRST_NAME = "model.embed_tokens.weight"
_SHARD_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where the bytes of one tensor lie. ``dtype`` is the safetensors code, ``start`` counts from the file's start."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, in the order of their bytes.

    Raises:
        DataError: the file is cut, has holes, overlaps, trailing bytes or duplicate keys, or is something else.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        refuse_pointer(file, head + stream.read(120), "the weights")
        if size < 8:
            raise DataError(f"{file}: {size} bytes are too few for a safetensors header: fetch the file again")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER:
            raise DataError(f"{file}: claims a header of {length:,} bytes, not a safetensors file of a model")
        if 8 + length > size:
            raise DataError(
                f"{file}: cut in the header, expected {8 + length:,} bytes or more, has {size:,}: fetch it again"
            )
        stream.seek(8)
        entries = parse_json(stream.read(length), f"{file}: header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise DataError(f"{file}: header: __metadata__ is {type(metadata).__name__}, must be an object")
    tensors = sorted(
        (_read_entry(file, 8 + length, name, entry) for name, entry in entries.items()),
        key=lambda t: (t.start, t.nbytes),
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise DataError(f"{file}: tensor {tensor.name!r} {what}, at byte {tensor.start:,} instead of {end:,}")
        end += tensor.nbytes
    if end != size:
        what = "is cut" if size < end else "has trailing bytes"
        raise DataError(f"{file}: {what}, expected {end:,} bytes, has {size:,}: fetch it again")
    return {tensor.name: tensor for tensor in tensors}


def refuse_pointer(file: Path, head: bytes, what: str) -> None:
    """Refuse what a failed download leaves in place of a file.

    Args:
        head: the first 128 bytes.
        what: what the file should be.

    Raises:
        DataError: it is a Git-LFS pointer or an HTML page.
    """
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: is a Git-LFS pointer, not {what}: run 'git lfs pull' in its folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{file}: is an HTML page, not {what}: the download failed, fetch it again")


def _read_entry(file: Path, data: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > 8 or start > end:
            raise ValueError
        itemsize = _SIZES[dtype]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{file}: header entry of tensor {name!r} is not understood: {reprlib.repr(entry)}") from None
    if math.prod(shape) * itemsize != end - start:
        raise DataError(f"{file}: tensor {name!r} of {dtype} {list(shape)} does not fill its {end - start:,} bytes")
    return Tensor(name, file, dtype, shape, data + start, end - start)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, and without ``NaN`` and ``Infinity``, which JSON does not have.

    Raises:
        DataError: it is not that.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{where}: key {twice!r} appears twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise DataError(f"{where}: has the number {text[:20]}, which is not finite: fix it")
        return number

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: is {type(found).__name__}, must be a JSON object")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        DataError: it is not that, or too large to be.
    """
    size = file.stat().st_size
    if size > MAX_HEADER:
        raise DataError(f"{file}: has {size:,} bytes, more than the {MAX_HEADER:,} that a model needs: fetch it again")
    found = parse_json(file.read_bytes(), str(file))
    level = [found]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise DataError(f"{file}: is nested more than {_MAX_DEPTH} deep: fix it")
    return found


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors of a model folder by name, and the names in its index that no shard has to hold."""

    tensors: dict[str, Tensor]
    absent: tuple[str, ...] = ()


def read_folder(folder: Path, may_be_absent: Callable[[str], bool] = lambda name: False) -> Folder:
    """All tensors of a model folder: one ``model.safetensors``, or the shards that its index names.

    Args:
        may_be_absent: whether the index may name a tensor that no shard holds.

    Raises:
        MissingInputError: there are no weights, or shards are missing (all are named).
        DataError: damaged, contradictory, only a pickle, or an index that leaves the folder.
    """
    if (folder / SINGLE).exists():
        return Folder(read_header(inside(folder, SINGLE)))
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        if pickles:
            raise DataError(
                f"{folder}: only pickled weights ({pickles[0]}), never opened here: convert them to safetensors first"
            )
        raise MissingInputError(f"{folder}: no weights, looked for {SINGLE} and {INDEX}")
    weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DataError(f"{folder / INDEX}: weight_map must be an object of tensor name → file name")
    names = sorted(set(weight_map.values()))
    if strange := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
        raise DataError(f"{folder / INDEX}: names the file {strange[0]!r}, not a plain name of a safetensors file")
    shards = {name: inside(folder, name) for name in names}
    missing = [name for name, file in shards.items() if not file.exists()]
    if missing:
        raise MissingInputError(f"{folder}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for file in shards.values():
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise DataError(f"{file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    absent = weight_map.keys() - tensors.keys()
    spare = {name for name in absent if may_be_absent(name)}
    _refuse(f"{folder / INDEX}: names tensors that the shards lack", absent - spare)
    _refuse(f"{folder / INDEX}: does not name tensors that the shards hold", tensors.keys() - weight_map.keys())
    misplaced = {name for name, tensor in tensors.items() if tensor.file != shards[weight_map[name]]}
    _refuse(f"{folder / INDEX}: names the wrong shard for tensors", misplaced)
    return Folder(tensors, tuple(sorted(spare)))


def strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors without what a wrapper of the model put in front of all their names, and that prefix or ""."""
    found = next((name for name in tensors if name.endswith(_FIRST_NAME)), _FIRST_NAME)
    prefix = found.removesuffix(_FIRST_NAME)
    if not _PREFIX.fullmatch(prefix) or not all(name.startswith(prefix) for name in tensors):
        return tensors, ""
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: dataclasses.replace(tensor, name=name) for name, tensor in short.items()}, prefix


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which must lie in the folder; a hub snapshot may link to its own blobs.

    Raises:
        DataError: it is a link to elsewhere, or no file.
    """
    file = folder / name
    home = folder.resolve()
    target = Path(os.path.realpath(file))  # where links go in circles, Path.resolve raises
    allowed = [home / Path(name).parent]
    if home.parent.name == "snapshots":
        # The hub's cache: blobs of this model, or those that models share, one folder deeper.
        repository = home.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs" / target.parent.name]
    if target.parent not in allowed:
        raise DataError(f"{file}: is a link out of the folder, to {target}: copy the file in")
    if file.exists() and not file.is_file():
        raise DataError(f"{file}: is not a regular file")
    return file


def _refuse(what: str, names: Iterable[str], more: str = "") -> None:
    names = list(names)
    if names:
        raise DataError(f"{what}: {_list(names)}{more}")


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({len(names)} in all)"


def check_names(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Refuse missing and unknown tensors, wrong shapes and dtypes that are not understood.

    Raises:
        DataError: the first five of each and the count.
    """
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    beside = f"; the weights have instead {_list(unknown)}" if unknown else ""
    _refuse(f"{where}: tensors that the configuration asks for are missing", missing, beside)
    _refuse(f"{where}: tensors that a Llama of this configuration does not have", unknown)

    def list_all(what: str, wrong: Callable[[str], bool], say: Callable[[str], str]) -> None:
        _refuse(f"{where}: {what}", [f"{name} {say(name)}" for name in expected if wrong(name)])

    list_all(
        "shapes disagree with config.json",
        lambda name: tensors[name].shape != expected[name],
        lambda name: f"is {list(tensors[name].shape)} instead of {list(expected[name])}",
    )
    list_all(
        f"dtypes other than {', '.join(DTYPES)} are not supported",
        lambda name: tensors[name].dtype not in DTYPES,
        lambda name: f"is {tensors[name].dtype}",
    )
