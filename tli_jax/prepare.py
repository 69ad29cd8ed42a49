"""``tli-jax prepare``: tokenize text once, for runs that then open it in a second."""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tli_jax.cli.config import PrepareConfig
from tli_jax.cli.console import say, warn
from tli_jax.cli.frame import run_command
from tli_jax.cli.parse import parse
from tli_jax.data.embedded import topics
from tli_jax.errors import UsageError
from tli_jax.hf import hub, sidecar
from tli_jax.hf.inputs import read_json
from tli_jax.hf.output import check_output
from tli_jax.hf.shards import parse_size
from tli_jax.hf.tokenizer import open_tokenizer, tokenizer_digest
from tli_jax.models.config import LlamaConfig
from tli_jax.training.text import replace_embedded

PROGRAM = "tli-jax prepare"
DESCRIPTION = "Tokenize text once, in several processes, into shards that train, evaluate and compare open in a second."
EXAMPLES = (
    "--model embedded --text embedded --output prepared/topics",
    "--model meta-llama/Llama-3.2-1B --text corpus/ --field content --output prepared/corpus --workers 8",
)


def main(arguments: Sequence[str]) -> None:
    config = parse(PrepareConfig, PROGRAM, DESCRIPTION, arguments, EXAMPLES)
    for key in ("model", "text", "output"):
        if not getattr(config, key):
            raise UsageError(f"{key} is not set, see --help")
    with tempfile.TemporaryDirectory() as folder:
        _prepare(config, Path(folder))


def _prepare(config: PrepareConfig, temporary: Path) -> None:
    from tli_jax.data.prepare import prepare
    from tli_jax.data.shards import FIRST_SHARD, is_prepared
    from tli_jax.data.tokenization import Rules

    started, output = time.perf_counter(), Path(config.output)
    sources = replace_embedded(config.text, config.field, temporary / "topics.jsonl", topics)
    named = [(given.path, Path(source.path)) for given, source in zip(config.text, sources, strict=True)]
    for (_, path), source in zip(named, sources, strict=True):
        check_output(output, path, config.overwrite, FIRST_SHARD)
        if source.weight != 1:
            raise UsageError(f"text {path}: has a weight: prepare it on its own, and give train the weight")
        if path.suffix == ".npy" or is_prepared(path):
            raise UsageError(f"text {path}: contains token ids already: give it to train")
    model = hub.resolve(config.model, config.revision, weights=False)
    shape = LlamaConfig.from_hf(read_json(model / "config.json"), str(model / "config.json"))
    tokenizer, warnings = open_tokenizer(model, shape, config.special_tokens == "parse")
    if tokenizer is None:
        raise UsageError(warnings[0])
    for warning in warnings:
        warn(warning)
    prepared, notes = prepare(
        named,
        Rules.of_model(config, shape, tokenizer, tokenizer_digest(model)),
        shape,
        output,
        workers=config.workers or _cores(),
        shard_bytes=parse_size(config.max_shard_size),
        overwrite=config.overwrite,
        facts={"model": config.model, "versions": sidecar.versions("tli_jax", "tokenizers", "transformers")},
    )
    for note in notes:
        say(note)
    tokens, documents, shards = (prepared.manifest[key] for key in ("tokens", "documents", "shards"))
    seconds = time.perf_counter() - started
    say(
        f"written to {output}: {tokens:,} tokens of {documents:,} documents in {len(shards):,} shard"
        f"{'s' * (len(shards) != 1)}, {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    )


def _cores() -> int:
    """The cores that this process may use; all of the machine where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
