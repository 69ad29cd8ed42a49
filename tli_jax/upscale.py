"""``python -m tli_jax.upscale``: grow a checkpoint, file to file, and prove what that did to the model."""

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax import command
from tli_jax import train as training
from tli_jax.checkpoint import hub, sidecar, tokens
from tli_jax.checkpoint.headers import INDEX, SINGLE
from tli_jax.checkpoint.hf import Checkpoint, check_unchanged, open_checkpoint
from tli_jax.checkpoint.output import check_output, staged
from tli_jax.checkpoint.record import read_growth_record
from tli_jax.checkpoint.stream import (
    Piece,
    check_tensors,
    grown_pieces,
    parse_size,
    split_shards,
    write_safetensors,
)
from tli_jax.config import UpscaleConfig, parse
from tli_jax.data.documents import read_plain
from tli_jax.errors import DataError, UsageError
from tli_jax.growth.experts import Experts
from tli_jax.growth.plan import Plan
from tli_jax.growth.presets import PRESETS
from tli_jax.models.shapes import check_shape
from tli_jax.parallel import processes
from tli_jax.report import growth as report
from tli_jax.report.card import grown_card, snippet
from tli_jax.training.record import read_trainings
from tli_jax.training.run import RunFolder

PROGRAM = "python -m tli_jax.upscale"


def make_plan(config: UpscaleConfig, base: Checkpoint, importance: Sequence[float] | None = None) -> Plan:
    """The plan that the options ask for, continuing the base's own growth where it has one.

    Args:
        importance: of the layers, for ``adept`` (see ``needs_importance``).

    Raises:
        UsageError: an option does not belong to the method, or is out of range.
    """
    preset = PRESETS[config.method]
    known = inspect.signature(preset).parameters
    names = ("every", "init", "scale", "after", "remainder", "drop", "groups", "copies", "times", "layers")
    names += ("seed", "noise_ratio", "block", "count")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    experts = _make_experts(config, base)
    if experts is not None:
        # What is drawn is drawn for the experts, unless the method draws too.
        given = {name: value for name, value in given.items() if name in known or name not in ("seed", "noise_ratio")}
    if config.method == "custom":
        if "layers" not in given:
            raise UsageError("custom needs --layers, e.g. --layers '0-3, 3*0, 4-7'")
        given["spec"] = given.pop("layers")
    foreign = sorted(name for name in given if name not in known or name == "layers")
    if foreign:
        own = ", ".join(name for name in known if name in names and name != "layers") or "none"
        raise UsageError(f"{', '.join(foreign)}: not an option of method {config.method}, which has {own}")
    if "std" in known:
        given["std"] = base.config.initializer_range
    if needs_importance(config):
        given["importance"] = importance
    plan = dataclasses.replace(preset(base.config.num_hidden_layers, **given), experts=experts)
    return (
        plan if base.growth is None else plan.continues(Plan.from_json(base.growth, str(base.folder / "growth.json")))
    )


def _make_experts(config: UpscaleConfig, base: Checkpoint) -> Experts | None:
    """What the options make of the feed-forwards; None where they say nothing of experts."""
    keys: dict[str, Any] = {"count": config.experts, "top_k": config.top_k, "granularity": config.granularity}
    keys |= {"upcycle": config.upcycle, "router_std": config.router_std}
    given: dict[str, Any] = {name: value for name, value in keys.items() if value is not None}
    if not given and config.method != "moe":
        return None
    if config.seed is not None:
        given["seed"] = config.seed
    if config.noise_ratio is not None and (config.method == "moe" or given.get("upcycle") in ("noise", "drop")):
        given["ratio"] = config.noise_ratio
    defaults: dict[str, Any] = {"router_std": base.config.initializer_range}
    return Experts(**defaults | given)


def needs_importance(config: UpscaleConfig) -> bool:
    """Whether the plan depends on the weights."""
    return config.method == "adept" and config.after is None


@dataclasses.dataclass(frozen=True)
class Job:
    """A growth that has been thought through: everything that can be refused before a byte is written has been.

    Attributes:
        facts: what initialisers that work on the host found, once tensors are made.
    """

    config: UpscaleConfig
    base: Checkpoint
    tokenizer: tokens.Tokenizer | None
    plan: Plan
    shards: dict[str, list[Piece]]
    description: dict[str, Any]
    facts: dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    config = parse(UpscaleConfig, PROGRAM, "Grow a Llama checkpoint and prove it.", arguments)
    if config.train is None or config.plan_only:
        upscale(config)
        return
    # A section for training: straight on into it. Growth is the first process' work, and not done twice for one run.
    train = dataclasses.replace(config.train, model=config.train.model or config.output or "")
    with processes.joined(train.distributed, train.process):
        if RunFolder(train.run).is_begun:
            command.say(f"run {train.run} has begun, growth is not repeated")
        else:
            with processes.first("growth"):
                if processes.is_first() and not _is_there(config):
                    upscale(config)
        training.train(train)


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
    screen = command.console(is_stderr=config.json)
    job = prepare(config)
    screen.print(command.printable(f"base: {config.model}"), soft_wrap=True)
    report.print_plan(screen, job.plan, job.description)
    result = job.description
    if not config.plan_only:
        seconds = {"start": time.perf_counter() - started}
        record = grow(job, screen, seconds)
        seconds["total"] = time.perf_counter() - started
        if config.sample is not None:
            _sample(job, screen, config.sample)
        times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        screen.print(command.printable(f"written to {config.output} ({times})"), soft_wrap=True)
        screen.print(f"\n{snippet(str(config.output))}", soft_wrap=True)
        result = {**result, **record, "output": config.output, "seconds": seconds}
    if config.json:
        command.print_json(result)


