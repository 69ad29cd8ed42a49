"""``tli-jax scan``: measure what each layer of a base is worth, and what doubling it costs, before growing."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.config import ScanConfig
from tli_jax.cli.console import console, printable
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.reporting.scan import describe, make_tables
from tli_jax.reporting.scan_page import write_scan_report

PROGRAM = "tli-jax scan"
DESCRIPTION = "Measure what each layer of a base is worth, and what doubling it costs, before growing."
EXAMPLES = (
    "--model embedded --text embedded --output scan",
    "--model HuggingFaceTB/SmolLM2-135M --text new.txt --old-text old.txt --grow-to 36,42 --output scan",
    "--model embedded --text new.txt --what bypass,half --tokens 4096 --output scan",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(ScanConfig, PROGRAM, DESCRIPTION, arguments, EXAMPLES)
    from tli_jax.verify.scan_job import run_scan  # here, because it imports JAX

    with processes.joined(config.distributed, config.process):
        results = run_scan(config)
        if processes.is_first():
            report(config, results)


def report(config: ScanConfig, results: dict[str, Any]) -> None:
    """Write the page, and print the tables and what to do next."""
    written = write_scan_report(results, Path(config.output))
    screen = console()
    for table in make_tables(results):
        table.render(screen)
    files = ["scan.json", *written, *(plan["file"] for plan in results["plans"].values())]
    lines = [*describe(results), f"wrote {', '.join(files)} to {config.output}"]
    if not written:
        lines.append("no page and no plots, which need matplotlib and plotly: pip install matplotlib plotly")
    for plan in results["plans"].values():
        lines.append(
            f"grow it: tli-jax upscale --model {config.model} --plan {config.output}/{plan['file']} --output DIR"
        )
    for line in lines:
        screen.print(printable(line), soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
