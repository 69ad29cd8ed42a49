"""What the HTML pages share: their style, how a template is filled, and how plotly draws on light and dark pages."""

from importlib import resources
from typing import TYPE_CHECKING, Any

from tli_jax.cli.console import printable
from tli_jax.reporting.curves import GREY

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GRID = "rgba(138,143,152,0.25)"


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder. It gets the common ``style``, too."""
    import jinja2

    folder = resources.files("tli_jax.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_escape_unprintable
    )
    style = (folder / "page.css").read_text(encoding="utf-8")
    return environment.from_string((folder / template).read_text(encoding="utf-8")).render(style=style, **values)


def _escape_unprintable(value: Any) -> Any:
    """Escape unprintable characters in the text of a record. HTML that this package made stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))


def figure_html(figure: "Figure") -> str:
    """A figure as part of a page that loads plotly."""
    figure.update_layout(
        # Grey on a transparent background is readable on light and dark pages.
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 12},
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        showlegend=False,
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    config = {"responsive": True, "displayModeBar": False}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=config, default_width="100%")
