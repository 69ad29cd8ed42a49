"""Small random changes to inputs: to JSON trees, to bytes, and to the type of a file."""

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# JSON that ``json.dumps`` cannot write. The tree contains a marker, which is replaced in the text.
_RAW = [
    *("1e999", "-1e999", "NaN", "Infinity", "-0", "1.0", "0x10", "1_000", "undefined", "'text'", "9" * 5000, "9" * 400),
    *("[" * 100_000 + "]" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, "[" + "0," * 50_000 + "0]", '{"a":1,"a":2}'),
]
_MARKERS = {f"@raw{number}@": text for number, text in enumerate(_RAW)}
_NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 1000, 65_536, 2**31, 2**53 + 1, 2**63, 2**64, 10**9, 10**12, 10**30, -(10**30)]
_FLOATS = [0.5, -0.5, 1e-45, 1e38, 1e308, -0.0, 1.5]
_TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "\udcff",
        "\x1b[2J\x1b[31m",
        "\r\n",
        "\u202e",
        "[red]x[/]",
        "[/b]",
        "[" * 9,
        "é",
    ),
    *(
        "../x",
        "/etc/passwd",
        "/dev/zero",
        "~",
        "a,b",
        "a/b",
        "gs://b/c",
        "-1",
        "1e3",
        "null",
        "true",
        "NaN",
        "{}",
        "%s",
    ),
    *(
        "x" * 300,
        "x" * 100_000,
        "\u0660",
        "ﬀ",
        "a" * 1000 + "\n" + "b" * 1000,
        "$(touch x)",
        "{0.__class__}",
        "..",
        ".",
    ),
]
_OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], [-1], {"": None}, [[[[[[]]]]]], {"a": {"b": []}}]
_MAGIC = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    *(
        b"<!DOCTYPE html><html>",
        b"PK\3\4",
        b"\x1f\x8b\x08\0",
        b"\x28\xb5\x2f\xfd",
        b"\xfd7zXZ\0",
        b"PAR1",
        b"ARROW1\0\0",
    ),
    *(b"\x93NUMPY\1\0", b"\x80\4", b"BZh9", b"\x89PNG\r\n", b"%PDF-1.4", b"---\n"),
]
_BYTES = [
    b"\0",
    b"\xff",
    b"\x80",
    b'"',
    b"{",
    b"[",
    b"]",
    b"\\",
    b"\n",
    b"\r",
    b",",
    b":",
    b"\x1b",
    b"9",
    b"-",
    b"\xed\xa0\x80",
]


def value(rng: random.Random) -> Any:
    """A value that is rarely valid."""
    kind = rng.randrange(5)
    return rng.choice([_NUMBERS, _FLOATS, _TEXTS, _OTHERS, list(_MARKERS)][kind])


def tree(rng: random.Random, content: Any, more: Sequence[tuple[str, Any]] = ()) -> Any:
    """Change a JSON tree in one place. ``more`` are keys and values that such a file could also contain."""
    content = copy.deepcopy(content)
    holder, key = _descend(rng, content)
    if holder is None:
        return value(rng)
    old = holder[key]
    action = rng.randrange(12)
    if action < 4:
        holder[key] = value(rng)
    elif action == 4:
        del holder[key]
    elif action == 5 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice([-old, old + 1, old - 1, old * 2, old / 2, float(old), str(old), old * 10**6])
    elif action == 6:
        holder[key] = [old] if rng.random() < 0.5 else {"a": old}
    elif action == 7:  # a value from elsewhere in the tree
        other, there = _descend(rng, content)
        holder[key] = copy.deepcopy(other[there]) if other is not None else None
    elif action == 8 and isinstance(holder, dict):
        name = rng.choice([key + "x", key[:-1], key.upper(), key.replace("_", "-"), rng.choice(_TEXTS), "a." + key])
        holder[name] = holder.pop(key)
    elif action == 9 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(old)] * rng.choice([1, 2, 1000])
    elif more and isinstance(content, dict):
        name, found = rng.choice(more)
        content[name] = value(rng) if rng.random() < 0.3 else found
    else:
        place = content if isinstance(content, dict) else holder
        if isinstance(place, dict):
            place[rng.choice(_TEXTS)] = value(rng)
    return content


def _descend(rng: random.Random, content: Any) -> tuple[Any, Any]:
    """A random place in a tree: its container, and its key or index."""
    holder, key = None, None
    while isinstance(content, dict | list) and content:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        holder, key = content, rng.choice(keys)
        content = holder[key]
        if rng.random() < 0.3:
            break
    return holder, key


