"""Types of configuration values: how each is read from YAML or a command-line flag, and its valid range."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.errors import nearest


def _split(value: Any) -> Any:
    """``"3,7,11"`` from the command line is a list."""
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _refuse_bool(value: Any) -> Any:
    """``every: yes`` is a mistake, not the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean (yes or no)")
    return value


def _text(value: Any) -> Any:
    """YAML reads ``layers: 0`` as a number where text is expected."""
    if isinstance(value, float):
        raise ValueError("is a number in YAML, so 1.10 would become 1.1: put it in quotes")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _expand_home(path: str) -> str:
    """Expand ``~``."""
    if "\0" in path:
        raise ValueError("must not contain a NUL character")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"no home directory is known for that user: write ./{path} for a file here") from None


def _pairs(value: Any) -> Any:
    """``"data=2,fsdp=4"`` from the command line is a mapping."""
    if not isinstance(value, str):
        return value
    parts = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign for _, sign, _ in parts):
        raise ValueError("must be name=value, separated by commas")
    return {name.strip(): amount.strip() for name, _, amount in parts}


def _by_group(value: Any) -> Any:
    """``1e-4``, ``"1e-4,injected=1e-3"``, or a mapping that contains ``all``."""
    if isinstance(value, str):
        first, comma, rest = value.partition(",")
        value = _pairs(value) if "=" in first else {"all": first.strip()} | _pairs(rest if comma else "")
    value = value if isinstance(value, dict) else {"all": value}
    if "all" not in value:
        raise ValueError("must have a value for all layers besides those of single groups")
    return value


def _split_paths(value: Any) -> Any:
    """Comma-separated paths, unless the entire string is an existing path."""
    is_path = isinstance(value, str) and os.path.lexists(_expand_home(value))
    return [value] if is_path else _split(value)


def _sources(value: Any) -> Any:
    """A path, comma-separated paths, or a list of paths and ``{path, weight}`` mappings."""
    items = _split_paths(value)
    if not isinstance(items, list | tuple):
        items = [items]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _line_breaks(value: Any) -> Any:
    r"""``\n`` typed on a command line is a line break."""
    return value.replace("\\n", "\n") if isinstance(value, str) else value


def _contenders(value: Any) -> Any:
    """``"tli:half,dus,moe:drop"``, or a list of such words and ``{method, name, …}`` mappings."""
    items = _split(value)
    if not isinstance(items, list | tuple):
        items = [items]

    def read(item: Any) -> Any:
        if not isinstance(item, str):
            return item
        method, colon, start = item.strip().partition(":")
        return {"method": method} | ({"upcycle" if method == "moe" else "init": start} if colon else {})

    return [read(item) for item in items]


def one_of(choices: Collection[str]) -> pydantic.AfterValidator:
    """A validator for one of a list of words."""

    def check(word: str) -> str:
        if word not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(word, choices)}")
        return word

    return pydantic.AfterValidator(check)


def all_of(choices: Collection[str]) -> pydantic.AfterValidator:
    """A validator for several of a list of words, each only once."""

    def check(words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if word not in choices:
                raise ValueError(f"must be some of {', '.join(choices)}{nearest(word, choices)}")
        if not words or len(set(words)) != len(words):
            raise ValueError("must name at least one, and each only once")
        return words

    return pydantic.AfterValidator(check)


# Larger counts do not fit the arrays and random seeds that hold them.
_LARGEST = 2**31 - 1

Whole = Annotated[int, pydantic.BeforeValidator(_refuse_bool), pydantic.Field(ge=-_LARGEST, le=_LARGEST)]
Number = Annotated[float, pydantic.BeforeValidator(_refuse_bool)]
Layers = Annotated[tuple[Whole, ...], pydantic.BeforeValidator(_split)]
Text = Annotated[str, pydantic.BeforeValidator(_text)]
PathText = Annotated[str, pydantic.BeforeValidator(_text), pydantic.AfterValidator(_expand_home)]
Paths = Annotated[tuple[PathText, ...], pydantic.BeforeValidator(_split_paths)]
Words = Annotated[tuple[str, ...], pydantic.BeforeValidator(_split)]
Positive = Annotated[Whole, pydantic.Field(ge=1)]
Window = Annotated[Whole, pydantic.Field(ge=2)]
BatchSize = Annotated[Positive, pydantic.Field(le=2**20)]  # the host allocates a batch before anything can refuse it
Seeds = Annotated[Positive, pydantic.Field(le=1000)]
NotNegative = Annotated[Whole, pydantic.Field(ge=0)]
Fraction = Annotated[Number, pydantic.Field(ge=0, le=1)]
Amount = Annotated[Number, pydantic.Field(ge=0, allow_inf_nan=False)]
FloatType = Literal["float32", "bfloat16"]
Group = Literal["kept", "injected", "outer"]
Groups = Literal["all", "kept", "injected", "outer"]

Separator = Annotated[str | None, pydantic.BeforeValidator(_line_breaks)]
Amounts = Annotated[tuple[Amount, ...], pydantic.BeforeValidator(_split)]
Rates = Annotated[dict[Groups, Amount], pydantic.BeforeValidator(_by_group)]
Steps = Annotated[dict[Groups, NotNegative], pydantic.BeforeValidator(_by_group)]
Adam = Annotated[dict[Literal["b1", "b2", "eps"], Fraction], pydantic.BeforeValidator(_pairs)]
FloatTypes = Annotated[dict[Literal["param", "moment", "compute"], FloatType], pydantic.BeforeValidator(_pairs)]
Auxiliary = Annotated[dict[Literal["z", "balance"], Amount], pydantic.BeforeValidator(_pairs)]
Degrees = Annotated[dict[Literal["data", "fsdp", "expert", "tensor"], Whole], pydantic.BeforeValidator(_pairs)]
Timeouts = Annotated[dict[Literal["start", "heartbeat", "leave"], Positive], pydantic.BeforeValidator(_pairs)]
Tracked = Annotated[
    tuple[Annotated[str, pydantic.Field(pattern=r"^(tensorboard|wandb:.+)$")], ...], pydantic.BeforeValidator(_split)
]
Only = Annotated[tuple[Literal["all", "injected"], ...], pydantic.BeforeValidator(_split)]
Shape = Annotated[str | dict[str, Any] | None, pydantic.BeforeValidator(_text)]
Contenders = Annotated[tuple[dict[str, Any], ...], pydantic.BeforeValidator(_contenders)]


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Source:
    """A source of documents and its weight in the mixture."""

    path: PathText
    weight: Annotated[Number, pydantic.Field(gt=0, allow_inf_nan=False)] = 1.0


Sources = Annotated[tuple[Source, ...], pydantic.BeforeValidator(_sources)]


def option(
    default: Any, help: str, group: str, *, shown: str | None = None, choices: Collection[str] | None = None
) -> Any:
    """A configuration key.

    Args:
        help: one line for ``--help``, without the default.
        group: heading under which ``--help`` lists the flag.
        shown: the default in words, if ``default`` does not explain itself.
        choices: valid words, if the type does not list them.
    """
    metadata: Mapping[str, Any] = {"help": help, "group": group, "shown": shown, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
