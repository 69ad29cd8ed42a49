"""Param trees by dotted names: ``"layers.mlp.up_proj.weight"`` is ``tree["layers"]["mlp"]["up_proj"]["weight"]``."""

import functools
from collections.abc import Mapping
from typing import Any


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": x}`` -> ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def pick(tree: Mapping[str, Any], name: str) -> Any:
    """The leaf, or the subtree, of that name."""
    return functools.reduce(lambda node, key: node[key], name.split("."), tree)
