"""The keys of a configuration, those of its sections included."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args


def difference(before: Any, after: Any, may_change: Sequence[str]) -> str:
    """The keys that differ between two configurations, except those that may, with both values."""
    old, new = _flat_values(before), _flat_values(after)
    keys = [key for key in old | new if key not in may_change and old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)


def _flat_values(config: Any) -> dict[str, Any]:
    """The values of a configuration, those of a section with a dotted name."""
    values = dataclasses.asdict(config)
    for name in find_sections(type(config)):
        values |= {f"{name}.{key}": value for key, value in (values.pop(name) or {}).items()}
    return values


def find_sections(kind: Any) -> dict[str, Any]:
    """The keys of a configuration that hold a configuration."""
    return {
        field.name: part
        for field in dataclasses.fields(kind)
        for part in get_args(field.type)
        if isinstance(part, type) and dataclasses.is_dataclass(part)
    }


def flat_fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """All keys, those of a section with a dotted name. A configuration's own keys precede those it inherits."""
    sections = find_sections(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name not in vars(kind)["__annotations__"])
    flat = {field.name: field for field in fields if field.name not in sections}
    for name, part in sections.items():
        flat |= {f"{name}.{key}": field for key, field in flat_fields(part).items()}
    return flat