def dump(rng: random.Random, content: Any) -> bytes:
    """A tree as JSON text, sometimes with a duplicate key."""
    text = json.dumps(content, ensure_ascii=rng.random() < 0.8)
    for marker, raw in _MARKERS.items():
        text = text.replace(f'"{marker}"', raw)
    if rng.random() < 0.05 and (keys := list(re.finditer(r'"[^"\\]*": ', text))):
        found = rng.choice(keys)
        text = text[: found.start()] + found[0] + rng.choice(["0, ", "null, ", '"", ', "[], "]) + text[found.start() :]
    return text.encode("utf-8", "surrogatepass")


def raw(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        # Headers and footers matter more than the data between them.
        at = min(
            rng.choice([rng.randrange(len(data) + 1), rng.randrange(64), len(data) - rng.randrange(64)]), len(data)
        )
        at, length = max(at, 0), rng.choice([1, 1, 2, 4, 8, 100, 5000])
        action = rng.randrange(9)
        if action < 3 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif action == 3:
            data = data[:at] + rng.choice(_BYTES) * rng.choice([1, 1, 2, 1000]) + data[at:]
        elif action == 4:
            data = data[:at] + data[at + length :]
        elif action == 5:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        elif action == 6:
            data = data[:at] + data[at : at + length] * rng.choice([2, 2, 100]) + data[at + length :]
        elif action == 7:
            data = data[:at]
        else:
            data = rng.choice([rng.choice(_MAGIC) + data, rng.choice(_MAGIC), data + rng.choice(_MAGIC), data + data])
    return data


def swap(rng: random.Random, file: Path, largest: int = 2**40) -> None:
    """Replace a file or folder with something else, for example a sparse file of up to ``largest`` bytes."""
    data = file.read_bytes() if file.is_file() else b""
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
    action = rng.randrange(8)
    if action == 0:
        os.mkfifo(file)
    elif action == 1:
        file.symlink_to(rng.choice([file.name, "/etc/passwd", "/dev/zero", "/dev/stdin", ".", "..", "nowhere"]))
    elif action == 2:
        file.mkdir()
    elif action == 3:
        file.touch()
    elif action == 4:
        file.touch()
        os.truncate(file, min(largest, rng.choice([2**20, 2**33, 2**40])))  # sparse
    elif action == 5:
        file.write_bytes(rng.choice(_MAGIC))
    elif action == 6:
        names = [b"\xff", b"[b]", b"\x1b[2J", b"a b", b"a,b", b"\n", b".hidden", b"x" * 200]
        Path(os.fsdecode(os.fsencode(file.parent) + b"/" + rng.choice(names))).write_bytes(data)


def json_file(rng: random.Random, file: Path, more: Sequence[tuple[str, Any]] = ()) -> None:
    """Change a JSON file as a tree, as bytes, or as a file."""
    kind = rng.random()
    if not is_small(file):
        return
    if kind < 0.06:
        swap(rng, file)
    elif kind < 0.25 or (content := read_json(file.read_bytes())) is None:
        file.write_bytes(raw(rng, file.read_bytes()))
    else:
        for _ in range(rng.choice([1, 1, 2, 3])):
            content = tree(rng, content, more)
        file.write_bytes(dump(rng, content))


def lines_file(rng: random.Random, file: Path, largest: int = 2**40) -> None:
    """Change a file of JSON lines; ``swap`` explains ``largest``."""
    kind = rng.random()
    if not is_small(file):
        return
    lines = file.read_bytes().splitlines()
    if kind < 0.06:
        swap(rng, file, largest)
    elif kind < 0.3 or not lines:
        file.write_bytes(raw(rng, file.read_bytes()))
    else:
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(lines))
            content = read_json(lines[at])
            is_tree = content is not None and rng.random() < 0.8
            lines[at] = dump(rng, tree(rng, content)) if is_tree else raw(rng, lines[at])
            if rng.random() < 0.1:
                lines.insert(rng.randrange(len(lines)), rng.choice([b"", b"null", b"{}", b"\xff", b"0", *lines]))
        file.write_bytes(b"\n".join(lines) + b"\n")


def any_file(rng: random.Random, file: Path, largest: int = 2**40) -> None:
    """Change a file of any type; ``swap`` explains ``largest``."""
    if is_small(file):
        swap(rng, file, largest) if rng.random() < 0.1 else file.write_bytes(raw(rng, file.read_bytes()))


def is_small(file: Path) -> bool:
    """Whether a path is still a regular file after earlier changes, and small enough to change again."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size <= 2**20


def read_json(data: bytes) -> Any:
    """The parsed JSON, or None if it is invalid."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def word(rng: random.Random) -> str:
    """A value for the command line, which cannot contain NUL or characters that the encoding lacks."""
    found = value(rng)
    text = found if isinstance(found, str) else json.dumps(found)
    text = _MARKERS.get(text, text).replace("\0", "").replace("\ud800", "\udcfe")
    return text[:50_000]
