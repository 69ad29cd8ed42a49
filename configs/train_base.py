"""Trains the base model of the package with the recipe in ``configs/base.yaml`` and writes a Hugging Face folder.

The text is the standard library of the running Python, so another Python version gives another model. The model card
records the version and the digest of the text.
"""

import argparse
import ast
import functools
import hashlib
import inspect
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tli_jax.data.embedded import library_files, topics
from tli_jax.hf.output import check_output
from tli_jax.hf.save import save_hf
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import ForwardOptions, Llama, Params, init_params
from tli_jax.models.loss import losses, token_losses

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def read_documents(files: list[Path]) -> list[str]:
    """Each source file as one document, and its docstrings as another one."""
    documents: list[str] = []
    for path in files:
        source = path.read_text(encoding="utf-8", errors="ignore")
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = "\n\n".join(inspect.cleandoc(doc) for node in nodes if (doc := ast.get_docstring(node)))
        documents += [text for text in (source, docstrings) if text]
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode every UTF-8 string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one stream of ids, each starting with BOS."""
    return np.concatenate([np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(documents)])


def make_optimizer(train: dict) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, AdamW for the rest. Stacked leaves need explicit dimension numbers."""
    decay = int(train["steps"] * train["decay_fraction"])

    def schedule(peak: float) -> optax.Schedule:
        parts = [
            optax.linear_schedule(0.0, peak, train["warmup_steps"]),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ]
        return optax.join_schedules(parts, [train["warmup_steps"], train["steps"] - decay])

    def dims(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_matrix_of_a_layer = path[0].key == "layers" and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1) if is_matrix_of_a_layer else None

    muon = optax.contrib.muon(
        schedule(train["learning_rate"]),
        adam_learning_rate=schedule(train["adam_learning_rate"]),
        adam_b2=0.95,
        weight_decay=0.01,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(dims, params),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def mean_loss(config: LlamaConfig, params: Params, stream: np.ndarray, length: int) -> float:
    """Nats per token over non-overlapping windows of the stream, each starting with BOS."""
    windows = stream[: len(stream) // (length - 1) * (length - 1)].reshape(-1, length - 1)
    windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=config.bos_token_id)
    return float(np.mean([losses(config, params, window[None]).mean() for window in windows[:200]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="number of steps (default: as in the recipe)")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    train = recipe["train"] | ({"steps": args.steps} if args.steps else {})
    config = LlamaConfig(**recipe["model"] | {"eos_token_ids": tuple(recipe["model"]["eos_token_ids"])})
    check_output(args.output, None, overwrite=True)  # before training for an hour

    documents, held_out_documents = map(read_documents, library_files())
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    tokenizer = train_tokenizer(documents, config.vocab_size)
    stream, held_out = encode(tokenizer, documents), encode(tokenizer, held_out_documents)
    domain = encode(tokenizer, topics())
    bytes_per_token = sum(len(d.encode()) for d in documents) / len(stream)
    print(f"{len(documents)} documents, {len(stream):,} tokens, {bytes_per_token:.2f} bytes per token", flush=True)

    params = init_params(config, jax.random.key(train["seed"]))
    params = jax.tree_util.tree_map_with_path(
        lambda p, x: x / (2 * config.num_hidden_layers) ** 0.5 if {"o_proj", "down_proj"} & {k.key for k in p} else x,
        params,
    )
    held_out_loss = functools.partial(mean_loss, config, length=train["long"])
    optimizer = make_optimizer(train)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, tokens: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        def loss_of(params: Params) -> jax.Array:
            return token_losses(
                Llama.from_params(config, params), tokens, chunk=2048, options=ForwardOptions(remat="full")
            )[0].mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(train["seed"])
    started = time.time()
    for number in range(1, train["steps"] + 1):
        length = train["long"] if number > train["steps"] * (1 - train["long_fraction"]) else train["short"]
        starts = rng.integers(0, len(stream) - length - 1, train["batch_tokens"] // length)
        tokens = np.stack([stream[s : s + length + 1] for s in starts])
        params, state, loss = step(params, state, jnp.asarray(tokens))
        if number % 25 == 0 or number == train["steps"]:
            seconds = time.time() - started
            rate = number * train["batch_tokens"] / seconds
            print(f"step {number}/{train['steps']} loss {loss:.3f} {rate:,.0f} tokens/s {seconds:,.0f} s", flush=True)
        if number % 500 == 0:
            print(f"held-out loss {held_out_loss(params, held_out):.4f}", flush=True)

    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    write(args.output, config, params, tokenizer)
    facts = {
        "python": platform.python_version(),
        "text_sha256": digest,
        "train_tokens": train["steps"] * train["batch_tokens"],
        "seconds": round(time.time() - started),
        "held_out_loss": round(held_out_loss(params, held_out), 4),
        "new_domain_loss": round(held_out_loss(params, domain), 4),
        "bytes_per_token": round(bytes_per_token, 3),
    }
    print(json.dumps(facts, indent=2))
    record = json.dumps(facts | {"recipe": recipe}, indent=2) + "\n"
    (args.output / "recipe.json").write_text(record, encoding="utf-8")
    (args.output / "README.md").write_text(model_card(config, facts), encoding="utf-8")


def model_card(config: LlamaConfig, facts: dict) -> str:
    """The model card: architecture, training text and losses."""
    return f"""---
license: apache-2.0
library_name: transformers
---
# The base model of tli_jax

A Llama with {config.num_hidden_layers} layers and {config.num_params:,} parameters in {config.dtype}, and a byte-level
BPE tokenizer with {config.vocab_size:,} tokens. The project trained it from scratch with `configs/base.yaml`:

    python configs/train_base.py --config configs/base.yaml --output base

- Text: the sources of the standard library of Python {facts["python"]}, and their docstrings as plain prose (sha256
  {facts["text_sha256"]}). One file in forty was held out.
- Excluded as a new domain for continued pretraining: the documentation topics (`pydoc_data.topics`).
- Training: {facts["train_tokens"]:,} tokens of {facts["bytes_per_token"]} bytes on average, {facts["seconds"]:,} s on
  a CPU.
- Held-out loss: {facts["held_out_loss"]} nats per token; {facts["new_domain_loss"]} on the new domain (at most 200
  windows of 512 tokens, each starting with BOS).

The model exists to be grown, proved and trained in seconds. It writes text that looks like Python and knows no facts.
"""


def write(folder: Path, config: LlamaConfig, params: Params, tokenizer: Tokenizer) -> None:
    save_hf(folder, config, params, overwrite=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS}
    files = {
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": special
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings},
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