def prepare(config: UpscaleConfig) -> Job:
    """Find and check the base, and make the plan; reads headers and configuration only, unless ``needs_importance``.

    Raises:
        TliError: whatever can be known to be wrong before weights are read.
    """
    if not config.model:
        raise UsageError("--model is needed: a folder, a hub id, or 'embedded'")
    if not config.output and not config.plan_only:
        raise UsageError("--output is needed: the folder to write (or --plan-only)")
    max_shard_bytes = parse_size(config.max_shard_size)
    folder = hub.resolve(config.model, config.revision, config.plan_only and not needs_importance(config))
    if config.output is not None and not config.plan_only:
        check_output(Path(config.output), folder, config.overwrite)
    base = open_checkpoint(folder)
    check_shape(base.config, config.shape, str(folder))
    runs_it = config.proof or config.sample is not None or needs_importance(config) or config.train is not None
    if runs_it and not config.plan_only:
        base.config.check_runnable(str(folder))
    tokenizer, warnings = tokens.open_tokenizer(folder, base.config)
    if config.plan_only and tokenizer is None:
        # Of a hub id only headers and configuration have been fetched: that says nothing of a tokenizer.
        warnings = []
    for warning in (*base.warnings, *warnings, *([] if config.plan_only else sidecar.left_behind(folder))):
        command.warn(warning)
    if needs_importance(config):
        make_plan(config, base, [0.0] * base.config.num_hidden_layers)  # refuses options before it takes time
    importance = _measure_importance(config, base, tokenizer) if needs_importance(config) else None
    plan = make_plan(config, base, importance)
    facts: dict[str, Any] = {}
    pieces = grown_pieces(base, plan, facts)
    shards = split_shards(pieces, max_shard_bytes)
    files = {name: sum(piece.nbytes for piece in shard) for name, shard in shards.items()}
    files |= {INDEX: 0} if list(shards) != [SINGLE] else {}
    files |= dict.fromkeys(("config.json", "growth.json", "README.md"), 0)
    files |= {name: file.stat().st_size for name, file in sidecar.allowed_files(folder).items()}
    return Job(config, base, tokenizer, plan, shards, report.describe(base, plan, pieces, files), facts)


