"""The plan: plain data that says of what each layer of a grown model is made.

One row a grown layer. What a row means for a tensor is defined here once (``Row.action``) and read by the in-memory
operator (``growth.inject``) and by the out-of-core one (``checkpoint.stream``) alike.
"""

import dataclasses
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.experts import Experts

VERSION = 1
INITS = (
    "copy",
    "identity",
    "scaled",
    "half",
    "average",
    "average_identity",
    "next_identity",
    "noise",
    "random",
    "transport",
    "predictor",
)
# Of one tensor and a random key; or on the host, of the base's layers as they are.
RANDOM_INITS, HOST_INITS = ("noise", "random"), ("transport", "predictor")
COMPUTED_INITS = (*RANDOM_INITS, *HOST_INITS)
KEEP = "keep"
# Far above any sense; what makes more rows is stopped before it fills the memory.
MAX_LAYERS = 10_000
# The only tensors through which a layer reaches the residual stream; w2 is an expert's down projection.
RESIDUAL_OUTPUTS = ("o_proj", "down_proj", "w2")

Exactness = Literal["bit", "arithmetic", "none"]
Action = Literal["copy", "zero", "combine", "compute"]


def is_residual_output(name: str, outputs: Collection[str] = RESIDUAL_OUTPUTS) -> bool:
    """Whether a row's scale multiplies the tensor of that name within a layer; its bias counts too."""
    return not set(name.split(".")).isdisjoint(outputs)


