"""The report of a comparison: one page that needs nothing but itself, a table of all runs, and pictures."""

import importlib.util
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.cli.console import printable
from tli_jax.errors import UsageError
from tli_jax.growth.plan import Plan
from tli_jax.reporting import comparison
from tli_jax.reporting.layer_map import draw_svg
from tli_jax.reporting.results import first_of_each, mean_curve

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GREY, _GRID = "#8a8f98", "rgba(138,143,152,0.25)"


def need_libraries() -> None:
    """Refuse, before hours of training, what could not be reported on.

    Raises:
        UsageError: a library is not installed.
    """
    for name in ("matplotlib", "plotly", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the report needs {name}: pip install 'tli_jax[plot]'")


def write_report(results: Mapping[str, Any], config: str, folder: Path) -> None:
    """``results.csv``, the pictures and ``report.html``.

    Args:
        results: what ``results.json`` says.
        config: the configuration, as YAML.
    """
    from tli_jax.reporting.plots import draw

    comparison.write_csv(results, folder / "results.csv")
    draw(results, folder)
    (folder / "report.html").write_text(make_page(results, config), encoding="utf-8")


def make_page(results: Mapping[str, Any], config: str) -> str:
    """The page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    template = (resources.files("tli_jax.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_show_all
    )
    kinds = list(dict.fromkeys(row["only"] for row in results["summary"]))
    figures = []
    for only in kinds:
        if only is not None:
            figures.append((f"Loss on what was kept out: {comparison.ONLY[only]}", _html(_curves(results, only))))
            if any(row["contributions"] for row in results["summary"] if row["only"] == only):
                figures.append(
                    (f"What each injected layer gives: {comparison.ONLY[only]}", _html(_layers(results, only)))
                )
    tables, tasks = [], []
    for only in kinds:
        rows = [row for row in results["summary"] if row["only"] == only]
        filled = [comparison.cells(row) for row in rows]
        keys = [key for key in comparison.HEADINGS if key in filled[0]]
        title = "before any training" if only is None else comparison.ONLY[only]
        tables.append((title, keys, list(zip(rows, filled, strict=True))))
        tasks.append((title, rows))
    grown = [start for start in first_of_each(results["starts"]) if start["plan"]]
    plans = {start["name"]: Plan.from_json(start["plan"]) for start in grown}
    proofs = {start["name"]: start["proof"] for start in grown}
    return environment.from_string(template).render(
        results=results,
        headings=comparison.HEADINGS,
        legend=comparison.LEGEND,
        claims=comparison.claims_by_kind(results),
        tables=tables,
        tasks=tasks,
        figures=figures,
        proofs=proofs,
        plans=plans,
        layer_maps=draw_svg(plans) if plans else "",
        config=config,
        script=get_plotlyjs() if figures else "",
    )


def _show_all(value: Any) -> Any:
    """Text of a record with what does not print escaped; HTML of our own stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))


def _html(figure: "Figure") -> str:
    figure.update_layout(
        # Grey on nothing reads on a light page and on a dark one.
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _GREY, "size": 12},
        margin={"l": 60, "r": 20, "t": 34, "b": 50},
        height=460,
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}, default_width="100%"
    )


def _curves(results: Mapping[str, Any], only: str) -> "Figure":
    from plotly import graph_objects

    from tli_jax.reporting.plots import colours

    figure = graph_objects.Figure()
    colour = colours([row["name"] for row in results["summary"]])
    for row in results["summary"]:
        curve = mean_curve(results, row["name"], only) if row["only"] == only else []
        if curve:
            tokens, means, spreads = (list(column) for column in zip(*curve, strict=True))
            figure.add_scatter(
                x=tokens,
                y=means,
                error_y={"array": spreads, "thickness": 1, "width": 2},
                name=row["name"],
                mode="lines+markers",
                line={"color": colour[row["name"]], "dash": "solid" if row["method"] else "dash"},
                marker={"size": 5},
                # From random weights a model begins so high that nothing else could be told apart.
                visible="legendonly" if row["name"] == "random" else True,
            )
    figure.update_layout(xaxis_title="tokens", yaxis_title="nats a token", hovermode="x unified")
    return figure


def _layers(results: Mapping[str, Any], only: str) -> "Figure":
    from plotly import graph_objects

    rows = [row for row in results["summary"] if row["only"] == only and row["contributions"]][::-1]
    wide = max(len(row["contributions"]) for row in rows)
    values = [[*row["contributions"].values(), *[None] * (wide - len(row["contributions"]))] for row in rows]
    names = [[f"layer {n}" for n in row["contributions"]] for row in rows]
    texts = [
        [f"{name}<br>{value:+.3f}" for name, value in zip(line, known, strict=False)] + [""] * (wide - len(line))
        for line, known in zip(names, values, strict=True)
    ]
    largest = max(abs(value) for line in values for value in line if value is not None)
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=values,
            y=[row["name"] for row in rows],
            x=[f"{i + 1}." for i in range(wide)],
            text=texts,
            texttemplate="%{text}",
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            xgap=2,
            ygap=2,
            colorbar={"title": "nats"},
            hovertemplate="%{y}, %{text}<extra></extra>",
        )
    )
    figure.update_layout(xaxis_title="injected layer: by how much the loss rises when it is skipped")
    return figure
