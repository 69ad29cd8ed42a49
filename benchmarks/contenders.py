"""The contenders of ``train.py``: a shape, what trains, and a library. Each runs in a process of its own."""

import argparse
import io
import json
import os
import resource
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# jax and torch are imported by the process that uses them.
from tli_jax.growth.methods import tli
from tli_jax.models.config import LlamaConfig

SHAPES = {  # V, D, F, layers, query heads, key/value heads, head size
    "tiny": LlamaConfig(512, 64, 192, 8, 4, 2, 16),
    "small": LlamaConfig(8192, 512, 1536, 16, 8, 4, 64),
    "1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, max_position_embeddings=8192, tie_word_embeddings=True),
    "8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=8192),
}
INIT, LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 0.02, 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


class Contender(NamedTuple):
    name: str
    shape: str
    trains: str
    library: str
    batch: int
    T: int
    options: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> "Contender":
        try:
            shape, trains, library, size, *pairs = name.split()
            batch, T = map(int, size.split("x"))
            options = {"remat": "none"} | dict(pair.split("=") for pair in pairs)
            assert shape in SHAPES and trains in ("all", "injected", "naive") and library in PROGRAMS
        except (ValueError, AssertionError):
            raise argparse.ArgumentTypeError(
                f"{name!r} is not SHAPE TRAINS LIBRARY BATCHxTOKENS [OPTION=VALUE …]"
            ) from None
        return cls(name, shape, trains, library, batch, T, {k: _value(v) for k, v in options.items()})

    def tokens(self, text: str, number: int) -> np.ndarray:
        """Batch ``[B, T+1]`` of a number. Ids are Zipf-distributed or uniform, or the bytes of a file."""
        rng, V, shape = np.random.default_rng(number), SHAPES[self.shape].vocab_size, (self.batch, self.T + 1)
        if text == "uniform":
            return rng.integers(0, V, shape, np.int32)
        if text == "zipf":
            sums = np.cumsum(1 / np.arange(1, V + 1))
            return np.searchsorted(sums[:-1], sums[-1] * rng.random(shape)).astype(np.int32)
        data = np.fromfile(text, np.uint8)
        starts = rng.integers(0, len(data) - self.T, (self.batch, 1))
        return data[starts + np.arange(self.T + 1)].astype(np.int32)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Program(NamedTuple):
    """``step`` trains on a batch to the end and returns the loss; ``peak`` returns the largest use of memory in bytes;
    ``profile`` traces a step for each batch, and returns a table."""

    step: Callable[[np.ndarray], float]
    peak: Callable[[], int]
    profile: Callable[[list[np.ndarray]], str]
    facts: dict[str, Any]


