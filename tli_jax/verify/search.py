"""Search the layers to run twice for a given depth: sets are ranked by sums of single costs, then measured."""

from collections.abc import Callable, Collection, Mapping, Sequence

Chosen = tuple[int, ...]

BEAM = 3  # sets of layers that are kept for each size
TRIED = 6  # sets that are measured for each size


def find_layers(
    single: Mapping[int, float], counts: Collection[int], measure: Callable[[Sequence[Chosen]], Sequence[float]]
) -> dict[int, tuple[Chosen, float]]:
    """The best set of each size that greedy and beam search find.

    A set grows by one layer at a time, from the ``BEAM`` best of the size before. The next sets are ranked by the
    measured cost of the set before plus the single cost of the new layer; the first ``TRIED`` of them and the layers
    with the smallest single costs are measured.

    Args:
        single: layer -> cost of doubling it alone.
        counts: sizes to find.
        measure: returns the costs of sets, each sorted.

    Returns:
        Size -> layers and measured cost.
    """
    ranked = sorted(single, key=single.__getitem__)
    beam: dict[Chosen, float] = {(): 0.0}
    found = {}
    for count in range(1, max(counts) + 1):
        expected: dict[Chosen, float] = {}
        for chosen, cost in beam.items():
            for layer in ranked:
                if layer not in chosen:
                    larger = tuple(sorted((*chosen, layer)))
                    expected[larger] = min(cost + single[layer], expected.get(larger, float("inf")))
        tried = sorted(expected, key=expected.__getitem__)[:TRIED]
        cheapest = tuple(sorted(ranked[:count]))
        tried += [cheapest] * (cheapest not in tried)
        costs = dict(zip(tried, measure(tried), strict=True))
        beam = {chosen: costs[chosen] for chosen in sorted(costs, key=costs.__getitem__)[:BEAM]}
        if count in counts:
            found[count] = next(iter(beam.items()))
    return found
