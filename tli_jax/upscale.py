"""``python -m tli_jax.upscale``: grow a checkpoint, file to file, and prove what that did to the model."""

import inspect
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax import command
from tli_jax.checkpoint import hub, sidecar, tokens
from tli_jax.checkpoint.headers import INDEX, SINGLE
from tli_jax.checkpoint.hf import Checkpoint, open_checkpoint
from tli_jax.checkpoint.output import check_output, staged
from tli_jax.checkpoint.stream import check_tensors, grown_pieces, parse_size, split_shards, write_safetensors
from tli_jax.config import UpscaleConfig, parse
from tli_jax.errors import DataError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.growth.presets import PRESETS
from tli_jax.report import growth as report

PROGRAM = "python -m tli_jax.upscale"


def make_plan(config: UpscaleConfig, base: Checkpoint) -> Plan:
    """The plan that the options ask for, continuing the base's own growth where it has one.

    Raises:
        UsageError: an option does not belong to the method, or is out of range.
    """
    preset = PRESETS[config.method]
    known = inspect.signature(preset).parameters
    names = ("every", "init", "scale", "after", "remainder", "drop", "groups", "copies", "times", "layers")
    names += ("seed", "noise_ratio")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.method == "custom":
        if "layers" not in given:
            raise UsageError("custom needs --layers, e.g. --layers '0-3, 3*0, 4-7'")
        given["spec"] = given.pop("layers")
    foreign = sorted(name for name in given if name not in known or name == "layers")
    if foreign:
        own = ", ".join(name for name in known if name not in ("layers", "std"))
        raise UsageError(f"{', '.join(foreign)}: not an option of method {config.method}, which has {own}")
    if "std" in known:
        given["std"] = base.config.initializer_range
    plan = preset(base.config.num_hidden_layers, **given)
    return (
        plan if base.growth is None else plan.continues(Plan.from_json(base.growth, str(base.folder / "growth.json")))
    )


def main(arguments: Sequence[str]) -> None:
    started = time.perf_counter()
    config = parse(UpscaleConfig, PROGRAM, "Grow a Llama checkpoint and prove it.", arguments)
    if not config.model:
        raise UsageError("--model is needed: a folder, a hub id, or 'embedded'")
    if config.output is None and not config.plan_only:
        raise UsageError("--output is needed: the folder to write (or --plan-only)")
    max_shard_bytes = parse_size(config.max_shard_size)
    notes = command.console(is_stderr=True)
    screen = notes if config.json else command.console()

    folder = hub.resolve(config.model, config.revision, config.plan_only)
    output = None if config.output is None else Path(config.output)
    if output is not None and not config.plan_only:
        check_output(output, folder, config.overwrite)
    base = open_checkpoint(folder)
    tokenizer, warnings = tokens.open_tokenizer(folder, base.config)
    if config.plan_only and tokenizer is None:
        # Of a hub id only headers and configuration have been fetched: that says nothing of a tokenizer.
        warnings = []
    for warning in (*base.warnings, *warnings):
        notes.print(f"warning: {warning}", soft_wrap=True, markup=False)
    plan = make_plan(config, base)
    pieces = grown_pieces(base, plan)
    shards = split_shards(pieces, max_shard_bytes)
    files = {name: sum(piece.nbytes for piece in shard) for name, shard in shards.items()}
    files |= {INDEX: 0} if list(shards) != [SINGLE] else {}
    files |= dict.fromkeys(("config.json", "growth.json", "README.md"), 0)
    files |= {file.name: file.stat().st_size for file in sidecar.allowed_files(folder)}
    description = report.describe(base, plan, pieces, files)
    screen.print(f"base: {config.model}", markup=False)
    report.print_plan(screen, plan, description)
    if config.plan_only:
        if config.json:
            _print_json(description)
        return
    assert output is not None

    seconds = {"start": time.perf_counter() - started}
    digests, nonfinite = _check(config, base, seconds, notes)
    with staged(output, sum(files.values())) as partial:
        at = time.perf_counter()
        with command.progress("write", sum(piece.nbytes for piece in pieces)) as advance:
            grown_digests, hashing = write_safetensors(partial, shards, digests, advance)
        seconds |= {"write": time.perf_counter() - at - hashing, "hash": hashing}
        sidecar.write_json(partial / "config.json", sidecar.grow_config(base.raw, plan))
        sidecar.copy_allowed(folder, partial)
        proof = None
        if config.proof:
            proof = _prove(config, base, open_checkpoint(partial), plan, tokenizer)
            seconds["proof"] = proof["seconds"]
            report.print_proof(screen, proof)
        # The hub's cache calls a folder by its commit.
        revision = folder.name if folder.parent.name == "snapshots" else config.revision
        record = {
            **plan.to_json(),
            "base": {"layers": plan.base_layers, "name": config.model, "revision": revision},
            "parameters": description["after"]["parameters"],
            "digests": {"algorithm": "sha256", "base": digests, "grown": grown_digests},
            "nonfinite": nonfinite,
            "versions": _versions(),
            "proof": proof,
        }
        sidecar.write_json(partial / "growth.json", record)
        card = report.make_card(output.name, record, plan, _card_front(config))
        (partial / "README.md").write_text(card, encoding="utf-8")
        at = time.perf_counter()
    seconds |= {"finish": time.perf_counter() - at, "total": time.perf_counter() - started}
    if config.sample is not None:
        _sample(screen, config.sample, tokenizer, {"base": folder, "grown": output})
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    screen.print(f"written to {output} ({times})\n\n{report.snippet(output)}", markup=False, soft_wrap=True)
    if config.json:
        _print_json({**description, **record, "output": str(output), "seconds": seconds})


