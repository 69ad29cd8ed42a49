"""Growth methods: functions from a number of layers and a few options to a plan. None of them touches a weight.

Layers count from 0. A position (``after``) is a base layer after which layers are injected. Every method raises
``UsageError`` if an option is out of range.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tli_jax.errors import UsageError, nearest
from tli_jax.growth.custom import custom
from tli_jax.growth.plan import Plan, check_depth
from tli_jax.growth.rows import COMPUTED_INITS, HOST_INITS, INITS, RANDOM_INITS, Row, make_rows

# Copies of a layer or of the model; far more than is useful.
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

    L layers become L + copies·⌊L/every⌋. We do not know whether the paper injects plain copies or identity layers, so
    both exist. ``identity`` is the default because it loses nothing.

    Args:
        init: how an injected layer is initialised from the one before it. ``copy``; ``identity`` (residual outputs 0:
            exact); ``scaled`` (outputs times ``scale``); ``half`` (outputs of source and copy times ½); ``average`` and
            ``average_identity`` (mean with the next layer); ``next_identity`` (the next layer with outputs 0: exact;
            ours, see docs/toy_results.md); ``noise`` (Gaussian, ``noise_ratio`` of each tensor's root mean square);
            ``random`` (matrices N(0, ``std``), norms 1); ``transport`` and ``predictor`` (from both neighbours, see
            ``opt_deus`` and ``lesa``).
        after: explicit positions instead of ``every``.
        copies: injected layers per position.
        scale: factor on the residual outputs. Required by ``scaled``, optional for computed initialisers.
        remainder: with ``error``, ``every`` must divide L; with ``allow``, the remaining layers stay at the end.
        seed: for ``noise``, ``random`` and ``predictor``.

    Example:
        >>> tli_jax.tli(16, every=4)
        >>> tli_jax.tli(16, after=[3, 7, 15], init="scaled", scale=0.3)
    """
    if init not in INITS:
        raise UsageError(f"init {init!r} is not known{nearest(init, INITS)}; use one of {', '.join(INITS)}")
    if (init == "scaled") != (scale is not None) and init not in COMPUTED_INITS:
        others = ", ".join(COMPUTED_INITS)
        raise UsageError(f"init {init!r} and scale {scale}: scaled requires a scale, and only {others} also accept one")
    if not 0 <= noise_ratio <= MAX_REPEATS:  # also refuses NaN
        raise UsageError(f"noise_ratio is {noise_ratio}, must be 0…{MAX_REPEATS}")
    positions = _positions(layers, every, after)
    if after is None and remainder not in ("allow", "error"):
        raise UsageError(f"remainder {remainder!r} is not known, use allow or error")
    if after is None and remainder == "error" and layers % every:
        raise UsageError(f"every {every} does not divide {layers} layers, use a divisor or remainder allow")
    options: dict[str, Any] = {"init": init, "copies": copies}
    options |= {"every": every} if after is None else {"after": sorted(positions)}
    options |= {} if scale is None else {"scale": scale}
    options |= {"seed": seed} if init in (*RANDOM_INITS, "predictor") else {}
    options |= {"noise_ratio": noise_ratio} if init == "noise" else {}
    options |= {"std": std} if init == "random" else {}
    return _inject_after("tli", layers, positions, init, options, copies=copies, scale=scale)


def dus(layers: int, drop: int | None = None) -> Plan:
    """Depth Up-Scaling (SOLAR, arXiv 2312.15166): layers 0…L−m−1 followed by m…L−1; m is ``drop``, default ⌊L/4⌋."""
    drop = layers // 4 if drop is None else drop
    _check_range("drop", drop, 0, layers - 1)
    return _from_order("dus", layers, [*range(layers - drop), *range(drop, layers)], {"drop": drop})


