"""``python -m tli_jax.compare``: one base grown in several ways to one size, trained alike, and put side by side."""

import shlex
import sys
from collections.abc import Sequence

from tli_jax.cli.config import CompareConfig
from tli_jax.cli.console import console
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.comparison.run import compare
from tli_jax.distributed import processes
from tli_jax.reporting.comparison import describe, tabulate

PROGRAM = "python -m tli_jax.compare"


def main(arguments: Sequence[str]) -> None:
    config = parse(CompareConfig, PROGRAM, "Grow a base in several ways, train each alike, and compare.", arguments)
    results = compare(config, shlex.join([*PROGRAM.split(), *arguments]))
    console().show(tabulate(results))
    for line in describe(results):
        console().print(line, soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
