"""Types of a configuration's keys: how what stands in YAML, or on a command line, is read, and what it may be."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass


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
    if isinstance(value, float):
        raise ValueError("is a number to YAML, and 1.10 would become 1.1: put the text in quotes")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _home(path: str) -> str:
    """``~`` at the start of a path is the home folder; the system's own calls would take it as a name."""
    if "\0" in path:
        raise ValueError("must not hold a NUL character")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"no home folder of that user is known: write ./{path} for a file here") from None


def _pairs(value: Any) -> Any:
    """``"data=2,fsdp=4"`` from the command line is a mapping."""
    if not isinstance(value, str):
        return value
    parts = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign for _, sign, _ in parts):
        raise ValueError("must be name=value, separated by commas")
    return {name.strip(): amount.strip() for name, _, amount in parts}


def _by_group(value: Any) -> Any:
    """``1e-4``, or ``"1e-4,injected=1e-3"``, or a mapping with ``all`` in it."""
    if isinstance(value, str):
        first, comma, others = value.partition(",")
        value = _pairs(value) if "=" in first else {"all": first.strip()} | _pairs(others if comma else "")
    value = value if isinstance(value, dict) else {"all": value}
    if "all" not in value:
        raise ValueError("must have a value for all, beside those of some groups")
    return value


def _split_paths(value: Any) -> Any:
    """Paths with commas between, unless the whole is a path that exists."""
    is_path = isinstance(value, str) and os.path.lexists(_home(value))
    return [value] if is_path else _split(value)


def _sources(value: Any) -> Any:
    """A path, paths with commas between, or a list of paths and of sources."""
    listed = _split_paths(value)
    if not isinstance(listed, list | tuple):
        listed = [listed]
    return [{"path": one} if isinstance(one, str) else one for one in listed]


def _line_breaks(value: Any) -> Any:
    r"""``\n`` typed on a command line is a line break."""
    return value.replace("\\n", "\n") if isinstance(value, str) else value


def _contenders(value: Any) -> Any:
    """``"tli:half,dus,moe:drop"``, or a list of such words and of mappings ``{method, name, …}``."""
    listed = _split(value)
    if not isinstance(listed, list | tuple):
        listed = [listed]

    def read(one: Any) -> Any:
        if not isinstance(one, str):
            return one
        method, colon, start = one.strip().partition(":")
        return {"method": method} | ({"upcycle" if method == "moe" else "init": start} if colon else {})

    return [read(one) for one in listed]


# No count of anything is larger, and all arrays and random seeds can hold it.
_LARGEST = 2**31 - 1

Whole = Annotated[int, pydantic.BeforeValidator(_refuse_bool), pydantic.Field(ge=-_LARGEST, le=_LARGEST)]
Number = Annotated[float, pydantic.BeforeValidator(_refuse_bool)]
Layers = Annotated[tuple[Whole, ...], pydantic.BeforeValidator(_split)]
Text = Annotated[str, pydantic.BeforeValidator(_text)]
PathText = Annotated[str, pydantic.BeforeValidator(_text), pydantic.AfterValidator(_home)]
Paths = Annotated[tuple[PathText, ...], pydantic.BeforeValidator(_split_paths)]
Positive = Annotated[Whole, pydantic.Field(ge=1)]
BatchSize = Annotated[Positive, pydantic.Field(le=2**20)]  # a batch is allocated on the host before anything can refuse
Seeds = Annotated[Positive, pydantic.Field(le=1000)]
NotNegative = Annotated[Whole, pydantic.Field(ge=0)]
Fraction = Annotated[Number, pydantic.Field(ge=0, le=1)]
Amount = Annotated[Number, pydantic.Field(ge=0, allow_inf_nan=False)]
FloatType = Literal["float32", "bfloat16"]
Group = Literal["kept", "injected", "outer"]
Groups = Literal["all", "kept", "injected", "outer"]

Separator = Annotated[str | None, pydantic.BeforeValidator(_line_breaks)]
Rates = Annotated[dict[Groups, Amount], pydantic.BeforeValidator(_by_group)]
Steps = Annotated[dict[Groups, NotNegative], pydantic.BeforeValidator(_by_group)]
Adam = Annotated[dict[Literal["b1", "b2", "eps"], Fraction], pydantic.BeforeValidator(_pairs)]
FloatTypes = Annotated[dict[Literal["param", "moment", "compute"], FloatType], pydantic.BeforeValidator(_pairs)]
Auxiliary = Annotated[dict[Literal["z", "balance"], Amount], pydantic.BeforeValidator(_pairs)]
Degrees = Annotated[dict[Literal["data", "fsdp", "expert", "tensor"], Whole], pydantic.BeforeValidator(_pairs)]
Tracked = Annotated[
    tuple[Annotated[str, pydantic.Field(pattern=r"^(tensorboard|wandb:.+)$")], ...], pydantic.BeforeValidator(_split)
]
Only = Annotated[tuple[Literal["all", "injected"], ...], pydantic.BeforeValidator(_split)]
Shape = Annotated[str | dict[str, Any] | None, pydantic.BeforeValidator(_text)]
Contenders = Annotated[tuple[dict[str, Any], ...], pydantic.BeforeValidator(_contenders)]


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Source:
    """Something to read documents from, and its share in the mixture."""

    path: PathText
    weight: Annotated[Number, pydantic.Field(gt=0, allow_inf_nan=False)] = 1.0


Sources = Annotated[tuple[Source, ...], pydantic.BeforeValidator(_sources)]


def option(default: Any, text: str) -> Any:
    """A key with its default and its line of help."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})
