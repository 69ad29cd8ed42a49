"""The files of a model folder besides the weights: which ones are copied, and how JSON is written."""

import fnmatch
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tli_jax.cli.console import to_json
from tli_jax.errors import DataError
from tli_jax.hf.inputs import inside, refuse_failed_download
from tli_jax.version import __version__

# Nothing else is ever copied: no code, no pickles, no other sub-folders.
ALLOWED = (
    *("generation_config.json", "tokenizer.json", "tokenizer.*.json", "tokenizer.model", "tokenizer.model.v*"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "tekken.json", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tiktoken.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
_TEMPLATES = "additional_chat_templates"
_CODE = (".py", ".bin", ".pth", ".pt", ".pkl", ".so", ".sh")
LARGEST = 2**28  # bytes; the largest tokenizer.json in use has about 60 MB
# Files that nobody misses in a grown model: weights, files that are rewritten, old records, hidden files.
_NOT_MISSED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt", "*.ckpt.*"),
    *("*.gguf", "*.onnx", "*.h5", "*.msgpack", "config.json", "growth.json", "training.json", "recipe.json"),
    *("README*", ".*", "__pycache__"),
)


def allowed_files(folder: Path) -> dict[str, Path]:
    """The tokenizer, generation, chat template, licence and notice files of a model folder, by their name in it.

    Raises:
        DataError: one is a link out of the folder, not a regular file, a failed download, or far too large.
    """
    names = [file.name for file in folder.iterdir()]
    if (folder / _TEMPLATES).is_dir():
        names += [f"{_TEMPLATES}/{file.name}" for file in (folder / _TEMPLATES).iterdir()]
    return {
        name: _checked(folder, name)
        for name in sorted(names)
        if any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED)
        and not name.endswith(_CODE)
        and not (folder / name).is_dir()
    }


def _checked(folder: Path, name: str) -> Path:
    file = inside(folder, name)
    if not file.is_file():
        raise DataError(f"{file}: links to a file that does not exist: download it again")
    if (size := file.stat().st_size) > LARGEST:
        raise DataError(f"{file}: has {size:,} bytes, the limit is {LARGEST:,}: replace it")
    if name.endswith((".json", ".model", ".txt")):
        with file.open("rb") as stream:
            refuse_failed_download(file, stream.read(128), "the file itself")
    return file


def copy_allowed(source: Path, target: Path) -> None:
    """Copy the files that ``allowed_files`` lists."""
    for name, file in allowed_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)


def left_behind(folder: Path) -> list[str]:
    """At most one warning, which lists the files that ``copy_allowed`` skips and somebody may miss."""
    copied = allowed_files(folder)
    folders = [folder, folder / _TEMPLATES] if any("/" in name for name in copied) else [folder]
    files = {file.relative_to(folder).as_posix(): file for parent in folders for file in parent.iterdir()}
    skipped = [
        repr(name + "/" * file.is_dir())[1:-1]
        for name, file in sorted(files.items())
        if name not in copied and file not in folders and not any(fnmatch.fnmatch(name, one) for one in _NOT_MISSED)
    ]
    more = f" and {len(skipped) - 10:,} more" if len(skipped) > 10 else ""
    return [f"{folder}: not copied: {', '.join(skipped[:10])}{more}"] if skipped else []


def versions(*packages: str) -> dict[str, str]:
    """The version of Python and of installed packages."""
    # tli_jax itself may run from a source tree that is not installed.
    found = {name: __version__ if name == "tli_jax" else metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(to_json(content) + "\n", encoding="utf-8")
