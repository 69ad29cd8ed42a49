"""Layer maps as SVG: one strip of boxes per model, coloured by what became of each layer."""

from collections.abc import Mapping
from xml.etree import ElementTree

from tli_jax.cli.console import printable
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import Row, label

_BOX, _HEIGHT, _GAP, _STRIP, _MARGIN = 48, 40, 5, 104, 16
_LEGEND = {
    "kept": "kept from the base",
    "zero": "injected, adds nothing yet (residual outputs × 0)",
    "active": "changes the function: injected and active, or kept and rescaled",
}
_NOTE = "number: base layer that it is built from · factor: on its residual outputs · new: injected"
# Scoped by class, as an SVG inside a page shares its styles with the page. White text has a contrast of 4.5:1 on each
# box, and the three colours differ in lightness for readers who do not see the difference in hue.
_CSS = """
.layer-map { font-family: system-ui, sans-serif }
.layer-map .page { fill: #ffffff } .layer-map .title { fill: #1d2430 } .layer-map .soft { fill: #5b6472 }
.layer-map .kept { fill: #56657c } .layer-map .zero { fill: #007a5a } .layer-map .active { fill: #b84a00 }
.layer-map .label { fill: #ffffff }
@media (prefers-color-scheme: dark) {
.layer-map .page { fill: #14171c } .layer-map .title { fill: #e6e9ee } .layer-map .soft { fill: #9aa3b2 }
.layer-map .kept { fill: #9fb0c9 } .layer-map .zero { fill: #35c795 } .layer-map .active { fill: #ff9d5c }
.layer-map .label { fill: #14171c }
}
"""


def draw_svg(plans: Mapping[str, Plan]) -> str:
    """An SVG with a legend, in light or dark colours as the reader's system prefers."""
    width = _MARGIN * 2 + max(470, max(len(plan) for plan in plans.values()) * (_BOX + _GAP))
    height = _STRIP * len(plans) + 24 * len(_LEGEND) + 36
    size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
    namespace = {"xmlns": "http://www.w3.org/2000/svg", "class": "layer-map"}
    svg = ElementTree.Element("svg", size | namespace | {"role": "img", "aria-label": "layer maps"})
    ElementTree.SubElement(svg, "style").text = _CSS
    _rect(svg, 0, 0, width, height, "page")
    for number, (name, plan) in enumerate(plans.items()):
        top = _STRIP * number + 14
        title = f"{name}: {plan.base_layers} → {len(plan)} layers" + (", exact" if plan.is_exact else "")
        _text(svg, printable(title), _MARGIN, top + 12, "title", 15)
        for i, row in enumerate(plan.rows):
            x, y = _MARGIN + i * (_BOX + _GAP), top + 24
            _rect(svg, x, y, _BOX, _HEIGHT, _kind(row))
            _text(svg, label(row), x + _BOX / 2, y + _HEIGHT / 2 + 5, "label", 13, anchor="middle")
            if row.injected:
                _text(svg, "new", x + _BOX / 2, y + _HEIGHT + 14, "soft", 11, anchor="middle")
    top = _STRIP * len(plans) + 10
    for i, (kind, text) in enumerate(_LEGEND.items()):
        _rect(svg, _MARGIN, top + 24 * i, 22, 16, kind)
        _text(svg, text, _MARGIN + 30, top + 24 * i + 13, "soft", 12)
    _text(svg, _NOTE, _MARGIN, top + 24 * len(_LEGEND) + 13, "soft", 12)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _kind(row: Row) -> str:
    if row.scale == 1 and not row.injected:
        return "kept"
    return "zero" if row.scale == 0 else "active"


def _rect(svg: ElementTree.Element, x: float, y: float, width: int, height: int, kind: str) -> None:
    box = {"x": f"{x:g}", "y": f"{y:g}", "width": str(width), "height": str(height), "class": kind}
    ElementTree.SubElement(svg, "rect", box | ({} if kind == "page" else {"rx": "5"}))


def _text(svg: ElementTree.Element, text: str, x: float, y: float, kind: str, size: int, anchor: str = "start") -> None:
    position = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor, "class": kind, "font-size": str(size)}
    ElementTree.SubElement(svg, "text", position).text = text
