"""Which files of a folder are read: those that hold text, of the training split; everything else is listed."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tli_jax.data.formats import KINDS, PACKED, kind_by_name
from tli_jax.errors import DataError, MissingInputError

_SHOWN = 8  # names in a note

# Names, without extensions, of files that come with text and are none of it; and of those that are so as JSON.
_BESIDE = frozenset(
    (
        *("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors"),
        *("requirements", "checksums", "md5sums", "sha256sums", "vocab", "merges"),
    )
)
_BESIDE_JSON = frozenset(
    (
        *("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "config", "generation_config"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"),
    )
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# ``train``, ``test-2``, ``validation_00000-of-00001``; and the hub's ``train_sft-00000-of-00003``.
_WHOLE_NAME = re.compile(r"([a-z]+)(?:[-_. ]?\d+(?:-of-\d+)?)?|([a-z]+)[-_][\w-]*-\d{5}-of-\d{5}")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")


class Found(NamedTuple):
    """Files to read, in order, and ``notes``, one line each, on what is left out."""

    files: list[Path]
    notes: list[str]


def find_files(path: Path) -> Found:
    """The files of a source: the file itself; or of a folder, sorted, those that hold text by their extension.

    In a folder that has splits, by the names of files or folders, only the training split is read.

    Raises:
        MissingInputError: nothing is there, or a link in the folder leads nowhere.
        DataError: a device, a FIFO; a folder without text or without a training split; a damaged ``datasets`` folder.
    """
    if path.is_file():
        return Found([path], [])
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path}: is neither a file nor a folder: give one of these")
        raise MissingInputError(f"{path}: no such file or folder to read text from")
    texts, others = _list(path)
    train, held_out, loose, doubtful = _by_split(path, texts)
    if not texts:
        there = f", only {_enumerate(others)}" if others else ""
        known = f"{', '.join(KINDS)}, also with {', '.join(PACKED)}"
        raise DataError(f"{path}: has no files of text{there}: give other files one by one, or name them {known}")
    if not train and not loose:
        raise DataError(
            f"{path}: has no training split, only {', '.join(sorted(held_out))}: give one of its files or folders"
        )
    notes = []
    if train:
        rest = [file.relative_to(path).as_posix() for file in loose]
        left_out = [f"{split} ({_count(files)})" for split, files in sorted(held_out.items())]
        if loose:
            left_out.append(f"of no split: {_enumerate(rest)}")
        if left_out:
            notes.append(f"{path}: the split train is read ({_count(train)}); left out: {'; '.join(left_out)}")
    elif held_out:
        names = [file.relative_to(path).as_posix() for files in held_out.values() for file in files]
        notes.append(f"{path}: left out, as a split for evaluation: {_enumerate(names)}; give it by itself to read it")
    if doubtful and not train:
        names = [file.relative_to(path).as_posix() for file in doubtful]
        notes.append(f"{path}: read, though the name may mean a split for evaluation: {_enumerate(names)}")
    if others:
        notes.append(f"{path}: left out, being hidden, linked folders or no text by name: {_enumerate(others)}")
    return Found(train or loose, notes)


def _list(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of text, and the names of all else; a folder that is not looked into is named itself."""

    def fail(error: OSError) -> None:
        raise error  # os.walk leaves out what it may not read

    texts: list[Path] = []
    others: list[str] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        place = Path(root)
        closed = [name for name in folders if name.startswith(".") or (place / name).is_symlink()]
        others += [f"{(place / name).relative_to(folder).as_posix()}/" for name in closed]
        folders[:] = [name for name in folders if name not in closed]
        saved = _list_saved(place) if {"state.json", "dataset_info.json"} <= set(names) else None
        texts += saved or []
        for name in names:
            file = place / name
            if saved is None and _is_text(file) and file.is_file():
                texts.append(file)
            elif saved is None and _is_text(file) and not file.exists():
                raise MissingInputError(f"{file}: is a link to nothing: fix or delete it")
            elif saved is None or file not in saved:
                others.append(file.relative_to(folder).as_posix())
    return sorted(texts), sorted(others)


def _is_text(file: Path) -> bool:
    """By its name alone. Token ids count, to be refused where they stand among texts."""
    if file.suffix.lower() == ".npy":
        return True
    stem = file.name.partition(".")[0].lower()
    is_json = ".json" in (suffix.lower() for suffix in file.suffixes)
    return kind_by_name(file) is not None and stem not in _BESIDE and not (is_json and stem in _BESIDE_JSON)


class _Splits(NamedTuple):
    """Files of the training split; of the others, by name; of none; and of these, those that may be of the others."""

    train: list[Path]
    held_out: dict[str, list[Path]]
    loose: list[Path]
    doubtful: list[Path]


def _by_split(folder: Path, files: Sequence[Path]) -> _Splits:
    certain: dict[Path, str] = {}
    guesses: dict[str, dict[Path, str]] = {}
    for file in files:
        *folders, name = file.relative_to(folder).parts
        stem = name.lower()
        while (suffix := Path(stem).suffix) in KINDS or suffix in PACKED:
            stem = stem.removesuffix(suffix)
        whole = _WHOLE_NAME.fullmatch(stem)
        words = [*map(str.lower, folders), *(filter(None, whole.groups()) if whole else ())]
        found = {_SPLITS[word] for word in words if word in _SPLITS}
        if found:
            certain[file] = min(found - {"train"}, default="train")
        elif word := _WORD.search(stem):
            # ``reviews_test.txt`` is a split where there is a ``reviews_train.txt``, and may be a title elsewhere.
            others = stem[: word.start()] + "*" + stem[word.end() :]
            alike = re.sub(r"\d+", "#", "/".join([*folders, others]))
            guesses.setdefault(alike, {})[file] = _SPLITS[word[1]]
    doubtful = []
    for group in guesses.values():
        if len(set(group.values())) > 1:
            certain |= group
        else:
            doubtful += [file for file, split in group.items() if split != "train"]
    splits = _Splits([], {}, [], doubtful)
    for file in files:
        split = certain.get(file)
        if split is None:
            splits.loose.append(file)
        elif split == "train":
            splits.train.append(file)
        else:
            splits.held_out.setdefault(split, []).append(file)
    return splits


def _list_saved(folder: Path) -> list[Path]:
    """Files of a folder that ``datasets`` saved: Arrow streams and a list of them, which pyarrow alone can read."""
    state = folder / "state.json"
    try:
        raw = json.loads(state.read_bytes())
        names = [Path(one["filename"]) for one in raw["_data_files"]]
        if raw.get("_indices_data_files") or not names or any(name.name != str(name) for name in names):
            raise ValueError("no files, or not in order")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise DataError(f"{state}: does not list the files of a dataset: write it again, with save_to_disk") from None
    for name in names:
        if not (folder / name).is_file():
            raise MissingInputError(f"{folder / name}: is listed in {state.name}, but not there")
    return [folder / name for name in names]


def _count(files: Sequence[Path]) -> str:
    return f"{len(files):,} file" + "s" * (len(files) != 1)


def _enumerate(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
