"""The typed description of a run: the only reader of YAML, and where command-line flags come from.

Every key of the file is a flag and every flag is a key: ``every: 4`` is ``--every 4``, ``max_shard_size`` is
``--max-shard-size``. Flags win over the file. Whatever is not known is refused, with the nearest name.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic.dataclasses import dataclass

from tli_jax.errors import MissingInputError, UsageError, nearest

Method = Literal["tli", "dus", "llama_pro", "stack", "interpose", "slayer", "average", "custom"]
Init = Literal["identity", "copy", "scaled", "half", "average", "average_identity", "noise", "random"]


def _split(value: Any) -> Any:
    """``"3,7,11"`` from the command line is a list."""
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _refuse_bool(value: Any) -> Any:
    """``every: yes`` is a slip, not the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not yes or no")
    return value


def _text(value: Any) -> Any:
    """``layers: 0`` in YAML is a number, and meant as text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Whole = Annotated[int, pydantic.BeforeValidator(_refuse_bool)]
Number = Annotated[float, pydantic.BeforeValidator(_refuse_bool)]
Layers = Annotated[tuple[Whole, ...], pydantic.BeforeValidator(_split)]
Text = Annotated[str, pydantic.BeforeValidator(_text)]


def option(default: Any, text: str) -> Any:
    """A key with its default and its line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class UpscaleConfig:
    """What ``python -m tli_jax.upscale`` is to do. Options of the methods are ``None`` where not given."""

    model: str = option("", "folder, hub id, or 'embedded': the small base that the package carries")
    output: str | None = option(None, "folder to write; not needed with --plan-only")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    method: Method = option("tli", f"one of {', '.join(get_args(Method))} (default tli)")
    every: Whole | None = option(None, "tli, average: inject after every K base layers (default 4)")
    init: Init | None = option(
        None, f"tli: how an injected layer starts, one of {', '.join(get_args(Init))} (default identity)"
    )
    scale: Number | None = option(None, "tli: factor on residual outputs, with init scaled, noise or random")
    after: Layers | None = option(None, "positions by hand: base layers after which is injected, e.g. 3,7,11")
    remainder: Literal["allow", "error"] | None = option(None, "tli: whether K may leave layers over (default allow)")
    drop: Whole | None = option(
        None, "dus: layers dropped from the end of one half and the start of the other (default L/4)"
    )
    groups: Whole | None = option(None, "llama_pro: number of groups, a divisor of L")
    copies: Whole | None = option(None, "tli, llama_pro, interpose: injected layers at each position (default 1)")
    times: Whole | None = option(None, "stack: how many times the trunk (default 2)")
    layers: Text | None = option(None, "custom: the grown layers, e.g. '0-3, 3*0, 4-7, 7*0.5, 8-15'")
    seed: Whole | None = option(None, "tli: seed of init noise and random (default 0)")
    noise_ratio: Number | None = option(None, "tli: noise as a share of each tensor's root mean square (default 0.01)")
    text: str | None = option(None, "UTF-8 text for the proof; by default the one that the package carries")
    proof: bool = option(True, "run base and grown model and compare every logit")
    sample: str | None = option(None, "prompt to continue with base and grown model at the end (greedy)")
    plan_only: bool = option(False, "read headers and configuration only, print the plan, write nothing")
    json: bool = option(False, "JSON alone on stdout, everything else on stderr")
    overwrite: bool = option(False, "replace an output that exists, once the new one is complete")
    max_shard_size: Text = option("5GB", "largest safetensors file")
    allow_nonfinite: bool = option(False, "go on when weights are NaN or Inf")
    debug: bool = option(False, "show the traceback of an error")


Config = TypeVar("Config")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see --help")


def parse(kind: type[Config], program: str, description: str, arguments: Sequence[str]) -> Config:
    """A configuration from ``--config FILE.yaml`` and flags over it.

    Raises:
        UsageError: an unknown key or flag, or a wrong value.
        MissingInputError: the file is not there.
    """
    parser = _Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file; every flag below is a key in it")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, field in fields.items():
        # A flag of argparse's own for yes/no; anything else stays text, for the types above to read.
        is_switch = field.type is bool
        action: Any = argparse.BooleanOptionalAction if is_switch else "store"
        parser.add_argument(_flag(name), dest=name, action=action, help=field.metadata["help"].replace("%", "%%"))
    given, rest = parser.parse_known_args(arguments)
    if rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        raise UsageError(f"{word} is not known{nearest(word, [_flag(name) for name in fields])}; see --help")
    flags = vars(given)
    path = flags.pop("config", None)
    return _validate(kind, _read_yaml(Path(path)) if path else {}, flags, path)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold keys and values, is {type(content).__name__}")
    return content


def _validate(kind: type[Config], values: dict[str, Any], flags: dict[str, Any], path: str | None) -> Config:
    try:
        return pydantic.TypeAdapter(kind).validate_python(values | flags)
    except pydantic.ValidationError as error:
        problems = []
        for found in error.errors():
            key = ".".join(str(part) for part in found["loc"][:1])
            where = "command line" if key in flags else path
            if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
                problems.append(f"{where}: key {key!r} is not known{nearest(key, names)}")
            else:
                problems.append(f"{where}: {key} is {found['input']!r}: {found['msg']}")
        raise UsageError("; ".join(problems)) from None
