"""A row of a plan: how one layer of a grown model is built from the layers of its base.

``Row.action`` alone defines what a row means for a tensor, both in memory (``growth.inject``) and from file to file
(``hf.grown_tensors``).
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Literal

# Initialiser -> factor on the residual outputs of an injected layer, by default. ``scaled`` has none.
INITS: dict[str, float | None] = {
    "copy": 1.0,
    "identity": 0.0,
    "scaled": None,
    "half": 0.5,
    "average": 1.0,
    "average_identity": 0.0,
    "next_identity": 0.0,
    "noise": 1.0,
    "random": 1.0,
    "transport": 0.0,
    "predictor": 1.0,
}
# Computed from one tensor and a random key, or on the host from the layers of the base.
RANDOM_INITS, HOST_INITS = ("noise", "random"), ("transport", "predictor")
COMPUTED_INITS = (*RANDOM_INITS, *HOST_INITS)
KEEP = "keep"
# The only tensors through which a layer writes to the residual stream. w2 is the down projection of an expert.
RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "w2")

Action = Literal["copy", "zero", "combine", "compute"]


def is_residual_output(name: str, outputs: Collection[str] = RESIDUAL_OUTPUTS) -> bool:
    """Whether a row's scale applies to the tensor called ``name`` within a layer. This includes biases."""
    return not set(name.split(".")).isdisjoint(outputs)


@dataclasses.dataclass(frozen=True)
class Row:
    """How one layer of the grown model is built.

    Args:
        sources: base layers and their weights. A tensor is their weighted sum in fp32, rounded once.
        scale: factor on the residual outputs (``o_proj``, ``down_proj``). 0 makes the layer the identity.
        init: name of the initialiser, or ``keep`` for a kept layer.
        injected: whether the last growth injected the layer.
        generation: the growth that injected the layer; 0 for layers of the first base.

    Example:
        >>> Row(((3, 1.0),))  # layer 3, kept
        >>> Row(((3, 0.5), (4, 0.5)), 0.0, "average_identity", injected=True, generation=1)
    """

    sources: tuple[tuple[int, float], ...]
    scale: float = 1.0
    init: str = KEEP
    injected: bool = False
    generation: int = 0

    def action(self, is_output: bool) -> Action:
        """What happens to a tensor of this layer.

        ``copy``: the bytes of the source. ``zero``: all zeros. ``combine``: the weighted sum of the sources, times the
        scale. ``compute``: the result of the initialiser, times the scale.

        Args:
            is_output: whether the tensor is a residual output.
        """
        if is_output and self.scale == 0:
            return "zero"
        if self.init in COMPUTED_INITS:
            return "compute"
        is_copy = len(self.sources) == 1 and self.sources[0][1] == 1 and self.factor(is_output) == 1
        return "copy" if is_copy else "combine"

    def factor(self, is_output: bool) -> float:
        """The factor on a tensor."""
        return self.scale if is_output else 1.0

    @property
    def is_base_layer(self) -> bool:
        """Whether the layer is a bit-exact copy of a base layer."""
        return self.action(is_output=True) == "copy"


def make_rows(order: Iterable[Row]) -> tuple[Row, ...]:
    """Mark each row as kept or injected. The first exact copy of each base layer is kept, all others are injected.

    A base layer without an exact copy is kept where it first occurs with scaled outputs.
    """
    order = list(order)
    with_copy = {row.sources[0][0] for row in order if row.is_base_layer}
    kept: set[int] = set()
    rows = []
    for row in order:
        layer = row.sources[0][0] if len(row.sources) == 1 else None
        is_candidate = row.is_base_layer or (layer not in with_copy and row.init in (KEEP, "half"))
        is_kept = layer is not None and layer not in kept and is_candidate
        if is_kept and layer is not None:
            kept.add(layer)
        init = KEEP if is_kept else "copy" if row.init == KEEP else row.init
        rows.append(dataclasses.replace(row, init=init, injected=not is_kept, generation=int(not is_kept)))
    return tuple(rows)


def label(row: Row) -> str:
    """A short label: ``3``, ``3·0.5``, ``3+4·0``, with ``~`` if an initialiser computes the layer."""
    text = "+".join(str(layer) for layer, _ in row.sources) + ("~" if row.init in COMPUTED_INITS else "")
    return text if row.scale == 1 else f"{text}·{row.scale:g}"
