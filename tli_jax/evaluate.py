"""``tli-jax evaluate``: measure a model's loss on texts and its accuracy on multiple-choice tasks."""

import sys
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table

from tli_jax.cli.config import EvaluateConfig
from tli_jax.cli.console import console, print_json
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.evaluation.evaluate import evaluate

PROGRAM = "tli-jax evaluate"
EXAMPLES = (
    "--model grown --text held_out.txt",
    "--model meta-llama/Llama-3.2-1B --tasks kobest --shots 5 --json",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(
        EvaluateConfig, PROGRAM, "Measure a model's loss on texts and its accuracy on tasks.", arguments, EXAMPLES
    )
    with processes.joined(config.distributed, config.process):
        found = evaluate(config)
        if not processes.is_first():
            return
        if config.json:
            print_json(found)
        else:
            for table in tabulate(found):
                console().show(table)


def tabulate(found: dict[str, Any]) -> list[rich.table.Table]:
    """Texts and tasks for a terminal."""
    tables = []
    if found["texts"]:
        table = rich.table.Table(box=rich.box.SIMPLE)
        for heading in ("text", "tokens", "loss, nats a token", "perplexity", "bits a byte"):
            table.add_column(heading, justify="left" if heading == "text" else "right")
        for path, one in found["texts"].items():
            bits = f"{one['bits_per_byte']:.4f}" if "bits_per_byte" in one else "–"
            table.add_row(path, f"{one['tokens']:,}", f"{one['loss']:.4f}", f"{one['perplexity']:.3f}", bits)
        tables.append(table)
    if found["tasks"]:
        table = rich.table.Table(box=rich.box.SIMPLE)
        for heading in ("task", "questions", "accuracy", "± stderr", "by length", "macro F1"):
            table.add_column(heading, justify="left" if heading == "task" else "right")
        for name, one in found["tasks"].items():
            stderr = "–" if one["stderr"] is None else f"{one['stderr']:.4f}"
            values = (f"{one[key]:.4f}" for key in ("accuracy_normalised", "f1"))
            table.add_row(name, f"{one['questions']:,}", f"{one['accuracy']:.4f}", stderr, *values)
        tables.append(table)
    return tables


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
