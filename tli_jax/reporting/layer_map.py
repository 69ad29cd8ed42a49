"""Layer maps drawn: one strip of boxes a model, kept layers plain, injected ones marked so."""

from collections.abc import Mapping
from xml.etree import ElementTree

from tli_jax.cli.console import printable
from tli_jax.growth.plan import Plan
from tli_jax.growth.rows import label

_BOX, _HIGH, _GAP, _ROW, _LEFT = 48, 40, 5, 104, 16
_KEPT, _EXACT, _CHANGED = "#4c6a92", "#7fb069", "#e0913d"


def draw_svg(plans: Mapping[str, Plan]) -> str:
    """An SVG, white behind so that it reads on a dark page too.

    Blue: kept. Green: injected, adds nothing. Orange: injected and active, or kept with another output scale.
    """
    width = _LEFT * 2 + max(len(plan) for plan in plans.values()) * (_BOX + _GAP)
    size = {"width": str(width), "height": str(_ROW * len(plans) + 34)}
    svg = ElementTree.Element("svg", size | {"xmlns": "http://www.w3.org/2000/svg", "font-family": "sans-serif"})
    ElementTree.SubElement(svg, "rect", size | {"fill": "white"})
    for number, (name, plan) in enumerate(plans.items()):
        top = _ROW * number + 14
        title = f"{name}: {plan.base_layers} → {len(plan)} layers" + (", exact" if plan.is_exact else "")
        _text(svg, printable(title), _LEFT, top + 12, anchor="start", fill="#222", size=15)
        for place, row in enumerate(plan.rows):
            x, y = _LEFT + place * (_BOX + _GAP), top + 24
            colour = _KEPT if row.scale == 1 and not row.injected else _EXACT if row.scale == 0 else _CHANGED
            box = {"x": x, "y": y, "width": _BOX, "height": _HIGH, "rx": 5, "fill": colour}
            ElementTree.SubElement(svg, "rect", {key: str(value) for key, value in box.items()})
            _text(svg, label(row), x + _BOX / 2, y + _HIGH / 2 + 5, anchor="middle", fill="white", size=13)
            if row.injected:
                _text(svg, "new", x + _BOX / 2, y + _HIGH + 14, anchor="middle", fill="#555", size=11)
    legend = "number: base layer it is made of · factor: of its residual outputs"
    _text(svg, legend, _LEFT, _ROW * len(plans) + 20, anchor="start", fill="#555", size=12)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _text(svg: ElementTree.Element, text: str, x: float, y: float, *, anchor: str, fill: str, size: int) -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor, "fill": fill, "font-size": str(size)}
    ElementTree.SubElement(svg, "text", place).text = text
