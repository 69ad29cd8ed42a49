"""The plan: plain data that describes how each layer of a grown model is built from the layers of its base.

A plan has one ``Row`` per grown layer.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from tli_jax.errors import DataError, UsageError
from tli_jax.growth.experts import Experts
from tli_jax.growth.plan_json import read_field, read_list, read_plan_fields
from tli_jax.growth.rows import COMPUTED_INITS, INITS, KEEP, Row, label

VERSION = 1
# Far deeper than any model. Deeper plans are refused before their rows fill the memory.
MAX_LAYERS = 10_000

Guarantee = Literal["bit", "arithmetic", "none"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to grow a base of ``base_layers`` layers. Hashable, so it can be a static argument of ``jit``.

    Args:
        rows: how each grown layer is built.
        options: of the method, for ``growth.json``.
        layer_map: the layers of the *first* base behind each grown layer; by default the sources of each row.
        history: records of earlier growths, oldest first.
        experts: turns the feed-forward of all layers into experts; None leaves it dense.

    Raises:
        UsageError: no rows, or a row with an unknown layer or a number that is not finite.

    Example:
        >>> plan = tli_jax.tli(16, every=4)
        >>> len(plan), plan.guarantee, plan.injected
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
            raise UsageError(f"{self.method}: the plan has no layers: keep at least one of {self.base_layers}")
        for number, row in enumerate(self.rows):
            where = f"{self.method}: layer {number}"
            for layer, weight in row.sources:
                if not 0 <= layer < self.base_layers:
                    raise UsageError(f"{where} is built from layer {layer}, the base has 0…{self.base_layers - 1}")
                if not math.isfinite(weight):
                    raise UsageError(f"{where} has a weight of {weight}, use a finite number")
            if not math.isfinite(row.scale):
                raise UsageError(f"{where} has a scale of {row.scale}, use a finite number")
            if not row.sources:
                raise UsageError(f"{where} has no source")
        if not self.layer_map:
            object.__setattr__(self, "layer_map", tuple(tuple(s for s, _ in row.sources) for row in self.rows))

    def __hash__(self) -> int:
        return hash((self.method, self.base_layers, self.rows, self.experts))  # options are not hashable

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"{self.method}: {self.base_layers} → {len(self)} layers\n{draw_layer_map(self)}"

    @property
    def injected(self) -> tuple[bool, ...]:
        """Mask of the layers that the last growth injected."""
        return tuple(row.injected for row in self.rows)

    @property
    def guarantee(self) -> Guarantee:
        """How the grown model relates to its base: ``bit`` is the same function, bit for bit, because all base layers
        are kept in order and every other layer adds nothing. ``arithmetic`` is equal up to rounding. Else ``none``."""
        active = [row for row in self.rows if row.scale != 0]
        in_order = [row.sources[0][0] for row in active if row.is_base_layer] == list(range(self.base_layers))
        if not (in_order and all(row.is_base_layer for row in active)):
            return "none"
        return "bit" if self.experts is None else "arithmetic" if self.experts.is_exact else "none"

    @property
    def is_exact(self) -> bool:
        """Whether the guarantee is ``bit``."""
        return self.guarantee == "bit"

    @property
    def is_by_kind(self) -> bool:
        """Whether to build a tensor for all layers before the next tensor, because its predictor is trained once."""
        return any(row.init == "predictor" for row in self.rows)

    @property
    def generation(self) -> int:
        """Number of growths since the first base."""
        return 1 + len(self.history)

    def continues(self, earlier: "Plan") -> "Plan":
        """Append this plan to ``earlier``, which made its base: extends history, generations and the layer map.

        The rows still describe only this growth; see ``compose`` for one plan that does both.

        Raises:
            UsageError: this plan is for a base of another depth.
        """
        if self.base_layers != len(earlier):
            raise UsageError(
                f"{self.method}: made for a base of {self.base_layers} layers, {earlier.method} gives {len(earlier)}"
            )

        def origins(row: Row) -> tuple[int, ...]:
            return tuple(dict.fromkeys(first for layer, _ in row.sources for first in earlier.layer_map[layer]))

        def generation(row: Row) -> int:
            return earlier.generation + 1 if row.injected else earlier.rows[row.sources[0][0]].generation

        return dataclasses.replace(
            self,
            rows=tuple(dataclasses.replace(row, generation=generation(row)) for row in self.rows),
            layer_map=tuple(origins(row) for row in self.rows),
            history=(*earlier.history, {key: value for key, value in earlier.to_json().items() if key != "history"}),
        )

    def compose(self, earlier: "Plan") -> "Plan":
        """Combine ``earlier`` and this plan into a single step from the base of ``earlier``.

        Raises:
            UsageError: the depths differ, or there is no such step because a plan has experts, a row is computed, or a
                row mixes layers with different scales. Use ``continues`` then.
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
        """The plan's keys of ``growth.json``."""
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
        """Read a plan from ``growth.json``. Keys that are not the plan's (digests, proof, …) are ignored.

        Raises:
            DataError: another version, or a missing or invalid key.
        """
        if type(record.get("version")) is not int or record["version"] != VERSION:
            version = reprlib.repr(record.get("version"))
            raise DataError(f"{where}: version {version} is not {VERSION}: written by another tli_jax")
        try:
            history = read_list(dict, record, "history")
            first_base = read_field(int, read_field(dict, [*history, record][0], "base"), "layers")
            for growths, step in enumerate(history):
                _read_plan(step, growths, first_base)
            return dataclasses.replace(_read_plan(record, len(history), first_base), history=tuple(history))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise DataError(f"{where}: not a growth plan ({what}): fix or delete it") from error


def check_depth(method: str, layers: int) -> None:
    """Raise ``UsageError`` if a plan would have more than ``MAX_LAYERS`` layers."""
    if layers > MAX_LAYERS:
        raise UsageError(
            f"{method}: {layers:,} layers are more than the {MAX_LAYERS:,} that a plan can have: ask for less"
        )


def _read_plan(record: Mapping[str, Any], growths: int, first_base: int) -> Plan:
    """Read a plan without its history, after ``growths`` earlier ones from a first base of ``first_base`` layers."""
    fields = read_plan_fields(record, first_base)
    check_depth(fields["method"], max(fields["base_layers"], len(fields["rows"])))
    rows = tuple(Row(*fields_of_row) for fields_of_row in fields.pop("rows"))
    for row in rows:
        if row.init not in (*INITS, KEEP):
            raise ValueError(f"init {reprlib.repr(row.init)} is not known")
        if not 0 <= row.generation <= growths + 1:
            raise ValueError(f"generation is {row.generation}, must be 0…{growths + 1}")
    experts = fields.pop("experts")
    plan = Plan(rows=rows, experts=None if experts is None else Experts.from_json(experts), **fields)
    if len(fields["layer_map"]) != len(plan):
        raise ValueError(f"layer_map has {len(fields['layer_map'])} layers, rows {len(plan)}")
    return plan


def draw_layer_map(plan: Plan, width: int = 88) -> str:
    """The grown layers in order: ``3`` is base layer 3, kept; ``[3·0]`` is injected from 3 with its outputs times 0."""
    lines = [""]
    for row in plan.rows:
        cell = f"[{label(row)}]" if row.injected else label(row)
        if len(lines[-1]) + len(cell) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {cell}".strip()
    return "\n".join(lines)
