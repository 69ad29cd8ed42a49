"""Configurations from command-line flags and YAML files.

Every key of the file is a flag and every flag is a key: ``every: 4`` is ``--every 4``, and ``steps`` in the section
``train`` is ``--train.steps``. Flags override the file. Unknown keys and flags are refused with the nearest name.

argparse is enough here. Tools that derive the flags (tyro, pydantic-settings) print their own messages and exit codes,
and none of them reads the short forms that flags and YAML share, such as ``data=2,fsdp=4``.
"""

import argparse
import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import pydantic

from tli_jax.cli.fields import find_sections, flat_fields
from tli_jax.cli.frame import Parser
from tli_jax.cli.growth_config import PreflightConfig
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.yaml_file import is_unicode, read_yaml
from tli_jax.errors import UsageError, nearest

Config = TypeVar("Config")

_MAX_PROBLEMS = 5  # in a message
_MAX_VALUE = 100  # characters of a value in a message
# Flags of other trainers, by the name they have here.
_ALIASES = {
    **dict.fromkeys(("lr", "peak-lr", "max-lr"), "learning-rate"),
    **dict.fromkeys(("bs", "batch", "global-batch-size"), "batch-size"),
    **dict.fromkeys(("seq-len", "seq-length", "max-length", "max-seq-length", "block-size"), "sequence-length"),
    **dict.fromkeys(("max-steps", "num-steps", "train-steps", "total-steps"), "steps"),
    **dict.fromkeys(("gradient-accumulation-steps", "accumulation", "grad-accum"), "grad-accum-steps"),
    **dict.fromkeys(("max-grad-norm", "grad-clip", "clip", "gradient-clip"), "clip-norm"),
    **dict.fromkeys(("warmup-steps", "lr-warmup"), "warmup"),
    **dict.fromkeys(("lr-schedule", "lr-scheduler", "scheduler"), "schedule"),
    **dict.fromkeys(("wd", "decay"), "weight-decay"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("dtype", "precision", "bf16"), "dtypes"),
    **dict.fromkeys(("data", "dataset", "train-file", "train-text", "file"), "text"),
    **dict.fromkeys(("eval-text", "val-text", "validation-data"), "validation-text"),
    **dict.fromkeys(("base", "base-model", "model-name-or-path", "model-path", "checkpoint"), "model"),
    **dict.fromkeys(("out", "output-dir", "out-dir", "save-dir", "o"), "output"),
    **dict.fromkeys(("run-dir", "logdir", "log-dir", "workdir"), "run"),
    **dict.fromkeys(("freeze", "trainable", "train-only"), "only"),
    **dict.fromkeys(("k", "interval"), "every"),
    **dict.fromkeys(("initializer", "initialiser"), "init"),
    **dict.fromkeys(("num-experts", "n-experts"), "experts"),
    **dict.fromkeys(("num-fewshot", "few-shot"), "shots"),
    **dict.fromkeys(("max-tokens", "length", "num-tokens"), "max-new-tokens"),
    **dict.fromkeys(("gradient-checkpointing", "checkpointing", "rematerialization"), "remat"),
    **dict.fromkeys(("dry-run",), "plan-only"),
    **dict.fromkeys(("force",), "overwrite"),
}


def parse(
    kind: type[Config], program: str, description: str, arguments: Sequence[str], examples: Sequence[str] = ()
) -> Config:
    """A configuration from ``--config FILE.yaml`` and the flags that override it.

    A file that describes a growth and, in its section ``train``, the training after it also serves for that training
    alone: the model is then the output of the growth. A file that describes training alone also serves for preflight.

    Args:
        program: name of the command, for ``--help``.
        examples: command lines for ``--help``, without the name of the command.

    Raises:
        UsageError: an unknown key or flag, or an invalid value.
        MissingInputError: the file does not exist.
    """
    parser = _make_parser(kind, program, description, arguments, examples)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        word = next((word for word in rest if word.startswith("-")), None)
        if word is None:
            raise UsageError(f"{rest[0]!r} is not an option: every value follows an option, see --help")
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(f"{word} is not known{_suggest(word, flags)}; see --help")
    flags = vars(given)
    flags.pop("debug", None)  # run_command scans the arguments for it
    for name, value in flags.items():
        if isinstance(value, str) and not is_unicode(value):
            raise UsageError(f"command line: {name} is {value!r}: not UTF-8")
    path = flags.pop("config", None)
    values = read_yaml(Path(path).expanduser()) if path else {}
    if kind is TrainConfig and isinstance(values.get("train"), dict):
        values = {"model": values.get("output", "")} | values["train"]
    elif kind is PreflightConfig and "run" in values:
        values = {"model": values.get("model", ""), "train": values}
    return _validate(kind, values, flags, path)


