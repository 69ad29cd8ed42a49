"""The pictures of a comparison, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tli_jax.reporting.comparison import ONLY
from tli_jax.reporting.results import mean_curve

_NEW, _OLD, _GREY = "#4c6a92", "#e0913d", "#888888"
_DPI = 130


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """``initial_loss.png`` and, where there were runs, ``loss_curves.png`` and, where there was an old text,
    ``forgetting.png``."""
    figures = {"initial_loss.png": _initial(results)}
    if results["runs"]:
        figures["loss_curves.png"] = _curves(results)
        if any(row.get("old_after") for row in results["summary"]):
            figures["forgetting.png"] = _forgetting(results)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)


def add_legend(axes: Axes, handles: Mapping[str, Any], **options: Any) -> None:
    """A legend with the labels as they are: nothing between dollar signs is mathematics, and no label is left out
    because it begins with an underscore."""
    legend = axes.legend(list(handles.values()), list(handles), frameon=False, **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each contender, as far as there are any."""
    table = [matplotlib.colors.to_hex(colour) for colour in matplotlib.color_sequences["tab20"]]
    table = table[::2] + table[1::2]  # the strong ones first
    return {name: table[i % len(table)] for i, name in enumerate(dict.fromkeys(names))}


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first row of each contender."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["summary"]:
        found.setdefault(row["name"], row)
    return list(found.values())


def _initial(results: Mapping[str, Any]) -> Figure:
    rows = [row for row in _rows(results) if row["name"] not in ("random", "old_layers")][::-1]
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes: Any = figure.add_subplot()
    kinds = [("initial", "new", "new text", _NEW), ("old_before", "old", "old text", _OLD)]
    kinds = [kind for kind in kinds if results["base"][kind[1]] is not None]
    high = 0.8 / len(kinds)
    for i, (key, base, label, colour) in enumerate(kinds):
        places = [y + (len(kinds) - 1 - i) * high for y in range(len(rows))]
        means = [row[key]["mean"] - results["base"][base] for row in rows]
        spreads = [row[key]["sd"] or 0.0 for row in rows]
        axes.barh(places, means, high * 0.9, xerr=spreads, color=colour, label=label, ecolor=_GREY)
    axes.set_yticks([y + 0.4 - high / 2 for y in range(len(rows))], [row["name"] for row in rows])
    axes.axvline(0, color=_GREY, lw=1)
    axes.set_xlabel("loss before any training, above that of the base, nats a token")
    axes.grid(alpha=0.25, axis="x")
    axes.legend(frameon=False)
    return figure


def _curves(results: Mapping[str, Any]) -> Figure:
    kinds = list(dict.fromkeys(row["only"] for row in results["summary"]))
    colour = colours([row["name"] for row in results["summary"]])
    figure = Figure(figsize=(7 * len(kinds), 5.5), layout="constrained")
    for axes, only in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        shown = [row["name"] for row in results["summary"] if row["only"] == only]
        _draw_curves(axes, results, only, shown, colour)
    return figure


def _draw_curves(axes: Axes, results: Mapping[str, Any], only: str, names: Sequence[str], colour: Mapping) -> None:
    handles = {}
    for name in names:
        curve = mean_curve(results, name, only)
        if not curve:
            continue
        tokens, means, spreads = (list(column) for column in zip(*curve, strict=True))
        style = "--" if name in ("base", "old_layers", "random") else "-"
        (handles[f"{name}, {means[-1]:.3f}"],) = axes.plot(tokens, means, color=colour[name], lw=1.5, ls=style)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(tokens, low, high, color=colour[name], alpha=0.15, lw=0)
    # What begins far above the base leaves no room for the others: it comes into view from above.
    lowest = min((point[1] for name in names for point in mean_curve(results, name, only)), default=0.0)
    start = results["base"]["new"]
    axes.set_ylim(lowest - 0.05 * (start - lowest), start + 0.8 * (start - lowest))
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss on what was kept out of the new text, nats a token")
    axes.set_title(ONLY[only], fontsize="medium")
    axes.grid(alpha=0.25)
    add_legend(axes, handles, fontsize="x-small", ncols=2)


def _forgetting(results: Mapping[str, Any]) -> Figure:
    rows = [row for row in results["summary"] if row.get("final") and row.get("old_after") and row["name"] != "random"]
    colour = colours([row["name"] for row in results["summary"]])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    handles = {}
    for row in rows:
        marker = {"all": "o", "injected": "^"}[row["only"]]
        x, y = row["final"]["mean"], row["old_after"]["mean"]
        handles[row["name"] + (" (injected)" if row["only"] == "injected" else "")] = axes.errorbar(
            x,
            y,
            xerr=row["final"]["sd"] or 0.0,
            yerr=row["old_after"]["sd"] or 0.0,
            marker=marker,
            ls="",
            color=colour[row["name"]],
            ecolor=_GREY,
            elinewidth=0.8,
        )
    axes.axhline(results["base"]["old"], color=_GREY, lw=1, ls="--")
    axes.annotate("the base before", (0.99, results["base"]["old"]), xycoords=("axes fraction", "data"), ha="right")
    axes.set_xlabel("final loss on the new text, nats a token")
    axes.set_ylabel("final loss on the old text, nats a token")
    axes.set_title("what was learnt against what was forgotten: lower left is better", fontsize="medium")
    axes.grid(alpha=0.25)
    add_legend(axes, handles, fontsize="x-small", ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
