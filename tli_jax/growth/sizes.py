"""Options that make each method inject as many layers as ``tli`` with a given K, or as close below as it can.

Where a method publishes more or fewer positions, they are spread evenly over the part of the model that it injects in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Options that determine the size of a grown model.
SIZE_OPTIONS = ("every", "after", "drop", "groups", "copies", "times", "block", "count", "layers")


def fit(method: str, layers: int, every: int, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options that bring a method to the size of ``tli`` with K = ``every``, or to the next smaller one.

    Args:
        layers: L of the base.
        given: fixed options. If one of ``SIZE_OPTIONS`` is among them, nothing is added.

    Returns:
        The options to add; None if even the smallest size of the method is larger.
    """
    injected = layers // every
    if not set(SIZE_OPTIONS).isdisjoint(given) or method in ("custom", "moe"):
        return {}
    if injected == 0:
        return None
    upper, shallow = range(max(layers // 2 - 1, 0), layers - 1), range(layers // 2)
    if method in ("tli", "average"):
        return {"every": every}
    if method == "interpose":
        return {"after": list(range(every - 1, layers, every))}
    if method == "dus":
        drop = -(-(layers - injected) // 2)
        return {"drop": drop} if 2 * (layers - drop) > layers else None
    if method == "llama_pro":
        divisors = (n for n in range(1, injected + 1) if layers % n == 0)
        groups = max(divisors, key=lambda n: (injected // n * n, n))
        return {"groups": groups, "copies": injected // groups}
    if method in ("opt_deus", "lesa"):
        return {"after": _spread(upper, injected)} if upper else None
    if method == "slayer":
        return {"after": _spread(shallow, injected)} if shallow else None
    if method in ("midas", "lidas"):
        return {"block": min(injected, layers)}
    if method == "adept":
        return {"count": min(injected, layers)}
    assert method == "stack", method
    times = (layers + injected) // layers
    return {"times": times} if times > 1 else None


def _spread(positions: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` positions, evenly spaced and ending with the last."""
    count = min(count, len(positions))
    return [positions[(i + 1) * len(positions) // count - 1] for i in range(count)]