def jax_program(contender: Contender, dtype: str | None) -> Program:
    import jax
    import jax.numpy as jnp
    import optax

    from tli_jax.cli.console import Console
    from tli_jax.training.freezing import ParamSpec
    from tli_jax.training.loop import peak_flops
    from tli_jax.training.profile import summarise, tables, trace
    from tli_jax.training.trainer import Trainer, TrainerState

    device = jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    base = SHAPES[contender.shape]
    plan = tli(base.num_hidden_layers, every=4)
    options = {"dtypes": {"compute": dtype}, "isolate": False, "schedule": "constant", "clip_norm": CLIP}
    options |= {"adam": {"b1": BETAS[0], "b2": BETAS[1], "eps": EPS}, "weight_decay": WEIGHT_DECAY}
    options |= {"learning_rate": LEARNING_RATE, "only": "injected" if contender.trains == "injected" else "all"}
    options |= {"batch_size": contender.batch, "sequence_length": contender.T} | contender.options
    trainer = Trainer.create(base, plan=plan, devices=[device], **options)

    if contender.trains == "naive":
        trains = {s.name: np.array([plan.injected[i] for i in s.layers] or [False]) for s in trainer.param_specs}

        def drop(updates: Any, _: Any) -> Any:
            return {k: jnp.where(trains[k].reshape(-1, *[1] * (x.ndim - 1)), x, 0) for k, x in updates.items()}

        mask = optax.stateless(drop)
        vars(trainer)["optimizer"] = optax.chain(mask, trainer.optimizer, mask)

    def sample(spec: ParamSpec, key: jax.Array) -> jax.Array:
        """Layer by layer, so that each layer has the same weights in every stack."""
        shape, to = spec.shape(trainer.model), trainer.config.param_dtype if spec.trains else dtype
        if "norm" in spec.tensor:
            return jnp.ones(shape, to)
        key = jax.random.fold_in(key, zlib.crc32(spec.tensor.encode()))

        def one(layer: Any) -> jax.Array:
            x = jax.random.normal(jax.random.fold_in(key, layer), shape[-2:])
            return (INIT * x).astype(dtype).astype(to)

        return jax.lax.map(one, jnp.array(spec.layers)) if spec.layers else one(0)

    shardings = {name: x.sharding for name, x in trainer.abstract_params(lambda spec: dtype).items()}
    make = jax.jit(lambda key: {s.name: sample(s, key) for s in trainer.param_specs}, out_shardings=shardings)
    params = make(jax.random.key(0))
    trained = {spec.name: params.pop(spec.name) for spec in trainer.param_specs if spec.trains}
    state = TrainerState(trainer.init(trained), params)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = trainer.train_step(state, tokens)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def profile(batches: list[np.ndarray]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            with trace(Path(folder)):
                for batch in batches:
                    step(batch)
            text = io.StringIO()
            for table in tables(summarise(Path(folder)), len(batches)):
                table.render(Console(file=text, width=120))
        return text.getvalue()

    def peak() -> int:
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0) or _peak_rss()

    facts = {"flops_per_token": trainer.flops_per_token(contender.T), "peak_flops": peak_flops(device)}
    return Program(step, peak, profile, facts | {"device": device.device_kind, "dtype": dtype})


def torch_program(contender: Contender, dtype: str | None) -> Program:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as Config

    is_gpu = torch.cuda.is_available()
    device = "cuda" if is_gpu else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = dtype or ("bfloat16" if is_gpu else "float32")
    base = SHAPES[contender.shape]
    plan = tli(base.num_hidden_layers, every=4)
    names = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"
    sizes = {name: getattr(base, name) for name in (*names.split(), "max_position_embeddings", "tie_word_embeddings")}
    config = Config(**sizes, num_hidden_layers=len(plan), initializer_range=INIT, use_cache=False)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).train()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        is_trained = contender.trains == "all" or ("layers" in parts and plan.injected[int(parts[2])])
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data = parameter.data.float()
            (others if "norm" in name or "embed_tokens" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], LEARNING_RATE, BETAS, EPS, fused=True)
    if contender.options["remat"] != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss_of(logits: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if (compiles := contender.options.get("compile", "blocks")) == "model":
        model.compile()
    elif compiles == "blocks":  # as torchtitan does: all blocks share their code, so compiling takes seconds
        for block in model.model.layers:
            block.compile()
    loss_fn = loss_of if compiles == "no" else torch.compile(loss_of)

    def step(batch: np.ndarray) -> float:
        tokens = torch.from_numpy(batch).long().to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = loss_fn(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed + others, CLIP)
        optimizer.step()
        if is_gpu:
            torch.cuda.synchronize()
        return loss.item()

    def profile(batches: list[np.ndarray]) -> str:
        with torch.profiler.profile() as found:
            for batch in batches:
                step(batch)
        order = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
        return found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)

    facts = {"device": torch.cuda.get_device_name() if is_gpu else device, "dtype": dtype}
    return Program(step, torch.cuda.max_memory_allocated if is_gpu else _peak_rss, profile, facts)


PROGRAMS = {"jax": jax_program, "torch": torch_program}


def _peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
