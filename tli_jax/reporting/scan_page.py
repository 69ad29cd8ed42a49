"""The page and the plots of a scan: bars by layer and heatmaps of blocks."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.growth.doubling import BLOCKS, harmful_by_cost
from tli_jax.reporting.curves import COLOURS
from tli_jax.reporting.html import figure_html, render
from tli_jax.reporting.scan import TEXTS, TITLES, describe, make_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture
    from plotly.graph_objects import Figure

_DPI = 130
_FACTS = {"cosine": "cosine", "change": "change", "weight_norm": "weight norm"}


def write_scan_report(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write ``scan.html``, ``layers.png`` and ``blocks.png``; without the libraries of the extra ``plot``, nothing.

    Returns:
        The names of the files written.
    """
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "plotly")):
        return []
    names = ["scan.html"]
    (folder / "scan.html").write_text(make_page(results), encoding="utf-8")
    first = next(iter(results["costs"].values()))
    for name, kinds, draw in (
        ("layers.png", [kind for kind in first if kind not in BLOCKS], _draw_layers),
        ("blocks.png", [kind for kind in first if kind in BLOCKS], _draw_blocks),
    ):
        if kinds:
            draw(results, kinds).savefig(folder / name, dpi=_DPI)
            names.append(name)
    return names


def make_page(results: Mapping[str, Any]) -> str:
    """The HTML of the page."""
    from plotly.offline import get_plotlyjs

    sections = []
    for name, costs in results["costs"].items():
        bars = {kind: figure_html(_plot_bars(costs[kind])) for kind in costs if kind not in BLOCKS}
        heatmaps = {kind: figure_html(_plot_blocks(costs[kind])) for kind in costs if kind in BLOCKS}
        sections.append((TEXTS[name], results["texts"][name], bars, heatmaps))
    facts = {title: figure_html(_plot_bars(results["layers"][key], is_cost=False)) for key, title in _FACTS.items()}
    return render(
        "scan.html.jinja",
        results=results,
        model=Path(results["model"]).name,
        titles=TITLES,
        sections=sections,
        facts=facts,
        tables=make_tables(results),
        legend=describe(results)[:2],
        script=get_plotlyjs(),
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw. What lies far above the rest leaves it, or the rest could not be told apart."""
    order = sorted(values)
    high = max(2.5 * order[3 * len(order) // 4], 0.0)
    high = order[-1] if order[-1] <= high or high == 0 else high
    low = min(order[0], 0.0)
    return low - 0.08 * (high - low) * (low < 0), high + 0.12 * (high - low)


def _looks(values: Sequence[float], high: float) -> list[tuple[str, str]]:
    """The colour and the hatching of each bar: harmful layers differ in both."""
    harmful = harmful_by_cost(list(values)) if max(values) > high else ()
    return [(COLOURS[1], "/") if layer in harmful else (COLOURS[0], "") for layer in range(len(values))]


def _plot_bars(values: Sequence[float], is_cost: bool = True) -> "Figure":
    from plotly import graph_objects

    low, high = _limits(values)
    looks = _looks(values, high) if is_cost else [(COLOURS[0], "")] * len(values)
    figure = graph_objects.Figure()
    figure.add_bar(
        x=list(range(len(values))),
        y=values,
        marker={"color": [colour for colour, _ in looks], "pattern": {"shape": [shape for _, shape in looks]}},
        hovertemplate=f"layer %{{x}}: %{{y:{'+' * is_cost}.4f}}<extra></extra>",
    )
    for layer, value in enumerate(values):
        if value > high:
            text = {"text": f"{value:+.2f}", "textangle": -90, "font": {"color": "white", "size": 11}}
            figure.add_annotation(x=layer, y=high, yanchor="top", showarrow=False, bgcolor=looks[layer][0], **text)
    figure.update_layout(xaxis_title="layer", yaxis_range=(low, high), height=230, bargap=0.25)
    figure.update_xaxes(range=(-0.6, len(values) - 0.4))
    return figure


def _grid(blocks: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """Costs by the first layer (rows) and the last layer of a block."""
    layers = 1 + max(last for _, last, _ in blocks)
    grid: list[list[float | None]] = [[None] * layers for _ in range(layers)]
    for first, last, cost in blocks:
        grid[first][last] = cost
    return grid


def _plot_blocks(blocks: Sequence[Sequence[Any]]) -> "Figure":
    from plotly import graph_objects

    _, high = _limits([cost for *_, cost in blocks])
    heatmap = graph_objects.Heatmap(
        z=_grid(blocks),
        zmin=min(0.0, *(cost for *_, cost in blocks)),
        zmax=high,
        colorscale="Cividis",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar={"title": "nats", "thickness": 12, "len": 0.9},
        hovertemplate="layers %{y} to %{x} twice: %{z:+.4f}<extra></extra>",
    )
    figure = graph_objects.Figure(heatmap)
    figure.update_layout(xaxis_title="last layer", yaxis_title="first layer", height=480)
    figure.update_yaxes(autorange="reversed")
    return figure


def _draw_layers(results: Mapping[str, Any], kinds: Sequence[str]) -> "Picture":
    from matplotlib.figure import Figure

    names = list(results["costs"])
    figure = Figure(figsize=(6.5 * len(names), 1.9 * len(kinds)), layout="constrained")
    for row, axes_of_kind in zip(kinds, figure.subplots(len(kinds), len(names), squeeze=False), strict=True):
        for name, axes in zip(names, axes_of_kind, strict=True):
            values = results["costs"][name][row]
            low, high = _limits(values)
            for layer, (value, (colour, hatch)) in enumerate(zip(values, _looks(values, high), strict=True)):
                axes.bar(layer, value, color=colour, hatch=hatch * 3, edgecolor="white", lw=0)
                if value > high:
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
                    axes.annotate(f"{value:+.2f}", (layer, high), (0, -2), bbox=box, **_OVER)
            axes.set_ylim(low, high)
            axes.set_title(f"{TITLES[row]}, {TEXTS[name]}", fontsize="medium", loc="left")
            axes.set_ylabel("nats")
            axes.grid(alpha=0.25, axis="y")
    figure.supxlabel("layer", fontsize="medium")
    return figure


_OVER: dict[str, Any] = {
    "textcoords": "offset points",
    "rotation": 90,
    "ha": "center",
    "va": "top",
    "fontsize": 7,
    "color": "white",
}


def _draw_blocks(results: Mapping[str, Any], kinds: Sequence[str]) -> "Picture":
    import numpy as np
    from matplotlib.figure import Figure

    names = list(results["costs"])
    figure = Figure(figsize=(5.6 * len(kinds), 4.8 * len(names)), layout="constrained")
    for name, axes_of_text in zip(names, figure.subplots(len(names), len(kinds), squeeze=False), strict=True):
        for kind, axes in zip(kinds, axes_of_text, strict=True):
            blocks = results["costs"][name][kind]
            _, high = _limits([cost for *_, cost in blocks])
            image = axes.imshow(np.array(_grid(blocks), float), cmap="cividis", vmax=high)
            figure.colorbar(image, ax=axes, label="nats", extend="max")
            axes.set_title(f"{TITLES[kind]}, {TEXTS[name]}", fontsize="medium")
            axes.set_xlabel("last layer")
            axes.set_ylabel("first layer")
    return figure
