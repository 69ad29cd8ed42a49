"""Presets: named growth methods, as functions from a number of layers and a few options to a plan.

None of them touches a weight. Layers count from 0; positions (``after``) are base layers after which is injected.
"""

import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tli_jax.errors import UsageError, nearest
from tli_jax.growth.plan import COMPUTED_INITS, HOST_INITS, INITS, KEEP, RANDOM_INITS, Plan, Row, check_depth, make_rows

# Of a layer or of the trunk: far above any sense, far below what fills the memory with rows.
MAX_REPEATS = 1000


def tli(
    layers: int,
    every: int = 4,
    init: str = "identity",
    *,
    after: Sequence[int] | None = None,
    copies: int = 1,
    scale: float | None = None,
    remainder: str = "allow",
    seed: int = 0,
    noise_ratio: float = 0.01,
    std: float = 0.02,
) -> Plan:
    """Transformer Layer Injection (Vo 2024, arXiv 2410.11654): a new layer after every ``every`` base layers.

    L layers become L + copies·⌊L/every⌋. Whether the paper's injected layer starts as a plain copy or as the identity
    is not known to us, so both exist; ``identity`` is the default because nothing is lost by it.

    Args:
        init: how an injected layer is made of the one before it: ``copy``; ``identity`` (residual outputs 0: exact);
            ``scaled`` (outputs times ``scale``); ``half`` (outputs of source and copy times ½); ``average`` and
            ``average_identity`` (mean with the next layer); ``next_identity`` (the next layer, outputs 0: exact; ours,
            see docs/results.md); ``noise`` (Gaussian, ``noise_ratio`` of each tensor's root mean square); ``random``
            (fresh, matrices N(0, ``std``), norms 1); ``transport`` and ``predictor`` (of the layers before and after,
            see ``opt_deus`` and ``lesa``).
        after: positions by hand, instead of ``every``.
        copies: injected layers at each position.
        scale: factor on the residual outputs; needed by ``scaled``, possible where a layer is computed.
        remainder: ``error`` refuses an ``every`` that does not divide L; ``allow`` leaves the rest at the end.
        seed: of ``noise``, ``random`` and ``predictor``.

    Raises:
        UsageError: an option is out of range.
    """
    if init not in INITS:
        raise UsageError(f"init {init!r} is not known{nearest(init, INITS)}; there are {', '.join(INITS)}")
    if (init == "scaled") != (scale is not None) and init not in COMPUTED_INITS:
        others = ", ".join(COMPUTED_INITS)
        raise UsageError(f"init {init!r} and scale {scale}: 'scaled' needs a scale, only {others} take one besides")
    if not 0 <= noise_ratio <= MAX_REPEATS:  # nor NaN
        raise UsageError(f"noise_ratio is {noise_ratio}, must be 0…{MAX_REPEATS}")
    if after is None:
        _check_range("every", every, 1, layers)
        if remainder not in ("allow", "error"):
            raise UsageError(f"remainder {remainder!r} is not known, use allow or error")
        if remainder == "error" and layers % every:
            raise UsageError(f"every {every} does not divide {layers} layers, use a divisor or remainder allow")
        positions = set(range(every - 1, layers, every))
    else:
        positions = _check_positions(after, layers)
    options: dict[str, Any] = {"init": init, "copies": copies}
    options |= {"every": every} if after is None else {"after": sorted(positions)}
    options |= {} if scale is None else {"scale": scale}
    options |= {"seed": seed} if init in (*RANDOM_INITS, "predictor") else {}
    options |= {"noise_ratio": noise_ratio} if init == "noise" else {}
    options |= {"std": std} if init == "random" else {}
    return _inject_after("tli", layers, positions, init, options, copies=copies, scale=scale)


def dus(layers: int, drop: int | None = None) -> Plan:
    """Depth Up-Scaling (SOLAR, arXiv 2312.15166): layers 0…L−m−1, then m…L−1, copied; m is ``drop``, default L/4."""
    drop = layers // 4 if drop is None else drop
    _check_range("drop", drop, 0, layers - 1)
    return _from_order("dus", layers, [*range(layers - drop), *range(drop, layers)], {"drop": drop})


def llama_pro(layers: int, groups: int | None = None, copies: int = 1, *, after: Sequence[int] | None = None) -> Plan:
    """LLaMA Pro (arXiv 2401.02415): N groups of L/N layers, after each ``copies`` identity copies of its top layer."""
    if after is None:
        divisors = [n for n in range(1, layers + 1) if layers % n == 0]
        if groups not in divisors:
            raise UsageError(f"groups is {groups}, must divide {layers} layers: one of {', '.join(map(str, divisors))}")
        size = layers // groups
        positions = set(range(size - 1, layers, size))
        options: dict[str, Any] = {"groups": groups, "copies": copies}
    else:
        positions = _check_positions(after, layers)
        options = {"after": sorted(positions), "copies": copies}
    return _inject_after("llama_pro", layers, positions, "identity", options, copies=copies)


