"""Methods at one size: what options make each of them inject as many layers as ``tli`` does with a given K.

Where a method cannot reach that size, it gets the next below that it can; where its published positions are fewer or
more, they are spread evenly over the part of the model in which it injects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Options by which somebody has said how large a grown model is to be.
SIZE_OPTIONS = ("every", "after", "drop", "groups", "copies", "times", "block", "count", "layers")


def fit(method: str, layers: int, every: int, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options that bring a method to the size of ``tli`` with K = ``every``, or to the next below that it reaches.

    Args:
        layers: L of the base.
        given: options that are settled; one of ``SIZE_OPTIONS`` among them, and the method is left as it is.

    Returns:
        What to add to ``given``; None where the smallest that the method makes is larger.
    """
    wanted = layers // every
    if not set(SIZE_OPTIONS).isdisjoint(given) or method in ("custom", "moe"):
        return {}
    if wanted == 0:
        return None
    upper, shallow = range(max(layers // 2 - 1, 0), layers - 1), range(layers // 2)
    if method in ("tli", "average"):
        return {"every": every}
    if method == "interpose":
        return {"after": list(range(every - 1, layers, every))}
    if method == "dus":
        drop = -(-(layers - wanted) // 2)
        return {"drop": drop} if 2 * (layers - drop) > layers else None
    if method == "llama_pro":
        groups = max((n for n in range(1, wanted + 1) if layers % n == 0), key=lambda n: (wanted // n * n, n))
        return {"groups": groups, "copies": wanted // groups}
    if method in ("opt_deus", "lesa"):
        return {"after": _spread(upper, wanted)} if upper else None
    if method == "slayer":
        return {"after": _spread(shallow, wanted)} if shallow else None
    if method in ("midas", "lidas"):
        return {"block": min(wanted, layers)}
    if method == "adept":
        return {"count": min(wanted, layers)}
    assert method == "stack", method
    times = (layers + wanted) // layers
    return {"times": times} if times > 1 else None


def _spread(places: Sequence[int], count: int) -> list[int]:
    """So many of the places, or all, evenly, the last among them."""
    count = min(count, len(places))
    return [places[(i + 1) * len(places) // count - 1] for i in range(count)]