def _make_parser(
    kind: Any, program: str, description: str, arguments: Sequence[str], examples: Sequence[str]
) -> argparse.ArgumentParser:
    sections = find_sections(kind)
    hidden = {name for name in sections if f"--help-{name}" not in arguments}
    parser = Parser(
        prog=program,
        usage=f"{program} [--config FILE] [options]",
        description=description,
        epilog="\n".join(["examples:", *(f"  {program} {example}" for example in examples)]) if examples else None,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    for name in sections:
        general.add_argument(f"--help-{name}", action="help", help=f"also show the options --{name}.…, and exit")
    general.add_argument("--config", metavar="FILE", help="YAML file with any of the options below as keys")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    groups: dict[str, Any] = {}
    for name, field in flat_fields(kind).items():
        section = name.rpartition(".")[0]
        title = f"{section}: {field.metadata['group']}" if section else field.metadata["group"]
        # Without its title here, argparse leaves an empty group out of the help.
        group = groups.setdefault(title, parser.add_argument_group(title))
        group.add_argument(
            _flag(name),
            dest=name,
            # Everything but yes and no stays text, for the types of the configuration to read.
            action=argparse.BooleanOptionalAction if _is_bool(field) else "store",
            help=argparse.SUPPRESS if section.partition(".")[0] in hidden else _help(field),
            **({} if _is_bool(field) else {"metavar": _metavar(field)}),
        )
    return parser


def _is_bool(field: dataclasses.Field[Any]) -> bool:
    return field.type is bool or bool in get_args(field.type)


def _help(field: dataclasses.Field[Any]) -> str:
    """The help of a key, with its choices and its default."""
    text, choices = field.metadata["help"], _choices(field)
    if choices:
        text += f"; one of {', '.join(choices)}"
    default = field.metadata["shown"] or _show_default(field)
    return f"{text} ({default if default == 'required' else f'default: {default}'})".replace("%", "%%")


def _show_default(field: dataclasses.Field[Any]) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, dict):
        parts = [str(value) if key == "all" else f"{key}={value}" for key, value in default.items()]
        return ",".join(parts) or "none"
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return "none" if default in (None, "") else str(default)


def _choices(field: dataclasses.Field[Any]) -> Sequence[str]:
    kinds = (field.type, *get_args(field.type))
    literal = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    return list(field.metadata["choices"] or literal)


def _metavar(field: dataclasses.Field[Any]) -> str:
    """A word for the value of a flag."""
    if _choices(field):
        return "NAME"
    names = {
        **dict.fromkeys(("model", "output", "run", "export", "compare_to", "scan", "plan"), "PATH"),
        **dict.fromkeys(("text", "validation_text", "old_text", "tasks"), "PATHS"),
        **dict.fromkeys(("mesh", "adam", "dtypes", "auxiliary"), "NAME=VALUE,…"),
        **dict.fromkeys(("learning_rate", "warmup"), "VALUE"),
        "max_shard_size": "SIZE",
    }
    if field.name in names:
        return names[field.name]
    kinds = {kind for part in (field.type, *get_args(field.type)) for kind in (part, *get_args(part))}
    return "N" if int in kinds else "X" if float in kinds else "TEXT"


def _suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message: the flag or key that was probably meant, or nothing."""
    name = word.partition("=")[0].lstrip("-").replace("_", "-")
    section, dot, last = name.rpartition(".")
    by_name = {word.lstrip("-").replace("_", "-"): word for word in known}
    close = difflib.get_close_matches(section + dot + _ALIASES.get(last, last), by_name, n=1)
    return f", did you mean {by_name[close[0]]}?" if close else ""


def from_yaml(kind: type[Config], path: Path) -> Config:
    """Read a file written by ``to_yaml``.

    Raises:
        UsageError, MissingInputError: see ``parse``.
    """
    return _validate(kind, read_yaml(path), {}, str(path))


def from_values(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """A configuration from keys and values.

    Raises:
        UsageError: an unknown key or an invalid value; the message starts with ``where``.
    """
    return _validate(kind, values, {}, where)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _validate(kind: type[Config], values: dict[str, Any], flags: dict[str, Any], path: str | None) -> Config:
    merged = _merge(values, flags)
    try:
        return pydantic.TypeAdapter(kind).validate_python(merged)
    except pydantic.ValidationError as error:
        problems = list(_describe(error, kind, flags, path))
    more = f"; and {len(problems) - _MAX_PROBLEMS:,} more" if len(problems) > _MAX_PROBLEMS else ""
    raise UsageError("; ".join(problems[:_MAX_PROBLEMS]) + more)


def _merge(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The values of a file, overridden by flags; one such as ``train.steps`` overrides a key of a section."""
    merged, inner = dict(values), dict[str, dict[str, Any]]()
    for name, value in flags.items():
        section, dot, key = name.partition(".")
        if dot:
            inner.setdefault(section, {})[key] = value
        else:
            merged[name] = value
    for section, keys in inner.items():
        if isinstance(merged.get(section) or {}, dict):
            merged[section] = _merge(merged.get(section) or {}, keys)
    return merged


def _describe(error: pydantic.ValidationError, kind: Any, flags: dict[str, Any], path: str | None) -> Iterator[str]:
    """Rewrite pydantic's errors as messages."""
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(_key(kind, parts))
        where = "command line" if key in flags else path
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            if len(parts) <= 1 + key.count("."):
                yield f"{where}: key {key!r} is not known{_suggest(key, flat_fields(kind))}"
            else:
                yield f"{where}: {key}: key {parts[-1]!r} is not known"
        elif problem["type"] == "missing":
            yield f"{where}: {key}: key {parts[-1]!r} is missing"
        else:
            yield f"{where}: {key} is {_shorten(problem['input'])}, {_reason(problem)}"


def _key(kind: Any, parts: list[str]) -> list[str]:
    """The start of a path that names a key."""
    section = find_sections(kind).get(parts[0])
    return [parts[0], *_key(section, parts[1:])] if section is not None and len(parts) > 1 else parts[:1]


_REASONS = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be yes or no"),
    **dict.fromkeys(("string_type",), "must be text"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "dataclass_type"), "must be keys and values"),
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:,}",
    "greater_than_equal": "must be at least {ge:,}",
    "less_than": "must be less than {lt:,}",
    "less_than_equal": "must be at most {le:,}",
    "literal_error": "must be one of {expected}",
    "string_pattern_mismatch": "must be tensorboard or wandb:PROJECT",
    "value_error": "{error}",
}


def _reason(problem: Any) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        words = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        return f"must be one of {', '.join(words)}{nearest(str(problem['input']), words)}"
    return _REASONS.get(problem["type"], "is not valid here").format(**context)


def _shorten(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _MAX_VALUE
    return short.repr(value)
