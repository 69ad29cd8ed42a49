"""``python -m tli_jax.compare``: grow one base by several methods to one size, train each alike, and compare."""

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

PROGRAM = "python -m tli_jax.compare"


def main(arguments: Sequence[str]) -> None:
    config = parse(CompareConfig, PROGRAM, "Grow a base by several methods, train each alike, and compare.", arguments)
    results = compare(config, shlex.join([*PROGRAM.split(), *arguments]))
    screen = console()
    for table in make_tables(results):
        table.render(screen)
    for line in describe(results):
        screen.print(printable(line), soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
