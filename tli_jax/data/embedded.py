"""The package's own corpus: an embedded text, and the standard library of the Python that runs it."""

import hashlib
import sysconfig
from importlib import resources
from pathlib import Path

_HELD_OUT_EVERY = 40
_EXCLUDED_FOLDERS = frozenset(
    ["test", "tests", "pydoc_data", "encodings", "idlelib", "turtledemo", "lib2to3", "site-packages", "ensurepip"]
)


def embedded_text() -> str:
    """The text in the package, written by the project: Python, English, and a little of other languages."""
    return (resources.files("tli_jax") / "assets" / "text.txt").read_text(encoding="utf-8")


def topics() -> list[str]:
    """Python's documentation topics, a domain on which the embedded base was not trained."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def library_files() -> tuple[list[Path], list[Path]]:
    """Modules of the standard library: those the embedded base was trained on, and the held-out ones.

    One in forty is held out, chosen by the digest of its name.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _EXCLUDED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            is_held_out = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % _HELD_OUT_EVERY == 0
            splits[is_held_out].append(path)
    return splits


def held_out_modules() -> list[str]:
    """Texts of the standard-library modules that were held out of the embedded base's training."""
    return [file.read_text(encoding="utf-8") for file in library_files()[1]]
