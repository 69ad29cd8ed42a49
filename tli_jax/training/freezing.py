"""Which parameters train: the freeze map over layers, and the grouped stack that holds no gradients for frozen layers.

Layers are stored in *segments*. The first segment holds the frozen layers below the lowest trainable one; no gradient
ever flows through it. Each later segment is a run of equal *periods*: some trainable layers, then the frozen layers
above them. Equal periods share one compiled program, so evenly spaced layers need at most three segments.
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
    """One array of the grouped stack. Its shape, sharding, source tensors and update rule all follow from this.

    Attributes:
        name: path in the grouped tree, e.g. ``layers.1.0.mlp.up_proj.weight`` in segment 1, stack 0.
        tensor: name within a layer, or of a tensor outside the layers.
        dims: one dim letter per axis, ``L`` first in a stack.
        layers: model layers in this stack, in order; empty outside the layers.
        periods: number of periods in its segment; ``layers`` divides into that many equal parts.
        trains: whether the array is trainable.
        groups: learning-rate group of each layer, or of the one tensor outside the layers.
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
    """How a partly frozen model is stored.

    Attributes:
        trains: freeze map, True for each trainable layer.
        outer: trainable tensors outside the layers.
        injected: which layers the last growth injected.
    """

    trains: tuple[bool, ...]
    outer: frozenset[str]
    injected: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not any(self.trains) and not self.outer:
            raise UsageError("only, outer: nothing would train: select layers, or tensors outside the layers")

    @property
    def segments(self) -> list[tuple[int, tuple[int, ...]]]:
        """``(periods, stack sizes of one period)`` of each segment; trainable and frozen stacks alternate."""
        runs = [len(list(run)) for _, run in itertools.groupby(self.trains)]
        # A separate segment, because the last period may have the same stack sizes.
        bottom = [] if self.trains[0] else [(1, (runs.pop(0),))]
        periods = [tuple(runs[i : i + 2]) for i in range(0, len(runs), 2)]
        return bottom + [(len(list(equal)), sizes) for sizes, equal in itertools.groupby(periods)]

    @property
    def lowest(self) -> int:
        """Index of the lowest layer that gradients reach; the number of layers if they reach none."""
        if "embed_tokens" in self.outer:  # the embedding lies below all layers
            return 0
        return self.trains.index(True) if any(self.trains) else len(self.trains)

    def param_specs(self, config: LlamaConfig) -> list[ParamSpec]:
        """All arrays: first those outside the layers, then the stacks from the bottom up."""
        specs = []
        for name, dims in config.outer_tensors.items():
            specs.append(ParamSpec(name, name, dims, (), 1, name.split(".")[0] in self.outer, ("outer",)))
        first = 0
        for segment, (periods, sizes) in enumerate(self.segments):
            length = sum(sizes)
            for stack, size in enumerate(sizes):
                start = first + sum(sizes[:stack])
                layers = tuple(start + period * length + i for period in range(periods) for i in range(size))
                groups: tuple[Group, ...] = tuple("injected" if self.injected[i] else "kept" for i in layers)
                for tensor, dims in config.layer_tensors.items():
                    name = f"layers.{segment}.{stack}.{tensor}"
                    specs.append(ParamSpec(name, tensor, ("L", *dims), layers, periods, self.trains[start], groups))
            first += periods * length
        return specs


