"""``tli-jax evaluate``: measure a model's loss on texts and its accuracy on multiple-choice tasks."""

import sys
from collections.abc import Sequence
from typing import Any

from tli_jax.cli.config import EvaluateConfig
from tli_jax.cli.console import console, print_json
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.cli.tables import Table, make_columns, show_number
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
        results = evaluate(config)
        if not processes.is_first():
            return
        if config.json:
            print_json(results)
        else:
            for table in make_tables(results):
                table.render(console())


def make_tables(results: dict[str, Any]) -> list[Table]:
    """Tables of the texts and of the tasks."""
    tables = []
    if texts := results["texts"]:
        numbers = {"tokens": 3, "loss, nats per token": 0, "perplexity": 1, "bits per byte": 2}
        specs = {"loss": ".4f", "perplexity": ".3f", "bits_per_byte": ".4f"}
        rows = [
            [path, f"{text['tokens']:,}", *(show_number(text.get(key), spec) for key, spec in specs.items())]
            for path, text in texts.items()
        ]
        tables.append(Table(make_columns({"text": 0}, numbers), rows))
    if tasks := results["tasks"]:
        numbers = {"questions": 2, "accuracy": 0, "± stderr": 1, "normalised by length": 3, "macro F1": 3}
        keys = ("accuracy", "stderr", "accuracy_normalised", "f1")
        rows = [
            [name, f"{task['questions']:,}", *(show_number(task[key]) for key in keys)] for name, task in tasks.items()
        ]
        tables.append(Table(make_columns({"task": 0}, numbers), rows))
    return tables


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
