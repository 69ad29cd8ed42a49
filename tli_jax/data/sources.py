"""Which files of a folder are read: text of the training split. Everything else is listed in notes."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tli_jax.data.formats import COMPRESSED, KINDS, kind_by_name
from tli_jax.errors import DataError, MissingInputError

_MAX_LISTED = 8  # names in a note

# Names, without extension, of files that accompany text: with any extension, and as JSON.
_NOT_TEXT = frozenset(
    (
        *("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors"),
        *("requirements", "checksums", "md5sums", "sha256sums", "vocab", "merges"),
    )
)
_NOT_TEXT_AS_JSON = frozenset(
    (
        *("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "config", "generation_config"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"),
    )
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# ``train``, ``test-2``, ``validation_00000-of-00001``, and the hub's ``train_sft-00000-of-00003``.
_SPLIT_NAME = re.compile(r"([a-z]+)(?:[-_. ]?\d+(?:-of-\d+)?)?|([a-z]+)[-_][\w-]*-\d{5}-of-\d{5}")
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")


class Found(NamedTuple):
    """Files to read, in order, and ``notes``: one line for each kind of file that is skipped."""

    files: list[Path]
    notes: list[str]


def find_files(path: Path) -> Found:
    """The files of a source: the file itself, or the text files of a folder by their extension, sorted.

    If the names of files or folders show splits, only the training split is read.

    Raises:
        MissingInputError: the path does not exist, or a link in the folder is broken.
        DataError: a device or FIFO, a folder without text or training split, or a damaged ``datasets`` folder.
    """
    if path.is_file():
        return Found([path], [])
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path}: neither a file nor a folder: give one of these")
        raise MissingInputError(f"{path}: no such file or folder to read text from")
    texts, others = _list_files(path)
    train, held_out, loose, doubtful = _by_split(path, texts)
    if not texts:
        only = f", only {_enumerate(others)}" if others else ""
        known = f"{', '.join(KINDS)}, also with {', '.join(COMPRESSED)}"
        raise DataError(f"{path}: contains no text files{only}: give the files one by one, or name them {known}")
    if not train and not loose:
        raise DataError(
            f"{path}: has no training split, only {', '.join(sorted(held_out))}: give one of its files or folders"
        )

    def names(files: Iterable[Path]) -> str:
        return _enumerate(file.relative_to(path).as_posix() for file in files)

    notes = []
    if train:
        skipped = [f"{split} ({_count(files)})" for split, files in sorted(held_out.items())]
        skipped += [f"files of no split: {names(loose)}"] if loose else []
        if skipped:
            notes.append(f"{path}: reads the split train ({_count(train)}); skips {'; '.join(skipped)}")
    elif held_out:
        files = [file for split in held_out.values() for file in split]
        notes.append(f"{path}: skips evaluation splits: {names(files)}; to read one, give it as a source of its own")
    if doubtful and not train:
        notes.append(f"{path}: reads files whose name may mean an evaluation split: {names(doubtful)}")
    if others:
        notes.append(f"{path}: skips hidden files, linked folders and files that are not text: {_enumerate(others)}")
    return Found(train or loose, notes)


def _list_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Text files, and the names of all others. A folder that is not entered is listed itself."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip folders that it may not read

    texts: list[Path] = []
    others: list[str] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        parent = Path(root)
        skipped = [name for name in folders if name.startswith(".") or (parent / name).is_symlink()]
        others += [f"{(parent / name).relative_to(folder).as_posix()}/" for name in skipped]
        folders[:] = [name for name in folders if name not in skipped]
        saved = _list_saved(parent) if {"state.json", "dataset_info.json"} <= set(names) else None
        texts += saved or []
        for name in names:
            file = parent / name
            if saved is None and _is_text(file) and file.is_file():
                texts.append(file)
            elif saved is None and _is_text(file) and not file.exists():
                raise MissingInputError(f"{file}: broken link: fix or delete it")
            elif saved is None or file not in saved:
                others.append(file.relative_to(folder).as_posix())
    return sorted(texts), sorted(others)


def _is_text(file: Path) -> bool:
    """By name. Token ids count as text here, so that they are refused among text files."""
    if file.suffix.lower() == ".npy":
        return True
    stem = file.name.partition(".")[0].lower()
    is_json = ".json" in (suffix.lower() for suffix in file.suffixes)
    return kind_by_name(file) is not None and stem not in _NOT_TEXT and not (is_json and stem in _NOT_TEXT_AS_JSON)


class _Splits(NamedTuple):
    """Files by split. ``doubtful`` are those of no split (``loose``) that may belong to an evaluation split."""

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
        while (suffix := Path(stem).suffix) in KINDS or suffix in COMPRESSED:
            stem = stem.removesuffix(suffix)
        match = _SPLIT_NAME.fullmatch(stem)
        words = [*map(str.lower, folders), *(filter(None, match.groups()) if match else ())]
        if splits := {_SPLITS[word] for word in words if word in _SPLITS}:
            certain[file] = min(splits - {"train"}, default="train")
        elif word := _SPLIT_WORD.search(stem):
            # ``reviews_test.txt`` is a split beside a ``reviews_train.txt``, and may be a title elsewhere.
            pattern = stem[: word.start()] + "*" + stem[word.end() :]
            siblings = re.sub(r"\d+", "#", "/".join([*folders, pattern]))
            guesses.setdefault(siblings, {})[file] = _SPLITS[word[1]]
    doubtful = []
    for group in guesses.values():
        if len(set(group.values())) > 1:
            certain |= group
        else:
            doubtful += [file for file, split in group.items() if split != "train"]
    train = [file for file in files if certain.get(file) == "train"]
    held_out: dict[str, list[Path]] = {}
    for file in files:
        if certain.get(file, "train") != "train":
            held_out.setdefault(certain[file], []).append(file)
    return _Splits(train, held_out, [file for file in files if file not in certain], doubtful)


def _list_saved(folder: Path) -> list[Path]:
    """Files of a folder that ``datasets`` saved: Arrow streams listed in state.json."""
    state = folder / "state.json"
    try:
        raw = json.loads(state.read_bytes())
        names = [Path(entry["filename"]) for entry in raw["_data_files"]]
        if raw.get("_indices_data_files") or not names or any(name.name != str(name) for name in names):
            raise ValueError("no files, or not in order")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise DataError(f"{state}: does not list the files of a dataset: save it again with save_to_disk") from None
    for name in names:
        if not (folder / name).is_file():
            raise MissingInputError(f"{folder / name}: is listed in {state.name} but does not exist")
    return [folder / name for name in names]


def _count(files: Sequence[Path]) -> str:
    return f"{len(files):,} file" + "s" * (len(files) != 1)


def _enumerate(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_LISTED:,} more" if len(listed) > _MAX_LISTED else ""
    return ", ".join(listed[:_MAX_LISTED]) + more
