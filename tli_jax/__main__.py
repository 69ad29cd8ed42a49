"""``tli-jax``, also ``python -m tli_jax``: one command with a sub-command for each task."""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from tli_jax import __version__
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes
from tli_jax.errors import UsageError, nearest

COMMANDS = {
    "scan": "measure what each layer is worth and what doubling it costs, before growing",
    "upscale": "grow a model by layers and prove what that did to it",
    "prepare": "tokenize text once, for runs that open it in a second",
    "train": "continue pretraining, of all layers or the injected ones",
    "evaluate": "measure a model's loss on texts and its accuracy on tasks",
    "generate": "continue a prompt with one model, or with two side by side",
    "compare": "grow a base with several methods, train each alike, and compare",
    "preflight": "check that a growth or a training fits and starts, without starting it",
    "report": "show runs, grown models, trained models and comparisons",
    "version": "print the versions of tli_jax and of the packages it uses",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def main(arguments: Sequence[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name in ("-V", "--version"):
        print(f"tli-jax {__version__}")
    elif name == "version":
        print(f"tli_jax {__version__}\npython {platform.python_version()}")
        for package in _PACKAGES:
            print(package, metadata.version(package))
    elif name in COMMANDS:
        importlib.import_module(f"tli_jax.{name}").main(rest)
    else:
        raise UsageError(f"{name} is not a command{nearest(name, COMMANDS)}; see tli-jax --help")


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: tli-jax COMMAND [options]\n\n"
        "Make a trained Llama deeper, prove what that did to it, and train it on.\n\n"
        "examples:\n"
        "  tli-jax upscale --model embedded --output grown\n"
        '  tli-jax generate --model grown --compare-to embedded --prompt "import os"\n\n'
        f"commands:\n{commands}\n\n"
        "tli-jax COMMAND --help lists the options of a command; tli-jax --version prints the version."
    )


def cli() -> NoReturn:
    processes.leave(run_command(main, sys.argv[1:]))


if __name__ == "__main__":
    cli()
