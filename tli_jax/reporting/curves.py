"""Loss curves of a comparison, prepared for drawing.

They are drawn twice, because each reader needs another medium: README, papers and GitHub show the PNG of matplotlib,
and run no script; in the page of plotly the pointer reads values and a click hides a curve, as twenty curves need.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tli_jax.reporting.results import BASELINES, by_only, mean_curve

GREY = "#8a8f98"


class Style(NamedTuple):
    """How a contender looks: its colour, line and marker, as matplotlib and plotly name them, and as a character."""

    colour: str = GREY
    dash: tuple[str, str] = ("-", "solid")
    marker: tuple[str, str, str] = ("", "line-ns", "–")


# After Okabe and Ito, adjusted to a contrast of 3:1 on white and on near-black. For readers who see two of them as one
# colour, each has a marker of its own.
_STYLES = [
    Style("#0072b2", marker=("o", "circle", "●")),
    Style("#e06000", marker=("s", "square", "■")),
    Style("#00a37a", marker=("^", "triangle-up", "▲")),
    Style("#d070a8", marker=("D", "diamond", "◆")),
    Style("#2f96d8", marker=("v", "triangle-down", "▼")),
    Style("#7a6a00", marker=("P", "cross", "✚")),
]
_BASELINE_DASHES = dict(zip(BASELINES, (("--", "dash"), (":", "dot"), ("-.", "dashdot")), strict=True))
COLOURS = [style.colour for style in _STYLES]


class Curve(NamedTuple):
    """Mean validation loss of one contender against tokens, with its standard deviation over seeds."""

    name: str
    style: Style
    tokens: Sequence[float]
    means: Sequence[float]
    spreads: Sequence[float]


def styles(results: Mapping[str, Any]) -> dict[str, Style]:
    """The look of each contender in every plot. The best methods have a colour, all others are grey."""
    groups = [[row["name"] for row in rows] for rows in by_only(results).values()]
    ranked = dict.fromkeys(name for names in itertools.zip_longest(*groups) for name in names if name is not None)
    methods = [name for name in ranked if name not in BASELINES]
    looks = {name: Style(dash=_BASELINE_DASHES[name]) for name in ranked if name in BASELINES}
    return looks | dict(zip(methods, itertools.chain(_STYLES, itertools.repeat(Style())), strict=False))


def loss_curves(results: Mapping[str, Any], only: str) -> list[Curve]:
    """The curves of all contenders that did not diverge, the lowest final loss last."""
    look, curves = styles(results), []
    for row in by_only(results)[only]:
        if points := mean_curve(results, row["name"], only):
            curves.append(Curve(row["name"], look[row["name"]], *zip(*points, strict=True)))
    return curves


def loss_range(results: Mapping[str, Any], curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the loss axis. A model that starts far above the base, such as a random one, must not flatten the other
    curves: it enters the plot from above."""
    start = results["base"]["new"]
    lowest = min((min(curve.means) for curve in curves), default=start - 1)
    height = start - lowest or 1.0
    return lowest - 0.06 * height, start + 0.3 * height
