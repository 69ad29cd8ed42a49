"""The tensors of a folder of safetensors files, from headers and index alone; any contradiction is an error.

The safetensors library is not used: it memory-maps files, and a file truncated while mapped kills the process.
"""

import dataclasses
import math
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tli_jax.errors import DataError, MissingInputError
from tli_jax.hf.inputs import MAX_JSON, inside, parse_json, read_json, refuse_failed_download
from tli_jax.hf.tensors import DTYPES, Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Prefixes that torch.compile, DataParallel, Lightning and PEFT add to every name.
_PREFIX = re.compile(r"(?:_orig_mod\.|module\.|model\.|base_model\.model\.)+")
_FIRST_NAME = "model.embed_tokens.weight"
_SHARD_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name, in the order of their bytes.

    Raises:
        DataError: the file is truncated or of another format, or its tensors overlap, leave gaps or trailing bytes.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        refuse_failed_download(file, head + stream.read(120), "the weights")
        if size < 8:
            raise DataError(f"{file}: {size} bytes are too few for a safetensors header: download it again")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_JSON:
            raise DataError(f"{file}: gives its header {length:,} bytes, so it is not a safetensors file of a model")
        if 8 + length > size:
            raise DataError(
                f"{file}: is truncated in the header, expected at least {8 + length:,} bytes, has {size:,}:"
                " download it again"
            )
        stream.seek(8)
        entries = parse_json(stream.read(length), f"{file}: header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise DataError(f"{file}: header: __metadata__ is {type(metadata).__name__}, must be an object")
    tensors = [_read_entry(file, 8 + length, name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise DataError(f"{file}: tensor {tensor.name!r} {fault}, at byte {tensor.start:,} instead of {end:,}")
        end += tensor.nbytes
    if end != size:
        fault = "is truncated" if size < end else "has trailing bytes"
        raise DataError(f"{file}: {fault}, expected {end:,} bytes, has {size:,}: download it again")
    return {tensor.name: tensor for tensor in tensors}


def _read_entry(file: Path, data: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > 8 or start > end:
            raise ValueError
        item_bytes = _ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{file}: the header entry of tensor {name!r} is invalid: {reprlib.repr(entry)}") from None
    if math.prod(shape) * item_bytes != end - start:
        raise DataError(f"{file}: tensor {name!r} of {dtype} {list(shape)} does not match its {end - start:,} bytes")
    return Tensor(name, file, dtype, shape, data + start, end - start)


def read_folder(
    folder: Path, is_optional: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a model folder: of ``model.safetensors``, or of the shards that its index lists.

    Args:
        is_optional: whether the index may list a tensor that no shard contains.

    Returns:
        ``(tensors, absent)``: the tensors by name, and the optional ones that no shard contains.

    Raises:
        MissingInputError: there are no weights, or shards are missing (the message lists all).
        DataError: files are damaged, contradict each other or are pickles, or the index points out of the folder.
    """
    if (folder / SINGLE).exists():
        return read_header(inside(folder, SINGLE)), []
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        if pickles:
            raise DataError(
                f"{folder}: only pickled weights ({pickles[0]}), which are never opened: convert them to safetensors"
            )
        raise MissingInputError(f"{folder}: no weights: looked for {SINGLE} and {INDEX}")
    weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DataError(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    if bad := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
        raise DataError(f"{index}: {bad[0]!r} is not the name of a safetensors file in the folder")
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
    optional = {name for name in absent if is_optional(name)}
    _refuse(f"{index}: lists tensors that no shard contains", absent - optional)
    _refuse(f"{index}: does not list tensors that the shards contain", tensors.keys() - weight_map.keys())
    misplaced = {name for name, tensor in tensors.items() if tensor.file != shards[weight_map[name]]}
    _refuse(f"{index}: lists tensors in the wrong shard", misplaced)
    return tensors, sorted(optional)


def strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors without the prefix that a wrapper added to all names, and that prefix or ""."""
    first = next((name for name in tensors if name.endswith(_FIRST_NAME)), _FIRST_NAME)
    prefix = first.removesuffix(_FIRST_NAME)
    if not _PREFIX.fullmatch(prefix) or not all(name.startswith(prefix) for name in tensors):
        return tensors, ""
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: dataclasses.replace(tensor, name=name) for name, tensor in short.items()}, prefix


def check_names(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare names, shapes and dtypes with what the configuration requires. Errors list the first five tensors."""
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    found = f"; found instead: {_list(unknown)}" if unknown else ""
    _refuse(f"{folder}: tensors that config.json requires are missing", missing, found)
    _refuse(f"{folder}: tensors that a model with this config.json does not have", unknown)
    shapes = {name: (list(tensors[name].shape), list(shape)) for name, shape in expected.items()}
    _refuse(
        f"{folder}: shapes do not match config.json",
        [f"{name} is {shape} instead of {wanted}" for name, (shape, wanted) in shapes.items() if shape != wanted],
    )
    _refuse(
        f"{folder}: dtypes other than {', '.join(DTYPES)} are not supported",
        [f"{name} is {tensors[name].dtype}" for name in expected if tensors[name].dtype not in DTYPES],
    )


def _refuse(fault: str, names: Iterable[str], more: str = "") -> None:
    if names := sorted(names):
        raise DataError(f"{fault}: {_list(names)}{more}")


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({len(names)} in total)"
