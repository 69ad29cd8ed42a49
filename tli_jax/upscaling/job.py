"""``python -m tli_jax.upscale``: grow a checkpoint, file to file, and prove what that did to the model."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.config import UpscaleConfig
from tli_jax.cli.console import warn
from tli_jax.cli.progress import progress
from tli_jax.data.documents import read_plain
from tli_jax.data.embedded import embedded_text
from tli_jax.errors import DataError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, sidecar, tokens
from tli_jax.hf.card import grown_card
from tli_jax.hf.checkpoint import Checkpoint, check_unchanged, open_checkpoint
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.grown_config import grow_config, grown_config
from tli_jax.hf.headers import INDEX, SINGLE
from tli_jax.hf.output import check_output, staged
from tli_jax.hf.stream import Piece, check_tensors, grown_pieces, parse_size, split_shards, write_safetensors
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.hf.training_record import read_trainings
from tli_jax.models.config import LlamaConfig
from tli_jax.models.shapes import check_shape
from tli_jax.upscaling.options import make_plan, needs_importance

PROGRAM = "python -m tli_jax.upscale"


@dataclasses.dataclass(frozen=True)
class Job:
    """A growth that has been thought through: everything that can be refused before a byte is written has been.

    Attributes:
        facts: what initialisers that work on the host found, once tensors are made.
    """

    config: UpscaleConfig
    base: Checkpoint
    tokenizer: Tokenizer | None
    plan: Plan
    shards: dict[str, list[Piece]]
    description: dict[str, Any]
    facts: dict[str, Any]


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
    tokenizer, warnings = open_tokenizer(folder, base.config)
    if config.plan_only and tokenizer is None:
        # Of a hub id only headers and configuration have been fetched: that says nothing of a tokenizer.
        warnings = []
    for warning in (*base.warnings, *warnings, *([] if config.plan_only else sidecar.left_behind(folder))):
        warn(warning)
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
    return Job(config, base, tokenizer, plan, shards, describe(base, plan, pieces, files), facts)


def grow(job: Job, seconds: dict[str, float]) -> dict[str, Any]:
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
        with progress("write", job.description["after"]["bytes"]) as advance:
            grown_digests, hashing = write_safetensors(partial, job.shards, digests, advance)
        seconds |= {"write": time.perf_counter() - at - hashing, "hash": hashing}
        for what in job.facts.get("transport", {}).get("not_converged", []):
            warn(f"{what}: transport did not converge")
        sidecar.write_json(partial / "config.json", grow_config(base.raw, base.config, plan))
        sidecar.copy_allowed(base.folder, partial)
        proof = None
        if config.proof:
            proof = _prove(job, open_checkpoint(partial), ids)
            seconds["proof"] = proof["seconds"]
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
    with progress("check", base.nbytes) as advance:
        digests, nonfinite = check_tensors(base.tensors.values(), advance)
    seconds["check"] = time.perf_counter() - at
    if nonfinite:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(nonfinite.items())[:5])
        message = f"{base.folder}: NaN or Inf in {len(nonfinite)} tensors: {found}"
        if not job.config.allow_nonfinite:
            raise DataError(f"{message}: mend them, or add --allow-nonfinite")
        warn(message)
    return digests, nonfinite


def _read_ids(config: UpscaleConfig, base: Checkpoint, tokenizer: Tokenizer | None) -> list[int] | None:
    """Token ids of the text for the proof; None where there is no tokenizer."""
    if tokenizer is None:
        if config.text is not None or config.sample is not None or needs_importance(config):
            raise DataError(
                f"{base.folder}: no tokenizer, which --text, --sample and --method adept need: leave them out"
            )
        return None
    text = embedded_text() if config.text is None else read_plain(Path(config.text))
    ids = tokenizer.encode(text)
    tokens.windows(ids, base.config, tokens.MIN_TOKENS, tokens.MIN_TOKENS)  # refuses what is too short
    return ids


def _measure_importance(config: UpscaleConfig, base: Checkpoint, tokenizer: Tokenizer | None) -> list[float]:
    from tli_jax.verify.importance import TOKENS, measure_importance

    ids = _read_ids(config, base, tokenizer)
    assert ids is not None, "refused"
    bos = base.config.bos_token_id is not None
    tokens_BT = tokens.windows(ids, base.config, min(TOKENS, len(ids) + bos), 512)
    with progress("importance", 2 * base.config.num_hidden_layers, unit="layers") as advance:
        return measure_importance(base, tokens_BT, lambda: advance(1))


def _prove(job: Job, grown: Checkpoint, ids: list[int] | None) -> dict[str, Any]:
    # JAX starts here and not before: without a proof it is not needed.
    from tli_jax.verify import proof

    base, plan = job.base, job.plan
    count = proof.choose_tokens(base, plan)
    if ids is None:
        tokens_BT, text = tokens.random_windows(base.config, count, proof.WINDOW), "random ids"
    else:
        tokens_BT = tokens.windows(ids, base.config, count, proof.WINDOW)
        text = job.config.text or "the embedded text"
    with progress("prove", proof.layers_to_run(plan), unit="layers") as advance:
        found = proof.prove(base, grown, plan, tokens_BT, text, lambda: advance(1))
    proof.check(plan, found)
    return found.to_json()


def describe(base: Checkpoint, plan: Plan, pieces: Sequence[Piece], files: Mapping[str, int]) -> dict[str, Any]:
    """The plan and its cost as plain data. Bytes are of tensors; FLOPs are of the forward pass, see ``LlamaConfig``."""
    grown = grown_config(base.config, plan)
    context = min(base.config.max_position_embeddings, 8192)

    def costs(config: LlamaConfig, nbytes: int) -> dict[str, Any]:
        return {
            "layers": config.num_hidden_layers,
            "parameters": config.num_params,
            "active_parameters": config.num_active_params,
            "bytes": nbytes,
            "kv_cache_bytes_per_token": config.kv_cache_bytes_per_token,
            "flops_per_token": config.flops_per_token(context),
        }

    return {
        "plan": plan.to_json(),
        "before": costs(base.config, base.nbytes),
        "after": costs(grown, sum(piece.nbytes for piece in pieces)),
        "context": context,
        "guarantee": plan.guarantee,
        "is_exact": plan.is_exact,
        "writes": dict(files),
    }
