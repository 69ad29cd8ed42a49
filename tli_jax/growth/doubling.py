"""Plans that a scan compares: a layer left out, a layer twice, a block of layers twice.

Also the rule for positions that needs no measurement. On converged bases the first layers and the last are the ones
that must not run twice, see docs/scan.md.
"""

from collections.abc import Mapping
from typing import Any

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import Row, make_rows

# How to run a layer twice -> factors on the residual outputs of the layer and of its copy, and the copy's initialiser.
# ``average`` is not a copy, but the mean with the next layer.
DOUBLINGS = {
    "copy": (1.0, 1.0, "copy"),
    "half": (0.5, 0.5, "half"),
    "sqrt_half": (0.5**0.5, 0.5**0.5, "scaled"),
    "quarters": (0.75, 0.25, "scaled"),
    "average": (1.0, 1.0, "average"),
}
# How to run a block twice -> factor on the residual outputs of both.
BLOCKS = {"blocks": 1.0, "half_blocks": 0.5}
_FIRST, _LAST = 2, 1  # layers at either end that the rule leaves out


def bypass(layers: int, layer: int) -> Plan:
    """All layers but one."""
    return Plan("bypass", layers, make_rows(Row(((n, 1.0),)) for n in range(layers) if n != layer))


def double(layers: int, kinds: Mapping[int, str], options: Mapping[str, Any] | None = None) -> Plan:
    """All layers in order, some of them twice.

    Args:
        kinds: layer -> key of ``DOUBLINGS``.
        options: for ``growth.json``.
    """
    rows = []
    for layer in range(layers):
        if layer not in kinds:
            rows.append(Row(((layer, 1.0),)))
            continue
        of_layer, of_copy, init = DOUBLINGS[kinds[layer]]
        is_mean = init == "average" and layer < layers - 1
        rows.append(Row(((layer, 1.0),), of_layer))
        rows.append(Row(((layer, 0.5), (layer + 1, 0.5)) if is_mean else ((layer, 1.0),), of_copy, init))
    return Plan("scan", layers, make_rows(rows), options or {})


def repeat_block(layers: int, first: int, last: int, scale: float) -> Plan:
    """All layers, with ``first`` to ``last`` twice in a row, both times with their residual outputs times ``scale``."""
    block = [Row(((layer, 1.0),), scale) for layer in range(first, last + 1)]
    before, after = ([Row(((layer, 1.0),)) for layer in part] for part in (range(first), range(last + 1, layers)))
    return Plan("block", layers, make_rows([*before, *block, *block, *after]))


def inner_positions(layers: int, count: int) -> tuple[int, ...]:
    """``count`` evenly spaced layers, without the first two and the last.

    Raises:
        UsageError: there are not as many.
    """
    free = layers - _FIRST - _LAST
    if not 1 <= count <= free:
        raise UsageError(
            f"positions inner: {count} positions do not fit in {layers} layers without the first two and the last:"
            " ask for fewer, or use positions even"
        )
    return tuple(_FIRST + int(free * (place + 0.5) / count) for place in range(count))


def duplicated(plan: Plan) -> tuple[int, ...]:
    """Base layers that run again as an injected layer, which is not the identity. A mean counts as its first source."""
    rows = [row for row in plan.rows if row.injected and row.scale != 0 and row.init != "random"]
    return tuple(sorted({row.sources[0][0] for row in rows}))


def harmful_by_rule(layers: int) -> tuple[int, ...]:
    """The layers that ``inner_positions`` leaves out."""
    return tuple(sorted({*range(min(_FIRST, layers)), *range(layers - _LAST, layers)}))


def harmful_by_cost(costs: list[float]) -> tuple[int, ...]:
    """The layers whose doubling costs more than 0.02 nats and five times the median of all layers."""
    limit = max(0.02, 5 * sorted(costs)[len(costs) // 2])
    return tuple(layer for layer, cost in enumerate(costs) if cost > limit)
