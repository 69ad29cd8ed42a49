"""The plots of a comparison, as PNG files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tli_jax.reporting.curves import COLOURS, GREY, loss_curves, loss_range, styles
from tli_jax.reporting.results import OLD_LAYERS, RANDOM, TRAINED, by_only

_DPI = 130


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``initial_loss.png``, after training also ``loss_curves.png``, and ``forgetting.png`` if an old text was
    measured."""
    figures = {"initial_loss.png": _draw_initial_losses(results)}
    if results["runs"]:
        figures["loss_curves.png"] = _draw_loss_curves(results)
        if any(row.get("old_after") for row in results["summary"]):
            figures["forgetting.png"] = _draw_forgetting(results)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)


def add_legend(axes: Axes, handles: Mapping[str, Any], **options: Any) -> None:
    """A legend with verbatim labels: no mathematics between dollar signs, and labels may begin with an underscore."""
    legend = axes.legend(list(handles.values()), list(handles), frameon=False, **options)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_initial_losses(results: Mapping[str, Any]) -> Figure:
    first_rows = {row["name"]: row for row in reversed(results["summary"])}
    rows = [row for name, row in first_rows.items() if name not in (RANDOM, OLD_LAYERS)]
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes: Any = figure.add_subplot()
    texts = [("initial", "new", "new text"), ("old_before", "old", "old text")]
    texts = [text for text in texts if results["base"][text[1]] is not None]
    height = 0.8 / len(texts)
    for i, (key, base, label) in enumerate(texts):
        bottoms = [y + (len(texts) - 1 - i) * height for y in range(len(rows))]
        means = [row[key]["mean"] - results["base"][base] for row in rows]
        spreads = [row[key]["sd"] or 0.0 for row in rows]
        axes.barh(bottoms, means, height * 0.9, xerr=spreads, color=COLOURS[i], label=label, ecolor=GREY)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [row["name"] for row in rows], parse_math=False)
    axes.axvline(0, color=GREY, lw=1)
    axes.set_xlabel("loss before training minus the loss of the base, nats per token")
    axes.grid(alpha=0.25, axis="x")
    axes.legend(frameon=False)
    return figure


def _draw_loss_curves(results: Mapping[str, Any]) -> Figure:
    kinds = list(by_only(results))
    figure = Figure(figsize=(7 * len(kinds), 6.5), layout="constrained")
    for axes, only in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        curves, handles = loss_curves(results, str(only)), {}
        for order, curve in enumerate(reversed(curves)):
            style, lw = curve.style, 1.8 if curve.style.colour != GREY else 1.1
            options: Any = {"color": style.colour, "lw": lw, "ls": style.dash[0], "marker": style.marker[0], "ms": 5}
            options["zorder"] = 2 + order / 100 + (style.colour != GREY)
            (handles[f"{curve.name}, {curve.means[-1]:.3f}"],) = axes.plot(curve.tokens, curve.means, **options)
            low, high = ([m + sign * s for m, s in zip(curve.means, curve.spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(curve.tokens, low, high, color=style.colour, alpha=0.1 * (style.colour != GREY), lw=0)
        axes.set_ylim(*loss_range(results, curves))
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss on held-out new text, nats per token")
        axes.set_title(TRAINED[only], fontsize="medium")
        axes.grid(alpha=0.25)
        in_order = dict(reversed(handles.items()))
        add_legend(axes, in_order, fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def _draw_forgetting(results: Mapping[str, Any]) -> Figure:
    rows = [row for row in results["summary"] if row.get("final") and row.get("old_after") and row["name"] != RANDOM]
    look = styles(results)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    handles = {}
    for row in rows:
        is_injected, style = row["only"] == "injected", look[row["name"]]
        final, old = row["final"], row["old_after"]
        options: Any = {"color": style.colour, "ecolor": GREY, "elinewidth": 0.8, "ls": ""}
        options |= {"marker": style.marker[0] or "x", "mfc": "none" if is_injected else style.colour}
        spreads = {"xerr": final["sd"] or 0.0, "yerr": old["sd"] or 0.0}
        handle = axes.errorbar(final["mean"], old["mean"], **spreads, **options)
        if style.colour != GREY:
            handles[row["name"] + " (injected)" * is_injected] = handle
        else:
            text: Any = {"textcoords": "offset points", "fontsize": 6, "color": GREY, "parse_math": False}
            axes.annotate(row["name"], (final["mean"], old["mean"]), (4, 4), **text)
    # A few contenders that end far above the rest may leave the view.
    for limit, key in ((axes.set_xlim, "final"), (axes.set_ylim, "old_after")):
        losses = sorted(row[key]["mean"] for row in rows)
        low, high = losses[0], losses[9 * len(losses) // 10]
        if low < high:
            limit(low - 0.1 * (high - low), high + 0.2 * (high - low))
    base = results["base"]["old"]
    axes.axhline(base, color=GREY, lw=1, ls="--")
    axes.annotate("base before training", (0.99, base), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xlabel("final loss on the new text, nats per token")
    axes.set_ylabel("final loss on the old text, nats per token")
    axes.set_title(
        "learning against forgetting (lower left is better; hollow: only injected layers)", fontsize="medium"
    )
    axes.grid(alpha=0.25)
    add_legend(axes, handles, fontsize="x-small", ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
