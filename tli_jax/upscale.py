"""``python -m tli_jax.upscale``: grow a checkpoint, file to file, and prove what that did to the model."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax.cli.config import UpscaleConfig
from tli_jax.cli.console import console, print_json, printable, say
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.distributed import processes
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub
from tli_jax.hf.card import snippet
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.record import read_growth_record
from tli_jax.reporting import growth as report
from tli_jax.training.run_directory import RunDirectory
from tli_jax.training.train import train as run_training
from tli_jax.upscaling.job import Job, grow, prepare
from tli_jax.upscaling.options import make_plan

PROGRAM = "python -m tli_jax.upscale"


def main(arguments: Sequence[str]) -> None:
    config = parse(UpscaleConfig, PROGRAM, "Grow a Llama checkpoint and prove it.", arguments)
    if config.train is None or config.plan_only:
        upscale(config)
        return
    # A section for training: straight on into it. Growth is the first process' work, and not done twice for one run.
    train = dataclasses.replace(config.train, model=config.train.model or config.output or "")
    with processes.joined(train.distributed, train.process):
        if RunDirectory(train.run).is_begun:
            say(f"run {train.run} has begun, growth is not repeated")
        else:
            with processes.first("growth"):
                if processes.is_first() and not _is_there(config):
                    upscale(config)
        run_training(train)


def _is_there(config: UpscaleConfig) -> bool:
    """Whether the output is what this would write: the same command was stopped between growth and training."""
    file = Path(str(config.output)) / "growth.json"
    if config.overwrite or not file.is_file():
        return False
    there = Plan.from_json(read_growth_record(file), str(file))
    base = open_checkpoint(hub.resolve(config.model, config.revision))
    importance = there.options.get("importance") or [0.0] * base.config.num_hidden_layers
    plan = make_plan(config, base, importance)
    return (there.rows, there.experts) == (plan.rows, plan.experts)


def upscale(config: UpscaleConfig) -> None:
    """Grow as configured, and print what was done.

    Raises:
        TliError: see ``prepare`` and ``grow``.
    """
    started = time.perf_counter()
    screen = console(is_stderr=config.json)
    job = prepare(config)
    screen.print(printable(f"base: {config.model}"), soft_wrap=True)
    report.print_plan(screen, job.plan, job.description)
    result = job.description
    if not config.plan_only:
        seconds = {"start": time.perf_counter() - started}
        record = grow(job, seconds)
        if record["proof"]:
            report.print_proof(screen, record["proof"])
        seconds["total"] = time.perf_counter() - started
        if config.sample is not None:
            _sample(job, screen, config.sample)
        times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        screen.print(printable(f"written to {config.output} ({times})"), soft_wrap=True)
        screen.print(f"\n{snippet(str(config.output))}", soft_wrap=True)
        result = {**result, **record, "output": config.output, "seconds": seconds}
    if config.json:
        print_json(result)


def _sample(job: Job, screen: Any, prompt: str) -> None:
    """A greedy continuation by each model."""
    import jax.numpy as jnp

    from tli_jax.hf.checkpoint import load_hf
    from tli_jax.models.generate import generate_tokens

    assert job.tokenizer is not None, "refused at the start"
    for name, folder in {"base": job.base.folder, "grown": Path(str(job.config.output))}.items():
        config, params = load_hf(folder)
        bos = [] if config.bos_token_id is None else [config.bos_token_id]
        ids = np.asarray([bos + job.tokenizer.encode(prompt)])
        longer = generate_tokens(
            config, params, jnp.asarray(ids), min(64, config.max_position_embeddings - ids.shape[1])
        )
        text = job.tokenizer.decode(np.asarray(longer)[0, len(bos) :].tolist())
        screen.print(f"{name:>5} writes: {text!r}", soft_wrap=True)


if __name__ == "__main__":
    processes.leave(run_command(main, sys.argv[1:]))