@dataclasses.dataclass(frozen=True)
class Row:
    """How one layer of the grown model is made.

    Args:
        sources: base layers and their weights; tensors are the weighted sum, in fp32, rounded once.
        scale: factor on the residual outputs (``o_proj``, ``down_proj``), biases included; 0 makes the layer the
            identity.
        init: name of the initialiser, ``keep`` for a kept layer.
        injected: whether the last growth put the layer there.
        generation: which growth put it there; 0 for a layer of the first base.
    """

    sources: tuple[tuple[int, float], ...]
    scale: float = 1.0
    init: str = KEEP
    injected: bool = False
    generation: int = 0

    def action(self, is_output: bool) -> Action:
        """What happens to one tensor of the layer: the definition of a row.

        ``zero``: all zeros. ``compute``: the initialiser named by ``init`` makes it, then ``scale`` applies.
        ``copy``: bytes of the one source. ``combine``: weighted sum of the sources, then ``scale``.
        """
        if is_output and self.scale == 0:
            return "zero"
        if self.init in COMPUTED_INITS:
            return "compute"
        plain = len(self.sources) == 1 and self.sources[0][1] == 1 and not (is_output and self.scale != 1)
        return "copy" if plain else "combine"

    def factor(self, is_output: bool) -> float:
        """The scale that applies to a tensor."""
        return self.scale if is_output else 1.0

    @property
    def is_base_layer(self) -> bool:
        """Whether the layer is one base layer, bit for bit."""
        return self.action(is_output=True) == "copy"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What growth does to a base of ``base_layers`` layers. Validated when made; plain data, to and from JSON.

    Args:
        rows: how each layer is made.
        experts: what is made of the feed-forwards of those layers; None leaves them as they are.

    Raises:
        UsageError: a row names a layer that the base does not have, or there are no rows.
    """

    method: str
    base_layers: int
    rows: tuple[Row, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layer_map: tuple[tuple[int, ...], ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    experts: Experts | None = None

    def __post_init__(self) -> None:
        check_depth(self.method, len(self.rows))
        if not self.rows:
            raise UsageError(f"{self.method}: the plan leaves no layer at all: keep at least one of {self.base_layers}")
        for number, row in enumerate(self.rows):
            for layer, weight in row.sources:
                if not 0 <= layer < self.base_layers:
                    raise UsageError(
                        f"{self.method}: layer {number} is made of {layer}, the base has 0…{self.base_layers - 1}"
                    )
                if not math.isfinite(weight):
                    raise UsageError(f"{self.method}: layer {number} has a weight of {weight}, use a finite number")
            if not math.isfinite(row.scale):
                raise UsageError(f"{self.method}: layer {number} has a scale of {row.scale}, use a finite number")
            if not row.sources:
                raise UsageError(f"{self.method}: layer {number} has no source")
        if not self.layer_map:
            object.__setattr__(self, "layer_map", tuple(tuple(s for s, _ in row.sources) for row in self.rows))

    def __hash__(self) -> int:
        # By hand because options are a mapping: a plan can be a static argument under jit.
        return hash((self.method, self.base_layers, self.rows, self.experts))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def injected(self) -> tuple[bool, ...]:
        """Mask over the grown layers: which ones the last growth put there."""
        return tuple(row.injected for row in self.rows)

    @property
    def guarantee(self) -> Exactness:
        """What the plan promises. ``bit``: every base layer exactly once and in order, all others add nothing.
        ``arithmetic``: and experts are made that come to the same but for rounding."""
        through = [row for row in self.rows if row.scale != 0]
        in_order = [row.sources[0][0] for row in through if row.is_base_layer] == list(range(self.base_layers))
        if not (in_order and all(row.is_base_layer for row in through)):
            return "none"
        return "bit" if self.experts is None else "arithmetic" if self.experts.is_exact else "none"

    @property
    def is_by_kind(self) -> bool:
        """Whether tensors should be made kind by kind, not layer by layer: what learns from a kind, learns it once."""
        return any(row.init == "predictor" for row in self.rows)

    @property
    def is_exact(self) -> bool:
        """Whether the grown model is promised to be the same function as the base, bit for bit."""
        return self.guarantee == "bit"

    @property
    def generation(self) -> int:
        """Number of growths since the first base."""
        return 1 + len(self.history)

    def continues(self, earlier: "Plan") -> "Plan":
        """This plan, made for the model that ``earlier`` gave, with one layer map back to the first base.

        The rows still say what is done to *this* plan's base, and ``history`` says how that came to be; see
        ``compose`` for one plan that does both at once.

        Raises:
            UsageError: the depths do not fit together.
        """
        if self.base_layers != len(earlier):
            raise UsageError(
                f"{self.method}: made for a base of {self.base_layers} layers, {earlier.method} gives {len(earlier)}"
            )

        def through(row: Row) -> tuple[int, ...]:
            return tuple(dict.fromkeys(first for layer, _ in row.sources for first in earlier.layer_map[layer]))

        rows = tuple(
            dataclasses.replace(
                row,
                generation=earlier.generation + 1 if row.injected else earlier.rows[row.sources[0][0]].generation,
            )
            for row in self.rows
        )
        step = {key: value for key, value in earlier.to_json().items() if key != "history"}
        return dataclasses.replace(
            self, rows=rows, layer_map=tuple(through(row) for row in rows), history=(*earlier.history, step)
        )

    def compose(self, earlier: "Plan") -> "Plan":
        """One plan that does ``earlier`` and then this, straight from the base of ``earlier``.

        Raises:
            UsageError: the depths do not fit, a row computes (see ``COMPUTED_INITS``), or a row mixes layers whose
                residual outputs were scaled differently; then only ``continues`` can keep track.
        """
        both = self.continues(earlier)
        if self.experts or earlier.experts:
            raise UsageError(f"{self.method}: a growth that makes experts cannot be written as one step with another")
        rows = []
        for number, row in enumerate(both.rows):
            parents = [(earlier.rows[layer], weight) for layer, weight in row.sources]
            scales = {parent.scale for parent, _ in parents}
            if row.init in COMPUTED_INITS or any(p.init in COMPUTED_INITS for p, _ in parents) or len(scales) != 1:
                raise UsageError(f"{self.method}: layer {number} cannot be written as one step from the first base")
            weights: dict[int, float] = {}
            for parent, weight in parents:
                for layer, inner in parent.sources:
                    weights[layer] = weights.get(layer, 0.0) + weight * inner
            rows.append(dataclasses.replace(row, sources=tuple(weights.items()), scale=row.scale * scales.pop()))
        return dataclasses.replace(both, base_layers=earlier.base_layers, rows=tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """The plan as the keys of ``growth.json`` that it knows."""
        return {
            "version": VERSION,
            "method": self.method,
            "options": dict(self.options),
            "base": {"layers": self.base_layers},
            "rows": [{**dataclasses.asdict(row), "sources": [list(s) for s in row.sources]} for row in self.rows],
            "layer_map": [list(layers) for layers in self.layer_map],
            "injected": list(self.injected),
            "trainable": list(self.injected),
            "experts": self.experts and self.experts.to_json(),
            "guarantee": self.guarantee,
            "notes": list(self.notes),
            "history": list(self.history),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str = "growth.json") -> "Plan":
        """Read a plan back; keys that are not the plan's own (digests, proof, …) are left alone.

        Raises:
            DataError: not a plan of this version, or a key is missing or wrong.
        """
        if type(record.get("version")) is not int or record["version"] != VERSION:
            version = reprlib.repr(record.get("version"))
            raise DataError(f"{where}: version {version} is not {VERSION}: written by another tli_jax")
        try:
            history = _as(list, record, "history")
            # Each step is a plan too, and the first base is that of the first of them.
            first = _as(int, _as(dict, _as(dict, history, 0) if history else record, "base"), "layers")
            for at in range(len(history)):
                _read_plan(_as(dict, history, at), at, first)
            return dataclasses.replace(_read_plan(record, len(history), first), history=tuple(history))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise DataError(f"{where}: not a growth plan ({what}): fix or delete it") from error

    def __str__(self) -> str:
        return f"{self.method}: {self.base_layers} → {len(self)} layers\n{draw_layer_map(self)}"


def check_depth(method: str, layers: int) -> None:
    """Refuse a plan of more than ``MAX_LAYERS`` layers, before its rows are made.

    Raises:
        UsageError: it has more.
    """
    if layers > MAX_LAYERS:
        raise UsageError(
            f"{method}: {layers:,} layers are more than the {MAX_LAYERS:,} that a plan can have: ask for less"
        )


def _as(kind: Any, record: Any, key: Any) -> Any:
    """``record[key]``, which must be of that type; a bool is no number, and a number must be finite.

    Raises:
        KeyError, TypeError: it is not there, or something else.
    """
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    is_finite = type(value) is not float or math.isfinite(value)
    if type(value) not in kinds or not is_finite or (type(value) is int and abs(value) >= 2**63):
        raise TypeError(f"{key} is {reprlib.repr(value)}, must be {_TYPES[kinds[-1]]}")
    return value


def _all(kind: Any, record: Any, key: Any) -> list[Any]:
    """``record[key]``, which must be a list of values of that type; raises as ``_as``."""
    values = _as(list, record, key)
    return [_as(kind, values, at) for at in range(len(values))]


_NUMBER = (int, float)
_TYPES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
# Options that are computed with, by type; one that is not here is kept as it is.
_OPTIONS: dict[str, Any] = dict.fromkeys(
    ("every", "copies", "groups", "drop", "times", "block", "count", "epochs"), int
)
_OPTIONS |= dict.fromkeys(("scale", "std", "noise_ratio"), _NUMBER) | {"seed": int}
_OPTIONS |= dict.fromkeys(("init", "norms", "layers"), str)
_LISTS = {"after": int, "importance": _NUMBER}


def _read_plan(record: Mapping[str, Any], growths: int, first_base: int) -> Plan:
    """A plan without its history.

    Args:
        growths: how many came before.
        first_base: layers of the base of the first of them.
    """
    options = _as(dict, record, "options")
    for key in options.keys() & _OPTIONS.keys():
        _as(_OPTIONS[key], options, key)
    for key in options.keys() & _LISTS.keys():
        _all(_LISTS[key], options, key)
    method, base_layers = _as(str, record, "method"), _as(int, _as(dict, record, "base"), "layers")
    check_depth(method, max(base_layers, len(_as(list, record, "rows"))))
    layer_map = tuple(tuple(_all(int, record["layer_map"], at)) for at in range(len(_as(list, record, "layer_map"))))
    plan = Plan(
        method=method,
        base_layers=base_layers,
        rows=tuple(_read_row(row, growths) for row in _all(dict, record, "rows")),
        options=options,
        notes=tuple(_all(str, record, "notes")) if "notes" in record else (),
        layer_map=layer_map,
        experts=None if record.get("experts") is None else Experts.from_json(_as(dict, record, "experts")),
    )
    if len(layer_map) != len(plan):
        raise ValueError(f"layer_map has {len(layer_map)} layers, rows {len(plan)}")
    for layers in layer_map:
        if not layers or not all(0 <= layer < first_base for layer in layers):
            raise ValueError(f"layer_map has {reprlib.repr(list(layers))}, must be layers of the first base")
    return plan


def _read_row(record: Mapping[str, Any], growths: int) -> Row:
    sources = []
    for pair in _all(list, record, "sources"):
        if len(pair) != 2:
            raise ValueError(f"sources has {reprlib.repr(pair)}, must be a layer and a weight")
        sources.append((_as(int, pair, 0), float(_as(_NUMBER, pair, 1))))
    init, generation = _as(str, record, "init"), _as(int, record, "generation")
    if init not in (*INITS, KEEP):
        raise ValueError(f"init {reprlib.repr(init)} is not known")
    if not 0 <= generation <= growths + 1:
        raise ValueError(f"generation is {generation}, must be 0…{growths + 1}")
    return Row(tuple(sources), float(_as(_NUMBER, record, "scale")), init, _as(bool, record, "injected"), generation)


def draw_layer_map(plan: Plan, width: int = 88) -> str:
    """The grown layers in order: ``3`` is base layer 3 kept, ``[3·0]`` injected from 3 with outputs times 0."""
    cells = [f"[{label(row)}]" if row.injected else label(row) for row in plan.rows]
    lines = [""]
    for cell in cells:
        if len(lines[-1]) + len(cell) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {cell}".strip()
    return "\n".join(lines)


def label(row: Row) -> str:
    """Of what a row is made, in a few letters: ``3``, ``3·0.5``, ``3+4·0``; ``~`` where an initialiser computes."""
    text = "+".join(str(layer) for layer, _ in row.sources) + ("~" if row.init in COMPUTED_INITS else "")
    return text if row.scale == 1 else f"{text}·{row.scale:g}"


def make_rows(order: Iterable[Row]) -> tuple[Row, ...]:
    """Mark kept and injected: the first whole occurrence of each base layer is kept, all else is injected.

    A layer that occurs only with scaled outputs is kept where it occurs first.
    """
    order = list(order)
    whole = {row.sources[0][0] for row in order if row.is_base_layer}
    seen: set[int] = set()
    rows = []
    for row in order:
        layer = row.sources[0][0] if len(row.sources) == 1 else None
        is_candidate = row.is_base_layer or (layer not in whole and row.init in (KEEP, "half"))
        is_kept = layer is not None and layer not in seen and is_candidate
        if is_kept and layer is not None:
            seen.add(layer)
        init = KEEP if is_kept else "copy" if row.init == KEEP else row.init
        rows.append(dataclasses.replace(row, init=init, injected=not is_kept, generation=int(not is_kept)))
    return tuple(rows)
