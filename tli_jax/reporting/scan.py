"""A scan as text: what each layer is worth, the best and worst blocks, and the plans that were found."""

import itertools
from collections.abc import Mapping
from typing import Any

from tli_jax.cli.tables import Column, Table, show_number
from tli_jax.growth.doubling import BLOCKS

TITLES = {
    "bypass": "bypassed",
    "copy": "copy",
    "half": "half",
    "sqrt_half": "√½",
    "quarters": "¾ : ¼",
    "average": "average",
    "blocks": "block repeated",
    "half_blocks": "block repeated, outputs × ½",
}
TEXTS = {"text": "text", "old_text": "old text"}
_SHOWN = 5  # blocks at either end of the order


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of the layers and one of the blocks for each text, and one of the plans."""
    tables = []
    for name, costs in results["costs"].items():
        text = results["texts"][name]
        about = f"{TEXTS[name]} {text['path']}: {text['tokens']:,} tokens, base {text['loss']:.4f} nats per token"
        if kinds := [kind for kind in costs if kind not in BLOCKS]:
            tables.append(_layer_table(results, costs, kinds, about))
        tables += [_block_table(costs[kind], f"{TITLES[kind]}, {TEXTS[name]}") for kind in costs if kind in BLOCKS]
    if results["plans"]:
        rows = [
            [depth, _doubled(plan), *(f"{plan['costs'][name]:+.4f}" for name in results["costs"]), plan["file"]]
            for depth, plan in results["plans"].items()
        ]
        costs = [Column(f"cost on {TEXTS[name]}", "right") for name in results["costs"]]
        columns = [Column("layers", "right"), Column("layers that run twice", "left", 1), *costs, Column("plan")]
        tables.append(Table(columns, rows, "best plans found"))
    return tables


def _layer_table(results: Mapping[str, Any], costs: Mapping[str, Any], kinds: list[str], title: str) -> Table:
    facts = results["layers"]
    columns = [Column("layer", "right"), *(Column(TITLES[kind], "right") for kind in kinds)]
    columns += [Column("cosine", "right", 2), Column("change", "right", 3), Column("weight norm", "right", 4)]
    rows = [
        [
            str(layer),
            *(f"{costs[kind][layer]:+.4f}" for kind in kinds),
            show_number(facts["cosine"][layer], ".3f"),
            show_number(facts["change"][layer], ".3f"),
            f"{facts['weight_norm'][layer]:.1f}",
        ]
        for layer in range(results["base"]["layers"])
    ]
    return Table(columns, rows, title)


def _block_table(blocks: list[list[Any]], title: str) -> Table:
    """The cheapest and the most expensive blocks of more than one layer."""
    order = sorted((block for block in blocks if block[0] < block[1]), key=lambda block: block[2])
    shown = order if len(order) <= 2 * _SHOWN else [*order[:_SHOWN], *order[-_SHOWN:]]
    rows = [[f"{first}–{last}", str(last - first + 1), f"{cost:+.4f}"] for first, last, cost in shown]
    columns = [Column("block"), Column("layers", "right"), Column("cost", "right")]
    return Table(columns, rows, f"{title}: the cheapest and the most expensive of {len(order)}")


def _doubled(plan: Mapping[str, Any]) -> str:
    kinds = set(plan["doubled"].values())
    if len(kinds) == 1:
        return f"{', '.join(plan['doubled'])} ({TITLES[kinds.pop()]})"
    return ", ".join(f"{layer} ({TITLES[kind]})" for layer, kind in plan["doubled"].items())


def describe(results: Mapping[str, Any]) -> list[str]:
    """The lines below the tables: how to read them, and the jumps of weight norms."""
    lines = [
        "costs: loss minus the loss of the base, in nats per token; bypassed: without the layer; copy, half, √½, ¾ : ¼:"
        " the layer twice, with its outputs × 1, ½, √½, or ¾ and ¼; average: followed by its mean with the next layer",
        "cosine: of the hidden states before and after a layer; change: the norm of their difference over the norm"
        " before",
    ]
    norms = results["layers"]["weight_norm"]
    steps = [abs(b - a) / a for a, b in itertools.pairwise(norms)]
    if steps:
        at = max(range(len(steps)), key=steps.__getitem__)
        middle = sorted(steps)[len(steps) // 2]
        lines.append(
            f"weight norms: neighbours differ by {middle:.1%} (median), at most by {steps[at]:.1%}, after layer {at}"
        )
    return lines
