"""``tli-jax generate``: continue a prompt with a model, or with two models side by side."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence

from tli_jax.cli.config import GenerateConfig
from tli_jax.cli.console import console, print_json, printable
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.errors import UsageError
from tli_jax.evaluation.continuation import continue_prompt

PROGRAM = "tli-jax generate"
EXAMPLES = (
    '--model grown --prompt "import os"',
    '--model grown --compare-to embedded --prompt "import os" --max-new-tokens 100',
)


def main(arguments: Sequence[str]) -> None:
    config = parse(GenerateConfig, PROGRAM, "Continue a prompt with a model.", arguments, EXAMPLES)
    if not config.model:
        raise UsageError("model is not set: --model FOLDER, a Hub id or 'embedded'")
    if not config.prompt:
        raise UsageError("prompt is not set: --prompt TEXT")
    options = {key: getattr(config, key) for key in ("chat", "max_new_tokens", "temperature", "seed")}
    models = [(config.model, config.revision)] + ([(config.compare_to, None)] if config.compare_to else [])
    outputs = [continue_prompt(model, config.prompt, revision=revision, **options) for model, revision in models]
    if config.json:
        print_json({"prompt": config.prompt, "continuations": [dataclasses.asdict(output) for output in outputs]})
        return
    screen = console()
    for output in outputs:
        if len(outputs) > 1:
            screen.print(f"── {printable(output.model)}", soft_wrap=True)
        for line in ((config.prompt if not output.is_chat else "") + output.text).splitlines():
            screen.print(printable(line), soft_wrap=True)
    if len(outputs) == 2:
        screen.print(f"── {_difference(*(output.tokens for output in outputs))}")


def _difference(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if a == b:
        return f"both models generate the same {len(a)} tokens"
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    return f"the models agree on the first {same} of {max(len(a), len(b))} tokens"


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
