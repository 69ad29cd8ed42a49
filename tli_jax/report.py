"""``python -m tli_jax.report FOLDER…``: runs, grown models, trained models and comparisons, from their records."""

import sys
from collections.abc import Sequence
from pathlib import Path

import rich.text

from tli_jax.cli.console import console, printable
from tli_jax.cli.frame import Parser, run_command
from tli_jax.errors import OutputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf.records import reading
from tli_jax.reporting import comparison
from tli_jax.reporting.growth import compare_records, compare_trained
from tli_jax.reporting.layer_map import draw_svg
from tli_jax.reporting.records import find
from tli_jax.reporting.run import draw_curves, tabulate


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="python -m tli_jax.report", description="Show runs, models and comparisons.")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="run folders, grown models, trained models, comparisons"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--layer-maps", type=Path, metavar="FILE", help="also draw the models' layer maps, as SVG")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="also draw the runs' losses, as PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    found = find(args.folders)
    records = found.grown | {name: growth for name, (_, growth) in found.trained.items() if growth is not None}
    if args.curves is not None and not found.runs:
        raise UsageError("--curves draws the losses of runs, and none of these folders is a run: leave it out")
    if args.layer_maps is not None and not records:
        raise UsageError("--layer-maps draws grown models, and none of these folders is one: leave it out")
    screen = console()
    if found.runs:
        screen.show(tabulate(found.runs))
    if found.grown:
        screen.show(compare_records(found.grown))
    if found.trained:
        screen.show(compare_trained(found.trained))
    for name, results in found.comparisons.items():
        with reading(f"{name}: results.json"):
            tables, lines = comparison.tabulate(results), comparison.describe(results)
        screen.print(rich.text.Text(f"comparison {name}", "bold"))
        screen.show(tables)
        for line in lines:
            screen.print(printable(line), soft_wrap=True)
    if args.curves is not None:
        draw_curves(found.runs, args.curves)
    if args.layer_maps is not None:
        drawing = draw_svg({name: Plan.from_json(record, name) for name, record in records.items()})
        try:
            args.layer_maps.write_text(drawing, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{args.layer_maps}: cannot be written ({error.strerror}): choose another") from None


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
