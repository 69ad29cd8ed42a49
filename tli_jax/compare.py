"""``tli-jax compare``: grow one base by several methods to one size, train each alike, and compare."""

import shlex
import sys
from collections.abc import Sequence

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.console import console, printable
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.comparison.run import compare
from tli_jax.distributed import processes
from tli_jax.reporting.comparison import describe, make_tables

PROGRAM = "tli-jax compare"
DESCRIPTION = "Grow a base by several methods to one size, train each model alike, and compare them."
EXAMPLES = (
    "--model embedded --text new.jsonl --output comparison",
    "--model base --text new.jsonl --old-text old.jsonl --methods tli:identity,dus --every 2 --output comparison",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(CompareConfig, PROGRAM, DESCRIPTION, arguments, EXAMPLES)
    results = compare(config, shlex.join([*PROGRAM.split(), *arguments]))
    screen = console()
    for table in make_tables(results):
        table.render(screen)
    for line in (*describe(results), f"wrote results.json, results.csv, report.html and plots to {config.output}"):
        screen.print(printable(line), soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
