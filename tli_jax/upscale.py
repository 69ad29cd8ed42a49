"""``tli-jax upscale``: grow a checkpoint from file to file and prove what that did to the model."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.console import console, print_json, printable, say
from tli_jax.cli.frame import run_command
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.card import snippet
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.records import read_growth
from tli_jax.reporting.growth import print_plan, print_proof
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import train
from tli_jax.upscaling.job import grow, prepare
from tli_jax.upscaling.options import make_plan

PROGRAM = "tli-jax upscale"
EXAMPLES = (
    "--model embedded --output grown",
    "--model embedded --output grown --method dus --drop 3",
    "--model meta-llama/Llama-3.2-1B --output grown --every 4 --plan-only",
    "--config configs/llama3.2-1b-tli.yaml",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(UpscaleConfig, PROGRAM, "Grow a Llama by layers and prove what that did to it.", arguments, EXAMPLES)
    if config.train is None or config.plan_only:
        upscale(config)
        return
    config.check_grows_once()
    recipe = dataclasses.replace(config.train, model=config.train.model or config.output or "")
    with processes.joined(recipe.distributed, recipe.process, recipe.timeouts):
        if RunDirectory(recipe.run).is_begun:
            say(f"run {recipe.run} exists already: skipping growth, resuming training")
        else:
            with processes.first("growth"):
                if processes.is_first() and not _is_grown(config):
                    upscale(config)
        train(recipe)


def _is_grown(config: UpscaleConfig) -> bool:
    """Whether the output is already complete because the same command was interrupted before training began."""
    file = Path(str(config.output)) / "growth.json"
    if config.overwrite or not file.is_file():
        return False
    existing = Plan.from_json(read_growth(file), str(file))
    base = open_checkpoint(hub.resolve(config.model, config.revision))
    importance = existing.options.get("importance") or [0.0] * base.config.num_hidden_layers
    plan = make_plan(config, base, importance)
    return (existing.rows, existing.experts) == (plan.rows, plan.experts)


def upscale(config: UpscaleConfig) -> None:
    """Grow as configured and print the plan, its cost and the proof."""
    started = time.perf_counter()
    screen = console(is_stderr=config.json)
    job = prepare(config)
    screen.print(printable(f"base: {config.model}"), soft_wrap=True)
    print_plan(screen, job.plan, job.description)
    result: dict[str, Any] = job.description
    if not config.plan_only:
        seconds = {"start": time.perf_counter() - started}
        record = grow(job, seconds)
        seconds["total"] = time.perf_counter() - started
        if record["proof"]:
            print_proof(screen, record["proof"])
        if config.sample is not None:
            _print_samples(config, screen, job.base.folder)
        times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        screen.print(printable(f"written to {config.output} ({times})"), soft_wrap=True)
        screen.print(f"\n{snippet(str(config.output))}", soft_wrap=True)
        result = {**result, **record, "output": config.output, "seconds": seconds}
    if config.json:
        print_json(result)


def _print_samples(config: UpscaleConfig, screen: Any, base: Path) -> None:
    """Print a greedy continuation by each model."""
    from tli_jax.evaluation.continuation import continue_prompt

    prompt = str(config.sample)
    for name, folder in {"base": base, "grown": str(config.output)}.items():
        text = continue_prompt(folder, prompt, chat=False).text
        screen.print(f"{name:>5} continues: {prompt + text!r}", soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
