"""``run.json`` and the digests of the files that belong to a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tli_jax.errors import DataError, UsageError
from tli_jax.hf import sidecar
from tli_jax.hf.files import sha256_file
from tli_jax.hf.inputs import parse_json

# The keys of run.json and their types. In the mappings, every value is a string.
_MAPPINGS = {"files", "dtypes", "versions"}
_KEYS = {"id": str, "model": str, "data": str, "sources": list, "base": dict, "earlier": list, "config": dict}
_KEYS |= dict.fromkeys(_MAPPINGS, dict)
_COVERED = re.compile(r"growth\.json|model(/(?!\.\.?(/|$))[^/\\\0]+)+")


def parse_facts(content: bytes, where: str) -> dict[str, Any]:
    """Parse ``run.json``, read from ``where``. Raise ``DataError`` if a key is missing or damaged."""
    facts = parse_json(content, where)

    def is_valid(key: str, kind: type) -> bool:
        value: Any = facts.get(key)
        if not isinstance(value, kind) or (key == "files" and not all(map(_COVERED.fullmatch, value))):
            return False
        strings = value.values() if key in _MAPPINGS else value if key == "sources" else ()
        return all(isinstance(item, str) for item in strings)

    bad = [key for key, kind in _KEYS.items() if not is_valid(key, kind)]
    if bad:
        raise DataError(
            f"{where}: {', '.join(bad)} is missing or damaged: restore the file from a copy, or use another run"
            " directory"
        )
    return facts


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that ``run.json`` covers, by name."""
    return {name: sha256_file(folder / name) for name in _covered(folder)}


def check_files(folder: Path, recorded: Mapping[str, str]) -> None:
    """Raise ``UsageError`` if a file that ``run.json`` covers was added, changed or removed."""
    for name in sorted({*recorded, *_covered(folder)}):
        file = folder / name
        if name not in recorded:
            raise UsageError(f"{file}: was added after the run started: delete it")
        # A file larger than the limit cannot be the original, so it is not read.
        if not file.is_file() or file.stat().st_size > sidecar.LARGEST or sha256_file(file) != recorded[name]:
            change = "changed" if file.exists() else "removed"
            raise UsageError(
                f"{file}: was {change} after the run started: restore it from a copy, or use another run directory"
            )


def _covered(folder: Path) -> list[str]:
    # Hidden files belong to a file system or an editor.
    model = [file for file in (folder / "model").rglob("*") if not file.is_dir() and not file.name.startswith(".")]
    return sorted(str(file.relative_to(folder)) for file in [*model, *folder.glob("growth.json")])