def llama_pro(layers: int, groups: int | None = None, copies: int = 1, *, after: Sequence[int] | None = None) -> Plan:
    """LLaMA Pro (arXiv 2401.02415): N groups of L/N layers, each followed by identity copies of its last layer.

    Args:
        groups: N, must divide L. By default the divisor of L closest to L/4 (the smaller of two), as the paper's 8
            groups of 32 layers are.
        copies: copies per group.
        after: explicit positions instead of groups.
    """
    if after is not None:
        positions = _check_positions(after, layers)
        options: dict[str, Any] = {"after": sorted(positions), "copies": copies}
        return _inject_after("llama_pro", layers, positions, "identity", options, copies=copies)
    divisors = [n for n in range(1, layers + 1) if layers % n == 0]
    groups = min(divisors, key=lambda n: abs(n - layers / 4)) if groups is None else groups
    if groups not in divisors:
        raise UsageError(f"groups is {groups}, must divide {layers} layers: one of {', '.join(map(str, divisors))}")
    size = layers // groups
    options = {"groups": groups, "copies": copies}
    return _inject_after("llama_pro", layers, set(range(size - 1, layers, size)), "identity", options, copies=copies)


def stack(layers: int, times: int = 2) -> Plan:
    """G_stack (arXiv 2405.15319; StackBERT): all layers, repeated ``times`` times."""
    _check_range("times", times, 1, MAX_REPEATS)
    check_depth("stack", layers * times)
    return _from_order("stack", layers, list(range(layers)) * times, {"times": times})


def interpose(layers: int, *, after: Sequence[int] | None = None, copies: int = 1) -> Plan:
    """Interpositional copying ("Recycling pretrained checkpoints", 2025): a copy after each layer, or after those in
    ``after``."""
    positions = set(range(layers)) if after is None else _check_positions(after, layers)
    options: dict[str, Any] = {"copies": copies} | ({} if after is None else {"after": sorted(positions)})
    return _inject_after("interpose", layers, positions, "copy", options, copies=copies)


