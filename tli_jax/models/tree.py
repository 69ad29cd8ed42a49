"""Params by dotted name: ``"layers.mlp.up_proj.weight"`` is ``params["layers"]["mlp"]["up_proj"]["weight"]``."""

import functools
import operator
from collections.abc import Mapping
from typing import Any


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": x}`` -> ``{"a": {"b": x}}``."""
    from flax import traverse_util  # here, because it imports JAX

    return traverse_util.unflatten_dict(dict(flat), sep=".")


def pick(tree: Mapping[str, Any], name: str) -> Any:
    """The leaf or subtree called ``name``."""
    return functools.reduce(operator.getitem, name.split("."), tree)