def stack(layers: int, times: int = 2) -> Plan:
    """G_stack (arXiv 2405.15319; StackBERT): the whole trunk ``times`` times."""
    _check_range("times", times, 1, MAX_REPEATS)
    check_depth("stack", layers * times)
    return _from_order("stack", layers, list(range(layers)) * times, {"times": times})


def interpose(layers: int, *, after: Sequence[int] | None = None, copies: int = 1) -> Plan:
    """Interpositional copying: each layer, or each one named in ``after``, repeated in place ("Recycling pretrained
    checkpoints", 2025)."""
    positions = set(range(layers)) if after is None else _check_positions(after, layers)
    options: dict[str, Any] = {"copies": copies} | ({} if after is None else {"after": sorted(positions)})
    return _inject_after("interpose", layers, positions, "copy", options, copies=copies)


def slayer(layers: int, *, after: Sequence[int] | None = None) -> Plan:
    """Llama SLayer (arXiv 2410.02330): in the shallow half, after i = 1, 3, … ≤ L/2−1, the mean of layers i and i+1
    with residual outputs 0."""
    positions = set(range(1, layers // 2, 2)) if after is None else _check_positions(after, layers)
    if not positions:
        raise UsageError(f"slayer finds no position in {layers} layers, it needs 4 at least: name them with after")
    return _inject_after("slayer", layers, positions, "average_identity", {"after": sorted(positions)})


def average(layers: int, every: int = 4, *, after: Sequence[int] | None = None) -> Plan:
    """The "Average" baseline of arXiv 2508.08011: the mean of layers i and i+1, nothing zeroed, where asked for."""
    if after is None:
        _check_range("every", every, 1, layers)
        positions = set(range(every - 1, layers, every))
    else:
        positions = _check_positions(after, layers)
    return _inject_after("average", layers, positions, "average", {"after": sorted(positions)})


def opt_deus(layers: int, *, after: Sequence[int] | None = None) -> Plan:
    """OpT-DeUS (arXiv 2508.08011): in the upper half, after i = ⌊L/2⌋−1 … L−2, layers i and i+1 fused by optimal
    transport (``tli_jax.growth.transport``), with residual outputs 0."""
    positions = _upper_half(layers) if after is None else _check_positions(after, layers)
    return _inject_after("opt_deus", layers, positions, "transport", {"after": sorted(positions)})


def lesa(
    layers: int, *, after: Sequence[int] | None = None, norms: str = "mean", seed: int = 0, epochs: int = 5
) -> Plan:
    """LESA (arXiv 2502.13794): where ``opt_deus`` injects, a layer predicted from the one before and the one after by a
    network that learnt it from the base (``tli_jax.growth.predictor``). Nothing is zeroed.

    Args:
        norms: ``mean`` of both neighbours', or ``first``, layer 0's.
        seed: of the network and the order in which it sees its samples.
        epochs: how often it sees each.
    """
    if norms not in ("mean", "first"):
        raise UsageError(f"norms {norms!r} is not known, use mean or first")
    _check_range("epochs", epochs, 1, MAX_REPEATS)
    positions = _upper_half(layers) if after is None else _check_positions(after, layers)
    options = {"after": sorted(positions), "norms": norms, "seed": seed, "epochs": epochs}
    return _inject_after("lesa", layers, positions, "predictor", options)


def midas(layers: int, block: int | None = None) -> Plan:
    """MIDAS (arXiv 2409.19044): of the trunk's blocks of ``block`` layers, ⌈L/4⌉ by default, the one nearest the middle
    (the lower of two) twice."""
    block = -(-layers // 4) if block is None else block
    _check_range("block", block, 1, layers)
    first = min(range(0, layers - block + 1, block), key=lambda first: abs(2 * first + block - layers))
    return _from_order("midas", layers, _twice(layers, first, block), {"block": block})


def lidas(layers: int, block: int | None = None) -> Plan:
    """LIDAS (arXiv 2512.08819): the ``block`` layers, ⌈L/4⌉ by default, in the exact middle twice; where there is none,
    half a layer below it."""
    block = -(-layers // 4) if block is None else block
    _check_range("block", block, 1, layers)
    return _from_order("lidas", layers, _twice(layers, (layers - block) // 2, block), {"block": block})


def adept(
    layers: int,
    count: int | None = None,
    *,
    importance: Sequence[float] | None = None,
    after: Sequence[int] | None = None,
) -> Plan:
    """ADEPT (arXiv 2510.10071): the ``count`` layers that matter least, ⌈L/4⌉ by default, doubled in place, residual
    outputs of the copies 0.

    Args:
        importance: of each layer, Σ|θ·∂loss/∂θ| on a text for general ability
            (``tli_jax.measure_importance``).
        after: the layers by hand, instead.
    """
    options: dict[str, Any]
    if after is None:
        count = -(-layers // 4) if count is None else count
        _check_range("count", count, 1, layers)
        if importance is None or len(importance) != layers:
            found = "none" if importance is None else len(importance)
            raise UsageError(
                f"adept needs an importance for each of {layers} layers, has {found}: or name them by after"
            )
        positions = set(sorted(range(layers), key=lambda layer: importance[layer])[:count])
        options = {"count": count, "after": sorted(positions), "importance": list(importance)}
    else:
        positions = _check_positions(after, layers)
        options = {"after": sorted(positions)}
    return _inject_after("adept", layers, positions, "identity", options)


def moe(layers: int) -> Plan:
    """The layers as they are: for a growth that makes experts of their feed-forwards, and no more."""
    return _from_order("moe", layers, range(layers), {})


_ITEM = re.compile(r"(?P<first>\d{1,9})(-(?P<last>\d{1,9}))?(\*(?P<scale>\d+\.?\d*(e-?\d+)?|\.\d+))?(?P<mark>[ik])?")


def custom(layers: int, spec: str) -> Plan:
    """Any order of layers with any output scale, e.g. ``"0-3, 3*0, 4-7, 7*0.5, 8-15"``.

    The first occurrence of a base layer is kept, later ones are injected; a final ``i`` or ``k`` marks an item
    injected or kept whatever it would be.
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
        scale = float(match["scale"] or 1)
        check_depth("custom", len(order) + last - first + 1)
        order += [Row(((layer, 1.0),), scale) for layer in range(first, last + 1)]
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


METHODS: dict[str, Callable[..., Plan]] = {
    preset.__name__: preset
    for preset in (
        *(tli, dus, llama_pro, stack, interpose, slayer, average, opt_deus, lesa, midas, lidas, adept, moe, custom),
    )
}


def _upper_half(layers: int) -> set[int]:
    if layers < 2:
        raise UsageError(f"the base has {layers} layers, two at least are needed to make one between")
    return set(range(max(layers // 2 - 1, 0), layers - 1))


def _twice(layers: int, first: int, block: int) -> list[int]:
    return [*range(first + block), *range(first, layers)]


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, must be {low}…{high}")


def _check_positions(after: Sequence[int], layers: int) -> set[int]:
    for layer in after:
        _check_range("after: position", layer, 0, layers - 1)
    if len(set(after)) != len(after) or not after:
        raise UsageError(f"after is {list(after)}: name each position once and at least one")
    return set(after)


def _from_order(method: str, layers: int, order: Iterable[int], options: dict[str, Any]) -> Plan:
    return Plan(method, layers, make_rows(Row(((layer, 1.0),)) for layer in order), options)


def _inject_after(
    method: str,
    layers: int,
    positions: set[int],
    init: str,
    options: dict[str, Any],
    *,
    copies: int = 1,
    scale: float | None = None,
) -> Plan:
    """Each base layer, and after those in ``positions`` injected ones made by ``init``."""
    _check_range("copies", copies, 1, MAX_REPEATS)
    check_depth(method, layers + copies * len(positions))
    order: list[Row] = []
    notes: list[str] = []
    fixed = {"identity": 0.0, "average_identity": 0.0, "next_identity": 0.0, "half": 0.5, "transport": 0.0}
    outputs = fixed.get(init, 1.0) if scale is None else scale
    if init in HOST_INITS and layers - 1 in positions:
        raise UsageError(f"{method}: init {init} makes a layer of two neighbours, and none follows layer {layers - 1}")
    for layer in range(layers):
        is_source = layer in positions
        order.append(Row(((layer, 1.0),), 0.5 if is_source and init == "half" else 1.0))
        sources: tuple[tuple[int, float], ...] = ((layer, 1.0),)
        if is_source and (init.startswith("average") or init in HOST_INITS):
            sources = ((layer, 0.5), (layer + 1, 0.5))
        elif is_source and init == "next_identity":
            sources = ((layer + 1, 1.0),)
        if sources[-1][0] == layers:
            sources = ((layer, 1.0),)
            notes.append(f"nothing follows layer {layer}: the layer injected after it is made of it alone")
        order += [Row(sources, outputs, init)] * (copies * is_source)
    return Plan(method, layers, make_rows(order), options, tuple(notes))
