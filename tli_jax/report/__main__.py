"""``python -m tli_jax.report FOLDER…``: grown models or training runs side by side, from what they recorded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tli_jax import command
from tli_jax.checkpoint.record import read_growth_record
from tli_jax.errors import MissingInputError
from tli_jax.growth.plan import Plan
from tli_jax.report.growth import compare_records
from tli_jax.report.layer_map import draw_svg
from tli_jax.report.run import draw_curves, read_run, tabulate
from tli_jax.training.run import RunFolder


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tli_jax.report", description="Compare grown models, or runs.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="grown models, or run folders")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--layer-maps", type=Path, metavar="FILE", help="also draw the models' layer maps, as SVG")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="also draw the runs' losses, as PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    if all(RunFolder(folder).is_begun for folder in args.folders):
        runs = {Path(folder).name: read_run(folder) for folder in args.folders}
        command.console().print(tabulate(runs))
        if args.curves is not None:
            draw_curves(runs, args.curves)
        return
    records = {}
    for folder in map(Path, args.folders):
        file = folder / "growth.json"
        if not file.is_file():
            raise MissingInputError(f"{folder}: neither a run nor, without growth.json, a model that was grown")
        records[folder.name] = read_growth_record(file)
    command.console().print(compare_records(records))
    if args.layer_maps is not None:
        drawing = draw_svg({name: Plan.from_json(record, name) for name, record in records.items()})
        args.layer_maps.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
