"""Reading the plan in a ``growth.json``, with the type of every value checked."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
# Types of the options that are computed with. Others are kept as they are.
_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("every", "copies", "groups", "drop", "times", "block", "count", "epochs", "seed"), int),
    **dict.fromkeys(("scale", "std", "noise_ratio"), _NUMBER),
    **dict.fromkeys(("init", "norms", "layers"), str),
}
_LIST_OPTIONS = {"after": int, "importance": _NUMBER}


def read_field(kind: Any, record: Any, key: Any) -> Any:
    """Return ``record[key]``, checked to be of type ``kind``. A bool is not a number; numbers must be finite.

    Raises:
        KeyError: the key is missing.
        TypeError: the value has another type.
    """
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    is_finite = type(value) is not float or math.isfinite(value)
    if type(value) not in kinds or not is_finite or (type(value) is int and abs(value) >= 2**63):
        raise TypeError(f"{key} is {reprlib.repr(value)}, must be {_NAMES[kinds[-1]]}")
    return value


def read_list(kind: Any, record: Any, key: Any) -> list[Any]:
    """Return ``record[key]``, checked to be a list of ``kind``. Raises as ``read_field`` does."""
    values = read_field(list, record, key)
    return [read_field(kind, values, i) for i in range(len(values))]


def read_plan_fields(record: Mapping[str, Any], first_base: int) -> dict[str, Any]:
    """Return the fields of ``Plan`` but its history, each row as the fields of ``Row``.

    Args:
        first_base: number of layers of the first base, to which the layer map refers.

    Raises:
        KeyError, TypeError, ValueError: a key is missing or invalid.
    """
    options = read_field(dict, record, "options")
    for key in options.keys() & _OPTIONS.keys():
        read_field(_OPTIONS[key], options, key)
    for key in options.keys() & _LIST_OPTIONS.keys():
        read_list(_LIST_OPTIONS[key], options, key)
    layer_map = read_list(list, record, "layer_map")
    layer_map = tuple(tuple(read_list(int, layer_map, i)) for i in range(len(layer_map)))
    for layers in layer_map:
        if not layers or not all(0 <= layer < first_base for layer in layers):
            raise ValueError(f"layer_map has {reprlib.repr(list(layers))}, must be layers of the first base")
    return {
        "method": read_field(str, record, "method"),
        "base_layers": read_field(int, read_field(dict, record, "base"), "layers"),
        "rows": [_read_row(row) for row in read_list(dict, record, "rows")],
        "options": options,
        "notes": tuple(read_list(str, record, "notes")) if "notes" in record else (),
        "layer_map": layer_map,
        "experts": None if record.get("experts") is None else read_field(dict, record, "experts"),
    }


def _read_row(record: Mapping[str, Any]) -> tuple[Any, ...]:
    sources = []
    for pair in read_list(list, record, "sources"):
        if len(pair) != 2:
            raise ValueError(f"sources has {reprlib.repr(pair)}, must be a layer and a weight")
        sources.append((read_field(int, pair, 0), float(read_field(_NUMBER, pair, 1))))
    scale, init = float(read_field(_NUMBER, record, "scale")), read_field(str, record, "init")
    return tuple(sources), scale, init, read_field(bool, record, "injected"), read_field(int, record, "generation")
