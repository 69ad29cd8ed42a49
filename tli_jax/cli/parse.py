"""Configurations from command-line flags and YAML files.

Every key of the file is a flag and every flag is a key: ``every: 4`` is ``--every 4``, and ``steps`` in the section
``train`` is ``--train.steps``. Flags win over the file.
"""

import argparse
import dataclasses
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic

from tli_jax.cli.config import PreflightConfig, TrainConfig, UpscaleConfig
from tli_jax.cli.frame import Parser
from tli_jax.cli.yaml_file import is_unicode, read_yaml
from tli_jax.errors import UsageError, nearest

Config = TypeVar("Config")

_SHOWN = 5  # problems in a message
_LONGEST = 100  # characters of a value in a message


def parse(kind: type[Config], program: str, description: str, arguments: Sequence[str]) -> Config:
    """A configuration from ``--config FILE.yaml`` and flags over it.

    A file that describes a growth and, in its section ``train``, what comes after, serves for that section alone too:
    the model is then what the growth writes. And one that describes training alone serves for a preflight.

    Raises:
        UsageError: an unknown key or flag, or a wrong value.
        MissingInputError: the file is not there.
    """
    parser = Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file; every flag below is a key in it, but for --debug")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    switches = ["--config", "--debug"]
    for name, field in _flat_fields(kind).items():
        # A flag of argparse's own for yes/no; anything else stays text, for the types above to read.
        action: Any = argparse.BooleanOptionalAction if field.type is bool else "store"
        switches.append(_flag(name))
        parser.add_argument(switches[-1], dest=name, action=action, help=field.metadata["help"].replace("%", "%%"))
    given, rest = parser.parse_known_args(arguments)
    if rest:
        word = next((word for word in rest if word.startswith("-")), rest[0])
        raise UsageError(f"{word} is not known{nearest(word, switches)}; see --help")
    flags = vars(given)
    flags.pop("debug", None)  # for the frame of a command, which looks for the word itself
    for name, value in flags.items():
        if isinstance(value, str) and not is_unicode(value):
            raise UsageError(f"command line: {name} is {value!r}: not UTF-8")
    path = flags.pop("config", None)
    values = read_yaml(Path(path).expanduser()) if path else {}
    if kind is TrainConfig and isinstance(values.get("train"), dict):
        values = {"model": values.get("output", "")} | values["train"]
    elif kind is PreflightConfig and "run" in values:  # of a run without growth
        values = {"model": values.get("model", ""), "train": values}
    return _validate(kind, values, flags, path)


def from_yaml(kind: type[Config], path: Path) -> Config:
    """Read what ``to_yaml`` wrote.

    Raises:
        UsageError, MissingInputError: see ``parse``.
    """
    return _validate(kind, read_yaml(path), {}, str(path))


def growth_config(values: dict[str, Any], where: str) -> UpscaleConfig:
    """A growth from keys and values.

    Raises:
        UsageError: an unknown key, or a wrong value; says ``where``.
    """
    return _validate(UpscaleConfig, values, {}, where)


def difference(earlier: Any, now: Any, may_change: Sequence[str]) -> str:
    """What differs between two configurations, but for keys that may; each key with both values."""
    before, after = dataclasses.asdict(earlier), dataclasses.asdict(now)
    differing = [key for key in after if key not in may_change and before[key] != after[key]]
    return "; ".join(f"{key} was {before[key]!r}, is {after[key]!r}" for key in differing)


def _sections(kind: Any) -> dict[str, Any]:
    """Keys of a configuration that are configurations themselves."""
    return {
        field.name: part
        for field in dataclasses.fields(kind)
        for part in get_args(field.type)
        if isinstance(part, type) and dataclasses.is_dataclass(part)
    }


def _flat_fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Every key, those of a section by a dotted name; first a configuration's own, then those that it shares."""
    sections = _sections(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name not in vars(kind)["__annotations__"])
    flat = {field.name: field for field in fields if field.name not in sections}
    for name, part in sections.items():
        flat |= {f"{name}.{key}": field for key, field in _flat_fields(part).items()}
    return flat


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _validate(kind: type[Config], values: dict[str, Any], flags: dict[str, Any], path: str | None) -> Config:
    merged = dict(values)
    for name, value in flags.items():
        section, dot, key = name.rpartition(".")
        if not dot:
            merged[key] = value
        elif isinstance(merged.get(section) or {}, dict):
            merged[section] = (merged.get(section) or {}) | {key: value}
    try:
        return pydantic.TypeAdapter(kind).validate_python(merged)
    except pydantic.ValidationError as error:
        problems = []
        for found in error.errors():
            parts = [str(part) for part in found["loc"]]
            key = ".".join(parts[: 1 + (parts[0] in _sections(kind))])
            where = "command line" if key in flags else path
            if found["type"] in ("unexpected_keyword_argument", "extra_forbidden") and len(parts) <= 1 + key.count("."):
                problems.append(f"{where}: key {key!r} is not known{nearest(key, _flat_fields(kind))}")
            else:
                problems.append(f"{where}: {key} is {_shorten(found['input'])}: {found['msg']}")
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise UsageError("; ".join(problems[:_SHOWN]) + more) from None


def _shorten(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _LONGEST
    return short.repr(value)
