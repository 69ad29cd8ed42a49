"""``python -m tli_jax.report FOLDER…``: a table of grown models, from what their growth recorded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tli_jax import command
from tli_jax.checkpoint.headers import parse_json
from tli_jax.errors import MissingInputError
from tli_jax.growth.plan import Plan
from tli_jax.report.growth import compare_records
from tli_jax.report.layer_map import draw_svg


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tli_jax.report", description="Compare grown models.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a grown model, with growth.json in it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--layer-maps", type=Path, metavar="FILE", help="also draw their layer maps, as SVG")
    args = parser.parse_args(arguments)
    records = {}
    for folder in args.folders:
        file = folder / "growth.json"
        if not file.is_file():
            raise MissingInputError(f"{folder}: no growth.json, so not a model grown by tli_jax.upscale")
        records[folder.name] = parse_json(file.read_bytes(), str(file))
    command.console().print(compare_records(records))
    if args.layer_maps is not None:
        drawing = draw_svg({name: Plan.from_json(record, name) for name, record in records.items()})
        args.layer_maps.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