def grow(job: Job, screen: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """Check the base, write the grown folder, prove it; what ``growth.json`` says. ``seconds`` is filled on the way.

    Raises:
        DataError: NaN or Inf in the base, a base that changes meanwhile, a text that cannot be read, or a promise that
            is not kept.
        OutputError, StorageError: the output cannot be written.
    """
    config, base, plan = job.config, job.base, job.plan
    ids = _read_ids(config, base, job.tokenizer)
    size = sum(job.description["writes"].values())
    with staged(Path(str(config.output)), size, overwrite=config.overwrite) as partial:
        digests, nonfinite = _check(job, seconds)
        at = time.perf_counter()
        with command.progress("write", job.description["after"]["bytes"]) as advance:
            grown_digests, hashing = write_safetensors(partial, job.shards, digests, advance)
        seconds |= {"write": time.perf_counter() - at - hashing, "hash": hashing}
        for what in job.facts.get("transport", {}).get("not_converged", []):
            command.warn(f"{what}: transport did not converge")
        sidecar.write_json(partial / "config.json", sidecar.grow_config(base.raw, base.config, plan))
        sidecar.copy_allowed(base.folder, partial)
        proof = None
        if config.proof:
            proof = _prove(job, open_checkpoint(partial), ids)
            seconds["proof"] = proof["seconds"]
            report.print_proof(screen, proof)
        reason = None if base.config.is_runnable else f"RoPE type {base.config.rope_type!r} is not supported"
        name, revision = hub.origin(base.folder) or (config.model, None)
        of_base = {"layers": plan.base_layers, "name": name, "revision": revision}
        record = {
            **plan.to_json(),
            "base": of_base | {"training": read_trainings(base.folder)},
            "history": _history(plan, base),
            "parameters": job.description["after"]["parameters"],
            "digests": {"algorithm": "sha256", "base": digests, "grown": grown_digests},
            "nonfinite": nonfinite,
            "computed": job.facts,
            "versions": sidecar.versions("tli_jax", "numpy", "jax", "safetensors"),
            "proof": proof,
            "not_proved": None if proof else " because ".join(filter(None, ("--no-proof", reason))),
        }
        sidecar.write_json(partial / "growth.json", record)
        card = grown_card(Path(os.path.abspath(str(config.output))).name, record, plan)  # noqa: PTH100
        (partial / "README.md").write_text(card, encoding="utf-8")
        check_unchanged(base)
    return record


def _history(plan: Plan, base: Checkpoint) -> list[dict[str, Any]]:
    """The growths before this one; that which made the base also says how *its* base had been trained."""
    history = [dict(step) for step in plan.history]
    if base.growth is not None:
        history[-1]["base"] = history[-1]["base"] | {"training": base.growth["base"].get("training", [])}
    return history


def _check(job: Job, seconds: dict[str, float]) -> tuple[dict[str, str], dict[str, int]]:
    """Digests of the base, in one pass with the search for NaN and Inf."""
    base = job.base
    at = time.perf_counter()
    with command.progress("check", base.nbytes) as advance:
        digests, nonfinite = check_tensors(base.tensors.values(), advance)
    seconds["check"] = time.perf_counter() - at
    if nonfinite:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(nonfinite.items())[:5])
        message = f"{base.folder}: NaN or Inf in {len(nonfinite)} tensors: {found}"
        if not job.config.allow_nonfinite:
            raise DataError(f"{message}: mend them, or add --allow-nonfinite")
        command.warn(message)
    return digests, nonfinite


def _read_ids(config: UpscaleConfig, base: Checkpoint, tokenizer: tokens.Tokenizer | None) -> list[int] | None:
    """Token ids of the text for the proof; None where there is no tokenizer."""
    if tokenizer is None:
        if config.text is not None or config.sample is not None or needs_importance(config):
            raise DataError(
                f"{base.folder}: no tokenizer, which --text, --sample and --method adept need: leave them out"
            )
        return None
    text = tokens.embedded_text() if config.text is None else read_plain(Path(config.text))
    ids = tokenizer.encode(text)
    tokens.windows(ids, base.config, tokens.FEWEST, tokens.FEWEST)  # refuses what is too short
    return ids


def _measure_importance(config: UpscaleConfig, base: Checkpoint, tokenizer: tokens.Tokenizer | None) -> list[float]:
    from tli_jax.checkpoint.importance import TOKENS, measure_importance

    ids = _read_ids(config, base, tokenizer)
    assert ids is not None, "refused"
    bos = base.config.bos_token_id is not None
    tokens_BT = tokens.windows(ids, base.config, min(TOKENS, len(ids) + bos), 512)
    with command.progress("importance", 2 * base.config.num_hidden_layers, unit="layers") as advance:
        return measure_importance(base, tokens_BT, lambda: advance(1))


def _prove(job: Job, grown: Checkpoint, ids: list[int] | None) -> dict[str, Any]:
    # JAX starts here and not before: without a proof it is not needed.
    from tli_jax.checkpoint import proof

    base, plan = job.base, job.plan
    count = proof.choose_tokens(base, plan)
    if ids is None:
        tokens_BT, text = tokens.random_windows(base.config, count, proof.WINDOW), "random ids"
    else:
        tokens_BT = tokens.windows(ids, base.config, count, proof.WINDOW)
        text = job.config.text or "the embedded text"
    with command.progress("prove", proof.layers_to_run(plan), unit="layers") as advance:
        found = proof.prove(base, grown, plan, tokens_BT, text, lambda: advance(1))
    proof.check(plan, found)
    return found.to_json()


def _sample(job: Job, screen: Any, prompt: str) -> None:
    """A greedy continuation by each model."""
    import jax.numpy as jnp

    from tli_jax.checkpoint.hf import load_hf
    from tli_jax.models.generate import generate

    assert job.tokenizer is not None, "refused at the start"
    for name, folder in {"base": job.base.folder, "grown": Path(str(job.config.output))}.items():
        config, params = load_hf(folder)
        bos = [] if config.bos_token_id is None else [config.bos_token_id]
        ids = np.asarray([bos + job.tokenizer.encode(prompt)])
        longer = generate(config, params, jnp.asarray(ids), min(64, config.max_position_embeddings - ids.shape[1]))
        text = job.tokenizer.decode(np.asarray(longer)[0, len(bos) :].tolist())
        screen.print(f"{name:>5} writes: {text!r}", soft_wrap=True)


if __name__ == "__main__":
    processes.leave(command.run(main, sys.argv[1:]))
