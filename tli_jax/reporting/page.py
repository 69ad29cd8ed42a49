"""The report of a comparison: one self-contained HTML page, a CSV file, and plots."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.reporting import comparison
from tli_jax.reporting.curves import GREY, Curve, loss_curves, loss_range
from tli_jax.reporting.html import figure_html, render
from tli_jax.reporting.layer_map import draw_svg
from tli_jax.reporting.results import RANDOM, TRAINED, UNKNOWN, by_only, first_of_each

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def require_libraries() -> None:
    """Check that the libraries of the report are installed, before hours of training.

    Raises:
        UsageError: one is missing.
    """
    for name in ("matplotlib", "plotly"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the report needs {name}: pip install matplotlib plotly")


def write_report(results: Mapping[str, Any], config: str, folder: Path) -> None:
    """Write ``results.csv``, ``report.html`` and the plots.

    Args:
        results: the content of ``results.json``.
        config: the configuration as YAML.
    """
    from tli_jax.reporting.plots import draw

    comparison.write_csv(results, folder / "results.csv")
    draw(results, folder)
    (folder / "report.html").write_text(make_page(results, config), encoding="utf-8")


def make_page(results: Mapping[str, Any], config: str) -> str:
    """The HTML of the page."""
    from plotly.offline import get_plotlyjs

    tables, tasks, charts, contributions = [], [], [], []
    for only, rows in by_only(results).items():
        filled = [comparison.cells(row) for row in rows]
        keys = [key for key in comparison.HEADINGS if key in filled[0]]
        tables.append((TRAINED[only], keys, list(zip(rows, filled, strict=True))))
        if len(rows[0]["tasks"]) > 1:  # a single one is a column of the main table
            tasks.append((TRAINED[only], rows))
        if only is not None:
            curves = loss_curves(results, only)
            charts.append((TRAINED[only], curves, figure_html(_plot_curves(curves, loss_range(results, curves)))))
            if measured := [row for row in rows if row["contributions"]]:
                width = 140 + 64 * max(len(row["contributions"]) for row in measured)
                contributions.append((TRAINED[only], figure_html(_plot_contributions(measured)), width))
    grown = [start for start in first_of_each(results["starts"]) if start["plan"]]
    plans = {start["name"]: Plan.from_json(start["plan"]) for start in grown}
    return render(
        "page.html.jinja",
        results=results,
        model=Path(results["config"]["model"]).name,
        headings=comparison.HEADINGS,
        legend=comparison.LEGEND,
        claims=comparison.claims_by_kind(results),
        not_measured=UNKNOWN,
        titles=TRAINED,
        tables=tables,
        tasks=tasks,
        charts=charts,
        random=RANDOM,
        contributions=contributions,
        proofs={start["name"]: start["proof"] for start in grown},
        plans=plans,
        layer_maps=draw_svg(plans) if plans else "",
        config=config,
        script=get_plotlyjs() if charts else "",
    )


def _plot_curves(curves: list[Curve], limits: tuple[float, float]) -> "Figure":
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for curve in curves:
        is_grey = curve.style.colour == GREY
        figure.add_scatter(
            x=curve.tokens,
            y=curve.means,
            error_y={"array": curve.spreads, "thickness": 0.4 if is_grey else 1, "width": 2},
            name=curve.name,
            mode="lines" if is_grey else "lines+markers",
            line={"color": curve.style.colour, "dash": curve.style.dash[1], "width": 1.2 if is_grey else 2},
            marker={"size": 7, "symbol": curve.style.marker[1]},
            visible=curve.name != RANDOM,
            zorder=0 if is_grey else 1,
        )
    figure.update_layout(xaxis_title="tokens", yaxis_title="nats per token", yaxis_range=limits, height=480)
    return figure


def _plot_contributions(rows: list[dict[str, Any]]) -> "Figure":
    """How much the loss rises without each injected layer, one line of boxes per contender."""
    from plotly import graph_objects

    rows = rows[::-1]
    width = max(len(row["contributions"]) for row in rows)
    padding = [[None] * (width - len(row["contributions"])) for row in rows]
    values = [[*row["contributions"].values(), *pad] for row, pad in zip(rows, padding, strict=True)]
    texts = [
        [*(f"layer {layer}<br>{value:+.3f}" for layer, value in row["contributions"].items()), *("" for _ in pad)]
        for row, pad in zip(rows, padding, strict=True)
    ]
    largest = max(abs(value) for line in values for value in line if value is not None)
    heatmap = graph_objects.Heatmap(
        z=values,
        y=[row["name"] for row in rows],
        x=[f"{i + 1}." for i in range(width)],
        text=texts,
        texttemplate="%{text}",
        colorscale="RdBu_r",
        zmin=-largest,
        zmax=largest,
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="%{y}, %{text}<extra></extra>",
    )
    figure = graph_objects.Figure(heatmap)
    figure.update_layout(xaxis_title="injected layer", height=90 + 40 * len(rows))
    return figure
