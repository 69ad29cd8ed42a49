"""``python -m tli_jax.train``: continued pretraining of a Llama on a mesh, grown or not."""

import sys
from collections.abc import Sequence

from tli_jax.cli.config import TrainConfig
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import train

PROGRAM = "python -m tli_jax.train"


def main(arguments: Sequence[str]) -> None:
    config = read_config(arguments)
    with processes.joined(config.distributed, config.process):
        train(config)


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration; with ``--run`` of a run that has begun and no ``--config``, over what that was started with.

    Raises:
        UsageError, MissingInputError: see ``config.parse``.
    """
    config = parse(TrainConfig, PROGRAM, "Train a Llama on, all of it or its injected layers.", arguments)
    run = RunDirectory(config.run)
    if config.run and run.is_begun and not any(word.split("=")[0] == "--config" for word in arguments):
        config = parse(TrainConfig, PROGRAM, "", [*arguments, "--config", str(run.config)])
    return config


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
