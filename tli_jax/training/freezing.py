"""What trains: the freeze map over layers, and the grouped stack in which only what trains has a gradient.

Layers are held in *segments*: first the frozen layers below the lowest one that trains, through which nothing is ever
differentiated; then runs of *periods*, each some layers that train and the frozen ones above them. Equal periods share
one program, so TLI's even spacing makes three segments at most, and positions by hand as many as they need.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tli_jax.cli.values import Group
from tli_jax.errors import UsageError
from tli_jax.models.config import LlamaConfig
from tli_jax.models.tree import nest, pick


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the grouped stack, described once: its shape, its place, how it is read and how it is updated.

    Args:
        name: in the grouped tree, e.g. ``layers.1.0.mlp.up_proj.weight``: segment 1, stack 0.
        tensor: the name within a layer, or of a tensor outside the layers.
        dims: by letter, ``L`` first in a stack.
        layers: which layers of the model it holds, in order; empty outside the layers.
        periods: of its segment; ``layers`` are as many equal parts.
        trains: whether it has a gradient.
        groups: for each layer, or once outside the layers, whose learning rate applies.
    """

    name: str
    tensor: str
    dims: tuple[str, ...]
    layers: tuple[int, ...]
    periods: int
    trains: bool
    groups: tuple[Group, ...]

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        sizes = config.sizes | {"L": len(self.layers)}
        return tuple(sizes[dim] for dim in self.dims)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays of a model of which some layers train.

    Args:
        trains: the freeze map, a truth value a layer.
        outer: tensors outside the layers that train.
        injected: which layers the last growth put there.
    """

    trains: tuple[bool, ...]
    outer: frozenset[str]
    injected: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not any(self.trains) and not self.outer:
            raise UsageError("only, outer: nothing would train: choose some layers, or tensors outside them")

    @property
    def segments(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of each segment the number of its periods, and the sizes of a period's stacks; they train in turns."""
        runs = [len(list(run)) for _, run in itertools.groupby(self.trains)]
        # Apart from the periods, of which one that ends with the model may have the same sizes.
        lead = [] if self.trains[0] else [(1, (runs.pop(0),))]
        periods = [tuple(runs[i : i + 2]) for i in range(0, len(runs), 2)]
        return lead + [(len(list(equal)), sizes) for sizes, equal in itertools.groupby(periods)]

    def param_specs(self, config: LlamaConfig) -> list[ParamSpec]:
        """Every array, in the order of the model."""
        found = []
        for name, dims in config.outer_tensors.items():
            found.append(ParamSpec(name, name, dims, (), 1, name.split(".")[0] in self.outer, ("outer",)))
        first = 0
        for number, (periods, sizes) in enumerate(self.segments):
            length = sum(sizes)
            for stack, size in enumerate(sizes):
                start = first + sum(sizes[:stack])
                layers = tuple(start + period * length + i for period in range(periods) for i in range(size))
                groups: tuple[Group, ...] = tuple("injected" if self.injected[i] else "kept" for i in layers)
                for tensor, dims in config.layer_tensors.items():
                    name = f"layers.{number}.{stack}.{tensor}"
                    found.append(ParamSpec(name, tensor, ("L", *dims), layers, periods, self.trains[start], groups))
            first += periods * length
        return found


def make_layout(config: LlamaConfig, injected: Sequence[bool] | None, only: str, outer: str | None) -> Layout:
    """Read ``only`` and ``outer`` of a configuration.

    Args:
        injected: mask over the layers, from the plan that the model was grown by; None if it was not.

    Raises:
        UsageError: not one of the forms, a layer that is not there, or ``injected`` of a model that was not grown.
    """
    L = config.num_hidden_layers
    names = [name.split(".")[0] for name in config.outer_tensors]
    if outer is None:
        outer = "all" if only == "all" else "none"
    chosen = {"all": names, "none": []}.get(outer, [part.strip() for part in outer.split(",") if part.strip()])
    for name in chosen:
        if name not in names:
            raise UsageError(f"outer: {name!r} is not a tensor of this model: all, none, or of {', '.join(names)}")
    form = re.fullmatch(r"(all|injected)|last_n\((\d+)\)|layers\(([\d\s,-]*)\)", only.strip())
    if form is None:
        raise UsageError(f"only: {only!r} is not known: all, injected, last_n(N) or layers(0,3,7-9)")
    word, count, listed = form.groups()
    if word == "injected" and injected is None:
        raise UsageError("only: injected needs a model that was grown (growth.json): grow it, or train all")
    if word == "injected":
        trains = tuple(injected or ())
    elif word == "all":
        trains = (True,) * L
    elif count is not None:
        if not 1 <= int(count) <= L:
            raise UsageError(f"only: last_n({count}) is out of range, the model has {L} layers: 1…{L}")
        trains = tuple(i >= L - int(count) for i in range(L))
    else:
        layers = _ranges(listed, L)
        trains = tuple(i in layers for i in range(L))
    return Layout(trains, frozenset(chosen), tuple(injected or (False,) * L))


def _ranges(text: str, L: int) -> set[int]:
    layers: set[int] = set()
    for part in (part.strip() for part in text.split(",") if part.strip()):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"only: {part!r} is not a layer or a range of layers: layers(0,3,7-9)")
        end = int(last) if dash else int(first)
        if not int(first) <= end < L:
            raise UsageError(f"only: {part} is out of range, the model has layers 0…{L - 1}")
        layers |= set(range(int(first), end + 1))
    return layers


Arrays = dict[str, jax.Array]


def group(params: Mapping[str, Any], leaves: Sequence[ParamSpec]) -> tuple[Arrays, Arrays]:
    """Cut layer-stacked params into what trains and what does not, by the names of ``leaves``. Pure."""
    parts: tuple[Arrays, Arrays] = ({}, {})
    for leaf in leaves:
        prefix = "layers." if leaf.layers else ""
        whole = pick(params, prefix + leaf.tensor)
        parts[not leaf.trains][leaf.name] = whole[np.asarray(leaf.layers)] if leaf.layers else whole
    return parts


def ungroup(trained: Arrays, frozen: Arrays, leaves: Sequence[ParamSpec]) -> dict[str, Any]:
    """The inverse of ``group``. Where a tensor trains in some layers only, all become of the dtype that holds both."""
    flat = {leaf.name: (trained | frozen)[leaf.name] for leaf in leaves if not leaf.layers}
    for tensor in dict.fromkeys(leaf.tensor for leaf in leaves if leaf.layers):
        parts = [leaf for leaf in leaves if leaf.layers and leaf.tensor == tensor]
        order = np.argsort(np.concatenate([leaf.layers for leaf in parts]))
        flat[f"layers.{tensor}"] = jnp.concatenate([(trained | frozen)[leaf.name] for leaf in parts])[order]
    return nest(flat)


def as_model(trained: Arrays, frozen: Arrays, leaves: Sequence[ParamSpec]) -> dict[str, Any]:
    """Params that ``Llama`` runs as they are grouped: no copy, the layers split in periods."""
    arrays = trained | frozen
    tree = nest(
        {
            leaf.name: arrays[leaf.name].reshape(leaf.periods, -1, *arrays[leaf.name].shape[1:])
            if leaf.layers
            else arrays[leaf.name]
            for leaf in leaves
        }
    )
    layers = tree["layers"]
    tree["layers"] = [
        [layers[segment][stack] for stack in sorted(layers[segment], key=int)] for segment in sorted(layers, key=int)
    ]
    return tree