def _check(
    config: UpscaleConfig, base: Checkpoint, seconds: dict[str, float], notes: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """Digests of the base, in one pass with the search for NaN and Inf."""
    at = time.perf_counter()
    with command.progress("check", base.nbytes) as advance:
        digests, nonfinite = check_tensors(base.tensors.values(), advance)
    seconds["check"] = time.perf_counter() - at
    if nonfinite:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(nonfinite.items())[:5])
        message = f"{base.folder}: NaN or Inf in {len(nonfinite)} tensors: {found}"
        if not config.allow_nonfinite:
            raise DataError(f"{message}: mend them, or add --allow-nonfinite")
        notes.print(f"warning: {message}", markup=False, soft_wrap=True)
    return digests, nonfinite


def _prove(
    config: UpscaleConfig, base: Checkpoint, grown: Checkpoint, plan: Plan, tokenizer: tokens.Tokenizer | None
) -> dict[str, Any]:
    # JAX starts here and not before: without a proof it is not needed.
    from tli_jax.checkpoint import proof

    count = proof.choose_tokens(base, plan)
    text = "the embedded text" if config.text is None else config.text
    if tokenizer is None:
        tokens_BT, text = tokens.random_windows(base.config, count, proof.WINDOW), "random ids"
    else:
        content = tokens.embedded_text() if config.text is None else tokens.read_text(Path(config.text))
        tokens_BT = tokens.windows(tokenizer.encode(content), base.config, count, proof.WINDOW)
    with command.progress("prove", proof.layers_to_run(plan), unit="layers") as advance:
        found = proof.prove(base, grown, plan, tokens_BT, text, lambda: advance(1))
    proof.check(plan, found)
    return found.to_json()


def _sample(screen: Any, prompt: str, tokenizer: tokens.Tokenizer | None, folders: dict[str, Path]) -> None:
    """A greedy continuation by each model."""
    import jax.numpy as jnp

    from tli_jax.checkpoint.hf import load_hf
    from tli_jax.models.generate import generate

    if tokenizer is None:
        raise DataError("a sample needs a tokenizer, the model has none")
    for name, folder in folders.items():
        config, params = load_hf(folder)
        bos = [] if config.bos_token_id is None else [config.bos_token_id]
        ids = np.asarray([bos + tokenizer.encode(prompt)])
        longer = generate(config, params, jnp.asarray(ids), min(64, config.max_position_embeddings - ids.shape[1]))
        text = tokenizer.decode(np.asarray(longer)[0, len(bos) :].tolist())
        screen.print(f"{name:>5}: {text!r}", markup=False, soft_wrap=True)


def _versions() -> dict[str, str]:
    names = ("tli_jax", "numpy", "jax", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _card_front(config: UpscaleConfig) -> list[str]:
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", config.model) and not Path(config.model).exists()
    return [f"base_model: {config.model}"] if is_hub_id else []


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
