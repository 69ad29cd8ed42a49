"""The files of a model folder that are not weights: which are taken along, and how they are written."""

import fnmatch
import json
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tli_jax.checkpoint.headers import inside
from tli_jax.checkpoint.hf import grown_config
from tli_jax.growth.plan import Plan
from tli_jax.models.config import LlamaConfig

# Nothing else is ever taken along: no code, no pickles, no sub-folders.
ALLOWED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_CODE = (".py", ".bin", ".pth", ".pt", ".pkl", ".so", ".sh")


def allowed_files(folder: Path) -> list[Path]:
    """Tokenizer, generation, chat-template, licence and notice files at the top of a model folder.

    Raises:
        DataError: one is a link out of the folder, to what nobody meant to publish.
    """
    return sorted(
        inside(folder, file.name)
        for file in folder.iterdir()
        if file.is_file() and file.suffix not in _CODE and any(fnmatch.fnmatch(file.name, p) for p in ALLOWED)
    )


def copy_allowed(source: Path, target: Path) -> None:
    """Copy the allowed files."""
    for file in allowed_files(source):
        shutil.copyfile(file, target / file.name)


def grow_config(raw: Mapping[str, Any], config: LlamaConfig, plan: Plan) -> dict[str, Any]:
    """``config.json`` of the grown model: all of the base's, the depth and every per-layer list rewritten, and what
    experts need.

    A per-layer list is one whose key speaks of layers and that is as long as the base is deep.
    """

    def grow(key: str, value: Any) -> Any:
        if isinstance(value, list) and "layer" in key and len(value) == plan.base_layers:
            return [value[row.sources[0][0]] for row in plan.rows]
        return value

    grown = {key: grow(key, value) for key, value in raw.items()} | {"num_hidden_layers": len(plan)}
    return grown if plan.experts is None else grown_config(config, plan).as_mixtral(grown)


def versions(*names: str) -> dict[str, str]:
    """Of Python, and of packages that are installed."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Indented, in UTF-8, ending in a newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
