"""``tli-jax report FOLDER…``: show runs, models and comparisons from their records."""

import sys
from collections.abc import Sequence
from pathlib import Path

import rich.text

from tli_jax.cli.console import console, finite, print_json, printable, say
from tli_jax.cli.frame import Parser, run_command
from tli_jax.errors import OutputError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf.records import reading
from tli_jax.reporting import comparison, growth, run
from tli_jax.reporting.layer_map import draw_svg
from tli_jax.reporting.records import read_records


def main(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="tli-jax report",
        description="Show runs, grown models, trained models and comparisons, each kind in its own table.",
        epilog="examples:\n  tli-jax report grown run comparison\n  tli-jax report run --curves losses.png",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="run directories, grown models, trained models, comparisons"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout (default: tables)")
    parser.add_argument("--layer-maps", type=Path, metavar="FILE", help="also draw the layer maps of the models (SVG)")
    parser.add_argument(
        "--curves", type=Path, metavar="FILE", help="also plot the losses of the runs (PNG, SVG or PDF)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    records = read_records(args.folders)
    plans = records.grown | {name: model.growth for name, model in records.trained.items() if model.growth is not None}
    if args.curves is not None and not records.runs:
        raise UsageError("--curves plots the losses of runs, and none of these folders is a run: omit it")
    if args.layer_maps is not None and not plans:
        raise UsageError("--layer-maps draws grown models, and none of these folders is one: omit it")

    runs = {name: run.summarise(lines) for name, lines in records.runs.items()}
    grown = {name: growth.summarise_grown(name, record) for name, record in records.grown.items()}
    trained = {name: growth.summarise_trained(name, model) for name, model in records.trained.items()}
    compared, comparison_tables = {}, {}
    for name, results in records.comparisons.items():
        with reading(f"{name}: results.json"):
            comparison_tables[name] = comparison.make_tables(results), comparison.describe(results)
            compared[name] = {key: results[key] for key in ("base", "summary", "claims", "left_out")}

    if args.json:
        kinds = {"runs": runs, "grown_models": grown, "trained_models": trained, "comparisons": compared}
        print_json(finite(kinds))
    else:
        screen = console()
        if runs:
            run.make_table(runs).render(screen)
        if grown:
            growth.make_grown_table(grown).render(screen)
        if trained:
            growth.make_trained_table(trained).render(screen)
        for name, (tables, lines) in comparison_tables.items():
            screen.print(rich.text.Text(f"comparison {name}", "bold"), soft_wrap=True)
            for table in tables:
                table.render(screen)
            for line in lines:
                screen.print(printable(line), soft_wrap=True)

    if args.curves is not None:
        run.draw_curves(records.runs, args.curves)
        say(f"wrote {args.curves}")
    if args.layer_maps is not None:
        drawing = draw_svg({name: Plan.from_json(record, name) for name, record in plans.items()})
        try:
            args.layer_maps.write_text(drawing, encoding="utf-8")
        except OSError as error:
            message = f"{args.layer_maps}: cannot be written ({error.strerror}): choose another file"
            raise OutputError(message) from None
        say(f"wrote {args.layer_maps}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
