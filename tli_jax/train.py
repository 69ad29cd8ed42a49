"""``tli-jax train``: continue the pretraining of a Llama on a mesh, grown or not."""

import sys
from collections.abc import Sequence

from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.cli.train_config import TrainConfig
from tli_jax.distributed import processes
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import train

PROGRAM = "tli-jax train"
EXAMPLES = (
    "--model grown --run runs/first --text corpus.jsonl --only injected --steps 1000 --export trained",
    "--run runs/first --steps 2000   (resumes with the stored configuration)",
    "--run runs/first --export-only --export trained",
)


def main(arguments: Sequence[str]) -> None:
    config = read_config(arguments)
    with processes.joined(config.distributed, config.process):
        train(config)


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration. Flags override the stored configuration of an existing run, unless ``--config`` is given.

    Raises:
        UsageError, MissingInputError: see ``cli.parse.parse``.
    """
    description = "Continue the pretraining of a Llama: all layers, or the injected ones."
    config = parse(TrainConfig, PROGRAM, description, arguments, EXAMPLES)
    run = RunDirectory(config.run)
    if config.run and run.is_begun and not any(word.split("=")[0] == "--config" for word in arguments):
        config = parse(TrainConfig, PROGRAM, description, [*arguments, "--config", str(run.config)])
    return config


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
