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
    # The run is opened after the processes are joined, which forks: clients of object storage do not survive a fork.
    with processes.joined(config.distributed, config.process, config.timeouts):
        run = RunDirectory(config.run)
        # An existing run adds the configuration that it stores.
        if config.run and run.is_begun and not any(word.split("=")[0] == "--config" for word in arguments):
            config = read_config([*arguments, "--config", str(run.config)])
        train(config)


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of the command line.

    Raises:
        UsageError, MissingInputError: see ``cli.parse.parse``.
    """
    return parse(
        TrainConfig,
        PROGRAM,
        "Continue the pretraining of a Llama: all layers, or the injected ones.",
        arguments,
        EXAMPLES,
    )


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
