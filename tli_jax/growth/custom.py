"""The method ``custom``: a plan written as a list of layers."""

import re
import reprlib

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan, check_depth
from tli_jax.growth.rows import KEEP, Row, make_rows

_ITEM = re.compile(r"(?P<first>\d{1,9})(-(?P<last>\d{1,9}))?(\*(?P<scale>\d+\.?\d*(e-?\d+)?|\.\d+))?(?P<mark>[ik])?")


def custom(layers: int, spec: str) -> Plan:
    """Any order of layers with any output scales, e.g. ``"0-3, 3*0, 4-7, 7*0.5, 8-15"``.

    The first occurrence of a base layer is kept and later ones are injected. A final ``i`` or ``k`` marks an item as
    injected or kept explicitly.
    """
    order: list[Row] = []
    marks: list[str | None] = []
    for item in spec.replace(" ", "").split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UsageError(f"layers: {reprlib.repr(item)} is not a layer like 3, 0-3, 3*0 or 4-7*0.5")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if not first <= last < layers:
            raise UsageError(f"layers: {item!r} is out of range, the base has layers 0-{layers - 1}")
        check_depth("custom", len(order) + last - first + 1)
        order += [Row(((layer, 1.0),), float(match["scale"] or 1)) for layer in range(first, last + 1)]
        marks += [match["mark"]] * (last - first + 1)
    rows = [
        row
        if mark is None
        else Row(row.sources, row.scale, "copy" if mark == "i" else KEEP, mark == "i", int(mark == "i"))
        for row, mark in zip(make_rows(order), marks, strict=True)
    ]
    missing = sorted(set(range(layers)) - {row.sources[0][0] for row in rows})
    notes = (f"base layers {', '.join(map(str, missing))} are dropped",) if missing else ()
    return Plan("custom", layers, tuple(rows), {"layers": spec}, notes)
