"""Grow a checkpoint from folder to folder, and prove what that did to the model."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.console import warn
from tli_jax.cli.growth_config import UpscaleConfig
from tli_jax.cli.progress import progress
from tli_jax.data.documents import read_plain
from tli_jax.data.embedded import embedded_text
from tli_jax.errors import DataError, UsageError
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, sidecar, tokens
from tli_jax.hf.card import grown_card, read_base_card
from tli_jax.hf.checkpoint import Checkpoint, check_unchanged, open_checkpoint
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.grown_config import grow_config, grown_config
from tli_jax.hf.grown_tensors import grown_tensors
from tli_jax.hf.headers import INDEX, SINGLE
from tli_jax.hf.output import check_output
from tli_jax.hf.shards import OutputTensor, parse_size, split_shards
from tli_jax.hf.tensors import check_tensors
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.hf.write import write_model
from tli_jax.models.config import LlamaConfig
from tli_jax.models.shapes import check_shape
from tli_jax.upscaling.options import make_plan, needs_importance
from tli_jax.upscaling.positions import find_harm
from tli_jax.upscaling.record import describe_growth, unconverged


@dataclasses.dataclass(frozen=True)
class Job:
    """A growth that is ready to run: everything that can be checked before a byte is written has been checked.

    Attributes:
        description: the plan and its cost, see ``describe``.
        facts: what initialisers that run on the host found; empty until tensors are made.
    """

    config: UpscaleConfig
    base: Checkpoint
    tokenizer: Tokenizer | None
    plan: Plan
    shards: dict[str, list[OutputTensor]]
    description: dict[str, Any]
    facts: dict[str, Any]


def prepare(config: UpscaleConfig) -> Job:
    """Find and check the base, and make the plan. Weights are read only if ``needs_importance``.

    Raises:
        TliError: any fault that can be found before weights are read.
    """
    if not config.model:
        raise UsageError("--model is needed: a folder, a GGUF file, a hub id, or 'embedded'")
    if not config.output and not config.plan_only:
        raise UsageError("--output is needed: the folder to write (or --plan-only)")
    max_shard_bytes = parse_size(config.max_shard_size)
    folder = hub.resolve(config.model, config.revision, config.plan_only and not needs_importance(config))
    if config.output is not None and not config.plan_only:
        given = Path(config.model).expanduser()  # of a GGUF file, the folder is a copy in the cache
        check_output(Path(config.output), given if given.is_file() else folder, config.overwrite)
    base = open_checkpoint(folder)
    check_shape(base.config, config.shape, str(folder))
    is_run = config.proof or config.sample is not None or needs_importance(config) or config.train is not None
    if is_run and not config.plan_only:
        base.config.check_runnable(str(folder))
    tokenizer, warnings = open_tokenizer(folder, base.config)
    if config.plan_only and tokenizer is None:
        warnings = []  # the tokenizer of a hub model has not been downloaded
    for warning in (*base.warnings, *warnings, *([] if config.plan_only else sidecar.left_behind(folder))):
        warn(warning)
    importance = None
    if needs_importance(config):
        make_plan(config, base, [0.0] * base.config.num_hidden_layers)  # finds wrong options before the long part
        importance = _measure_importance(config, base, tokenizer)
    plan = make_plan(config, base, importance)
    if (harm := find_harm(config, plan)) is not None:
        warn(harm)
    facts: dict[str, Any] = {}
    shards = split_shards(grown_tensors(base, plan, facts), max_shard_bytes)
    return Job(config, base, tokenizer, plan, shards, describe(base, plan, shards), facts)


def grow(job: Job, seconds: dict[str, float]) -> dict[str, Any]:
    """Check the base, write the grown folder and prove it. ``seconds`` is filled with the time that each part takes.

    Returns:
        The content of ``growth.json``.

    Raises:
        DataError: the base contains NaN or Inf or changes meanwhile, or the text cannot be read.
        ProofError: the grown model does not meet the guarantee of its plan.
        OutputError, StorageError: the output cannot be written.
    """
    config, base, plan = job.config, job.base, job.plan
    ids = _read_ids(config, base, job.tokenizer)
    raw = grow_config(base.raw, base.config, plan)
    base_digests: dict[str, str] = {}
    nonfinite: dict[str, int] = {}

    def check_base() -> dict[str, str]:
        nonlocal base_digests, nonfinite
        base_digests, nonfinite = _check_base(job, seconds)
        return base_digests

    with write_model(
        Path(str(config.output)),
        job.shards,
        raw,
        source=base.folder,
        overwrite=config.overwrite,
        copied_digests=check_base,
        title="write",
    ) as model:
        seconds |= model.seconds
        for warning in unconverged(job.facts):
            warn(warning)
        proof = None
        if config.proof:
            proof = _prove(job, open_checkpoint(model.folder), ids)
            seconds["proof"] = proof["seconds"]
        record = _record(job, base_digests, model.digests, nonfinite, proof)
        model.write_record("growth.json", record)
        name = Path(os.path.abspath(str(config.output))).name  # noqa: PTH100  # Path.absolute keeps ".."
        model.write_card(grown_card(name, record, plan, read_base_card(base.folder), raw.get("model_type", "llama")))
        check_unchanged(base)
    return record


def _check_base(job: Job, seconds: dict[str, float]) -> tuple[dict[str, str], dict[str, int]]:
    """Digests of the base, and the number of NaN and Inf values in each tensor that has some."""
    base, started = job.base, time.perf_counter()
    with progress("check", base.nbytes) as advance:
        digests, nonfinite = check_tensors(base.tensors.values(), advance)
    seconds["check"] = time.perf_counter() - started
    if nonfinite:
        counts = ", ".join(f"{name} ({count})" for name, count in sorted(nonfinite.items())[:5])
        message = f"{base.folder}: NaN or Inf in {len(nonfinite)} tensors: {counts}"
        if not job.config.allow_nonfinite:
            raise DataError(f"{message}: fix them, or add --allow-nonfinite")
        warn(message)
    return digests, nonfinite


def _record(
    job: Job,
    base_digests: Mapping[str, str],
    grown_digests: Mapping[str, str],
    nonfinite: Mapping[str, int],
    proof: dict[str, Any] | None,
) -> dict[str, Any]:
    reason = None if job.base.config.is_runnable else f"RoPE type {job.base.config.rope_type!r} is not supported"
    return {
        **describe_growth(job.base, job.plan, job.config.model),
        "digests": {"algorithm": "sha256", "base": base_digests, "grown": grown_digests},
        "nonfinite": nonfinite,
        "computed": job.facts,
        "proof": proof,
        "not_proved": None if proof else " because ".join(filter(None, ("--no-proof", reason))),
    }


def _read_ids(config: UpscaleConfig, base: Checkpoint, tokenizer: Tokenizer | None) -> list[int] | None:
    """Token ids of the text for the proof; None without a tokenizer."""
    if tokenizer is None:
        if config.text is not None or config.sample is not None or needs_importance(config):
            raise DataError(
                f"{base.folder}: no tokenizer, which --text, --sample and --method adept need: add one, or leave them"
                " out"
            )
        return None
    text = embedded_text() if config.text is None else read_plain(Path(config.text))
    ids = tokenizer.encode(text)
    tokens.windows(ids, base.config, tokens.MIN_TOKENS, tokens.MIN_TOKENS)  # raises if the text is too short
    return ids


def _measure_importance(config: UpscaleConfig, base: Checkpoint, tokenizer: Tokenizer | None) -> list[float]:
    from tli_jax.verify.importance import TOKENS, measure_importance

    ids = _read_ids(config, base, tokenizer)
    assert ids is not None
    bos = base.config.bos_token_id is not None
    tokens_BT = tokens.windows(ids, base.config, min(TOKENS, len(ids) + bos), 512)
    with progress("importance", 2 * base.config.num_hidden_layers, unit="layers") as advance:
        return measure_importance(base, tokens_BT, lambda: advance(1))


def _prove(job: Job, grown: Checkpoint, ids: list[int] | None) -> dict[str, Any]:
    # Imported here because it imports JAX, which growth without a proof does not need.
    from tli_jax.verify import proof

    base, plan = job.base, job.plan
    tokens_BT, text = proof.choose_windows(base, plan, ids), job.config.text or "the embedded text"
    with progress("prove", proof.layers_to_run(plan), unit="layers") as advance:
        result = proof.compare_models(
            base, grown, plan, tokens_BT, "random ids" if ids is None else text, lambda: advance(1)
        )
    proof.check(plan, result)
    return result.to_json()


def describe(base: Checkpoint, plan: Plan, shards: Mapping[str, Sequence[OutputTensor]]) -> dict[str, Any]:
    """The plan and its cost as plain data: bytes of tensors, FLOPs of the forward pass (see ``LlamaConfig``), and the
    bytes of each file to write (0 for small ones)."""
    grown = grown_config(base.config, plan)
    context = min(base.config.max_position_embeddings, 8192)
    files = {name: sum(tensor.nbytes for tensor in shard) for name, shard in shards.items()}

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
        "after": costs(grown, sum(files.values())),
        "context": context,
        "guarantee": plan.guarantee,
        "is_exact": plan.is_exact,
        "writes": {
            **files,
            **({INDEX: 0} if list(shards) != [SINGLE] else {}),
            **dict.fromkeys(("config.json", "growth.json", "README.md"), 0),
            **{name: file.stat().st_size for name, file in sidecar.allowed_files(base.folder).items()},
        },
    }