def make_layout(config: LlamaConfig, injected: Sequence[bool] | None, only: str, outer: str | None) -> Layout:
    """Layout for the options ``only`` and ``outer``.

    Args:
        injected: True for each injected layer, as in ``Plan.injected``; None if the model was not grown.
        only: trainable layers: ``all``, ``injected``, ``last_n(N)`` or ``layers(0,3,7-9)``.
        outer: trainable tensors outside the layers: ``all``, ``none`` or a comma-separated list. None means ``all``
            if all layers train, else ``none``.

    Raises:
        UsageError: an option has another form, names a layer or tensor that the model does not have, selects nothing,
            or asks for the injected layers of a model that was not grown.
    """
    L = config.num_hidden_layers
    names = [name.split(".")[0] for name in config.outer_tensors]
    if outer is None:
        outer = "all" if only == "all" else "none"
    chosen = {"all": names, "none": []}.get(outer, [part.strip() for part in outer.split(",") if part.strip()])
    for name in chosen:
        if name not in names:
            raise UsageError(f"outer: {name!r} is not a tensor of this model: choose all, none, or {', '.join(names)}")
    form = re.fullmatch(r"(all|injected)|last_n\((\d+)\)|layers\(([\d\s,-]*)\)", only.strip())
    if form is None:
        raise UsageError(f"only: {only!r} is not valid: choose all, injected, last_n(N) or layers(0,3,7-9)")
    word, count, listed = form.groups()
    if word == "injected" and injected is None:
        raise UsageError("only: injected needs a grown model (with growth.json): grow the model first, or train all")
    if word == "injected":
        trains = tuple(injected or ())
    elif word == "all":
        trains = (True,) * L
    elif count is not None:
        if not 1 <= int(count) <= L:
            raise UsageError(f"only: last_n({count}) is out of range: the model has {L} layers, choose 1 to {L}")
        trains = tuple(i >= L - int(count) for i in range(L))
    else:
        layers = _parse_layers(listed, L)
        trains = tuple(i in layers for i in range(L))
    return Layout(trains, frozenset(chosen), tuple(injected or (False,) * L))


def _parse_layers(text: str, L: int) -> set[int]:
    layers: set[int] = set()
    for part in (part.strip() for part in text.split(",") if part.strip()):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"only: {part!r} is not a layer or a range of layers: write layers(0,3,7-9)")
        end = int(last) if dash else int(first)
        if not int(first) <= end < L:
            raise UsageError(f"only: {part} is out of range: the model has layers 0 to {L - 1}")
        layers |= set(range(int(first), end + 1))
    return layers


Arrays = dict[str, jax.Array]


def group(params: Mapping[str, Any], specs: Sequence[ParamSpec]) -> tuple[Arrays, Arrays]:
    """Split layer-stacked params into ``(trained, frozen)`` arrays by ``ParamSpec.name``. A pure function."""
    parts: tuple[Arrays, Arrays] = ({}, {})
    for spec in specs:
        array = pick(params, f"layers.{spec.tensor}" if spec.layers else spec.tensor)
        parts[not spec.trains][spec.name] = array[np.asarray(spec.layers)] if spec.layers else array
    return parts


def ungroup(trained: Arrays, frozen: Arrays, specs: Sequence[ParamSpec]) -> dict[str, Any]:
    """The inverse of ``group``. If the stacks of a tensor differ in dtype, they are promoted to a common one."""
    arrays = trained | frozen
    flat = {spec.name: arrays[spec.name] for spec in specs if not spec.layers}
    for tensor in dict.fromkeys(spec.tensor for spec in specs if spec.layers):
        stacks = [spec for spec in specs if spec.layers and spec.tensor == tensor]
        order = np.argsort(np.concatenate([spec.layers for spec in stacks]))
        flat[f"layers.{tensor}"] = jnp.concatenate([arrays[spec.name] for spec in stacks])[order]
    return nest(flat)


def as_model(trained: Arrays, frozen: Arrays, specs: Sequence[ParamSpec]) -> dict[str, Any]:
    """Params for ``Llama`` straight from the grouped stack: stacks are reshaped into periods, nothing is copied."""
    arrays = trained | frozen
    tree = nest(
        {
            spec.name: arrays[spec.name].reshape(spec.periods, -1, *arrays[spec.name].shape[1:])
            if spec.layers
            else arrays[spec.name]
            for spec in specs
        }
    )
    layers = tree["layers"]
    tree["layers"] = [
        [layers[segment][stack] for stack in sorted(layers[segment], key=int)] for segment in sorted(layers, key=int)
    ]
    return tree