def slayer(layers: int, *, after: Sequence[int] | None = None) -> Plan:
    """Llama SLayer (arXiv 2410.02330): in the shallow half, after i = 1, 3, … ≤ L/2−1, the mean of layers i and i+1
    with residual outputs 0."""
    positions = set(range(1, layers // 2, 2)) if after is None else _check_positions(after, layers)
    if not positions:
        raise UsageError(f"slayer has no position in {layers} layers, it needs at least 4: choose positions with after")
    return _inject_after("slayer", layers, positions, "average_identity", {"after": sorted(positions)})


def average(layers: int, every: int = 4, *, after: Sequence[int] | None = None) -> Plan:
    """The "Average" baseline of arXiv 2508.08011: the mean of layers i and i+1, nothing zeroed, at any positions."""
    positions = _positions(layers, every, after)
    return _inject_after("average", layers, positions, "average", {"after": sorted(positions)})


def opt_deus(layers: int, *, after: Sequence[int] | None = None) -> Plan:
    """OpT-DeUS (arXiv 2508.08011): in the upper half, after i = ⌊L/2⌋−1 … L−2, layers i and i+1 fused by optimal
    transport, with residual outputs 0. See ``tli_jax.growth.transport``."""
    positions = _upper_half(layers) if after is None else _check_positions(after, layers)
    return _inject_after("opt_deus", layers, positions, "transport", {"after": sorted(positions)})


def lesa(
    layers: int, *, after: Sequence[int] | None = None, norms: str = "mean", seed: int = 0, epochs: int = 5
) -> Plan:
    """LESA (arXiv 2502.13794): at the positions of ``opt_deus``, a layer predicted from its neighbours by a network
    trained on the base. Nothing is zeroed. See ``tli_jax.growth.predictor``.

    Args:
        norms: ``mean`` of both neighbours, or ``first`` for those of layer 0.
        seed: for the network and its training order.
        epochs: training epochs of the network.
    """
    if norms not in ("mean", "first"):
        raise UsageError(f"norms {norms!r} is not known, use mean or first")
    _check_range("epochs", epochs, 1, MAX_REPEATS)
    positions = _upper_half(layers) if after is None else _check_positions(after, layers)
    options = {"after": sorted(positions), "norms": norms, "seed": seed, "epochs": epochs}
    return _inject_after("lesa", layers, positions, "predictor", options)


def midas(layers: int, block: int | None = None) -> Plan:
    """MIDAS (arXiv 2409.19044): split into blocks of ``block`` layers, default ⌈L/4⌉, and double the one closest to the
    middle (the lower of two)."""
    block = -(-layers // 4) if block is None else block
    _check_range("block", block, 1, layers)
    first = min(range(0, layers - block + 1, block), key=lambda first: abs(2 * first + block - layers))
    return _double_block("midas", layers, first, block)


def lidas(layers: int, block: int | None = None) -> Plan:
    """LIDAS (arXiv 2512.08819): double the ``block`` layers, default ⌈L/4⌉, in the exact middle, or half a layer below
    it."""
    block = -(-layers // 4) if block is None else block
    _check_range("block", block, 1, layers)
    return _double_block("lidas", layers, (layers - block) // 2, block)


def adept(
    layers: int,
    count: int | None = None,
    *,
    importance: Sequence[float] | None = None,
    after: Sequence[int] | None = None,
) -> Plan:
    """ADEPT (arXiv 2510.10071): an identity copy after each of the ``count`` least important layers, default ⌈L/4⌉.

    Args:
        importance: of each layer, Σ|θ·∂loss/∂θ| on general text, see ``tli_jax.measure_importance``.
        after: explicit positions instead.
    """
    if after is not None:
        positions = _check_positions(after, layers)
        return _inject_after("adept", layers, positions, "identity", {"after": sorted(positions)})
    count = -(-layers // 4) if count is None else count
    _check_range("count", count, 1, layers)
    if importance is None or len(importance) != layers:
        given = "none" if importance is None else len(importance)
        raise UsageError(f"adept needs the importance of {layers} layers, has {given}: pass it, or use after")
    positions = set(sorted(range(layers), key=lambda layer: importance[layer])[:count])
    options = {"count": count, "after": sorted(positions), "importance": list(importance)}
    return _inject_after("adept", layers, positions, "identity", options)


def moe(layers: int) -> Plan:
    """No change of depth, for growth that only turns feed-forwards into experts."""
    return _from_order("moe", layers, range(layers), {})


# The only list of methods. The command line and the comparison read it.
METHODS: dict[str, Callable[..., Plan]] = {
    method.__name__: method
    for method in (
        *(tli, dus, llama_pro, stack, interpose, slayer, average, opt_deus, lesa, midas, lidas, adept, moe, custom),
    )
}


def _upper_half(layers: int) -> set[int]:
    if layers < 2:
        raise UsageError(f"the base has {layers} layers, at least 2 are needed to inject between them")
    return set(range(max(layers // 2 - 1, 0), layers - 1))


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, must be {low}…{high}")


def _positions(layers: int, every: int, after: Sequence[int] | None) -> set[int]:
    if after is not None:
        return _check_positions(after, layers)
    _check_range("every", every, 1, layers)
    return set(range(every - 1, layers, every))


def _check_positions(after: Sequence[int], layers: int) -> set[int]:
    for layer in after:
        _check_range("after: position", layer, 0, layers - 1)
    if len(set(after)) != len(after) or not after:
        raise UsageError(f"after is {list(after)}: list at least one position, and each only once")
    return set(after)


def _from_order(method: str, layers: int, order: Iterable[int], options: dict[str, Any]) -> Plan:
    return Plan(method, layers, make_rows(Row(((layer, 1.0),)) for layer in order), options)


def _double_block(method: str, layers: int, first: int, block: int) -> Plan:
    return _from_order(method, layers, [*range(first + block), *range(first, layers)], {"block": block})


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
    """All base layers in order, with layers initialised by ``init`` after those in ``positions``."""
    _check_range("copies", copies, 1, MAX_REPEATS)
    check_depth(method, layers + copies * len(positions))
    if init in HOST_INITS and layers - 1 in positions:
        raise UsageError(f"{method}: init {init} needs a layer on both sides, and none follows layer {layers - 1}")
    scale = INITS[init] if scale is None else scale
    assert scale is not None  # only "scaled" has no default
    order: list[Row] = []
    notes: list[str] = []
    for layer in range(layers):
        is_source = layer in positions
        order.append(Row(((layer, 1.0),), 0.5 if is_source and init == "half" else 1.0))
        if not is_source:
            continue
        sources: tuple[tuple[int, float], ...] = ((layer, 1.0),)
        if init.startswith(("average", "next")) and layer == layers - 1:
            notes.append(f"no layer follows layer {layer}: the layer injected after it is built from it alone")
        elif init.startswith("average") or init in HOST_INITS:
            sources = ((layer, 0.5), (layer + 1, 0.5))
        elif init == "next_identity":
            sources = ((layer + 1, 1.0),)
        order += [Row(sources, scale, init)] * copies
    return Plan(method, layers, make_rows(order), options, tuple(notes))
