"""Measures what training only the injected layers saves, against full training, a naive mask, and torch.

    python benchmarks/train.py [--shape small] [--rounds 12] [--batch-size 4] [--sequence-length 256] [--every 4]
    python benchmarks/train.py --shape 1b --batch-size 8 --sequence-length 8192 --alone --peak-tflops 989   # on a GPU

A randomly initialised Llama is grown by ``tli`` with plain copies. Every contender trains it on the same batches:

- ``full``: all parameters, with ``tli_jax.training.trainer.Trainer``.
- ``injected``: the same with ``only=injected``, which uses grouped stacks.
- ``naive mask``: the same loss over one flat stack, with gradients of all parameters; a mask sets the gradients and
  updates of frozen layers to 0.
- ``torch full``: LlamaForCausalLM of transformers with SDPA, AdamW (fused) and ``torch.compile``.
- ``torch injected``: the same with ``requires_grad = False`` on frozen parameters.
- ``full, remat`` and ``injected, remat``: the first two with ``remat: full``, for information.

All contenders use the same AdamW, clipping and weight decay. In bf16 (the default except on CPUs), trainable
parameters are fp32, and torch runs under autocast. Each contender is a process of its own. The contenders of a group
take turns step by step, so that other load on the machine slows all of them equally; ``--alone`` runs them one after
the other, for accelerators that cannot hold them all at once. The first steps are not timed but checked: contenders
that train the same layers must have the same losses.

FLOPs per token come from ``Trainer.flops_per_token``: 2 per weight in the forward pass, 2 for activation gradients
from the lowest trainable layer up, 2 for the gradients of trainable weights. Causal attention counts half, its
backward pass double. The head counts; embedding look-ups and rematerialization do not. The naive mask counts
everything, because it computes everything. On a shared machine, CPU seconds of all threads are more stable than wall
time; on an accelerator they mean nothing. Predicted bytes are parameters, gradients and moments; the compiler's bytes
include activations. Prints Markdown and writes ``benchmarks/results/train.json``.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import machine, run_in_process, versions, write_result

# This process must import neither jax nor torch: each contender's process imports one of them.
from tli_jax.models.config import LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
# Steps before timing starts. Their losses are compared.
WARM_UP = 3
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


class Contender(NamedTuple):
    name: str
    kind: str  # full, injected or naive
    library: str  # jax or torch
    remat: str = "none"

    @property
    def baseline(self) -> str:
        """The contender that trains everything with the same library and rematerialization."""
        return {"jax": "full", "torch": "torch full"}[self.library] + (", remat" if self.remat == "full" else "")


CONTENDERS = [
    Contender("full", "full", "jax"),
    Contender("injected", "injected", "jax"),
    Contender("naive mask", "naive", "jax"),
    Contender("torch full", "full", "torch"),
    Contender("torch injected", "injected", "torch"),
    Contender("full, remat", "full", "jax", "full"),
    Contender("injected, remat", "injected", "jax", "full"),
]


class Job(NamedTuple):
    """Settings shared by all contenders."""

    model: LlamaConfig  # of the grown model
    injected: tuple[bool, ...]
    folder: Path
    dtype: str
    batch_size: int
    T: int
    is_compiled: bool

    def batch(self, number: int) -> np.ndarray:
        """Random tokens ``[B, T+1]``."""
        rng = np.random.default_rng(number)
        return rng.integers(0, self.model.vocab_size, (self.batch_size, self.T + 1), np.int32)


class Program(NamedTuple):
    """``step`` runs the step of a number to its end and returns the loss; ``peak`` returns the peak memory in bytes."""

    step: Callable[[int], float]
    facts: dict[str, Any]
    peak: Callable[[], int]


def make_model(shape: dict[str, Any], every: int, dtype: str | None, folder: Path) -> tuple[LlamaConfig, Any, str, str]:
    """Write the grown model; return its configuration, the mask of injected layers, the dtype and the device."""
    import jax

    from tli_jax.growth.inject import inject
    from tli_jax.growth.methods import tli
    from tli_jax.hf.save import save_hf
    from tli_jax.models.llama import init_params

    # On the CPU, because an accelerator may not have enough memory for base and grown model.
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = LlamaConfig(dtype=dtype, **shape)  # type: ignore[arg-type]
    plan = tli(config.num_hidden_layers, every, "copy")
    with jax.default_device(jax.devices("cpu")[0]):
        base = jax.jit(init_params, static_argnums=(0, 2))(config, jax.random.key(0), dtype)
        save_hf(folder, config, inject(base, plan))
    return config.with_layers(len(plan)), plan.injected, dtype, jax.devices()[0].device_kind


def jax_program(job: Job, contender: Contender) -> Program:
    import jax
    import optax

    from tli_jax.cli.train_config import TrainConfig
    from tli_jax.distributed.kernels import choose_attention
    from tli_jax.distributed.mesh import make_mesh, param_sharding
    from tli_jax.hf.checkpoint import hf_name, open_checkpoint
    from tli_jax.hf.load import load_array
    from tli_jax.training.freezing import make_layout
    from tli_jax.training.trainer import Trainer

    class NaiveTrainer(Trainer):
        """All parameters have gradients and moments; a mask over the layers of each stack freezes some layers."""

        @property
        def optimizer(self) -> optax.GradientTransformation:  # type: ignore[override]
            trains = {
                leaf.name: np.asarray([job.injected[i] for i in leaf.layers] or [False], np.float32)
                for leaf in self.param_specs
            }

            def mask(updates: Any, _: Any) -> Any:
                return {
                    name: update * trains[name].reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
                    for name, update in updates.items()
                }

            return optax.chain(optax.stateless(mask), super().optimizer, optax.stateless(mask))

    config = TrainConfig(
        only="injected" if contender.kind == "injected" else "all",
        batch_size=job.batch_size,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        adam={"b1": BETAS[0], "b2": BETAS[1], "eps": EPS},
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP,
        dtypes={"compute": job.dtype},  # type: ignore[dict-item]
        remat=contender.remat,  # type: ignore[arg-type]
    )
    mesh = make_mesh({}, jax.devices()[:1])
    kernel, attention = choose_attention("auto", mesh, job.T, job.model.head_dim, job.dtype)
    layout = make_layout(job.model, job.injected, config.only, config.outer)
    kind = NaiveTrainer if contender.kind == "naive" else Trainer
    trainer = kind(job.model, config, layout, mesh, kernel)

    weights = open_checkpoint(job.folder)
    trained, frozen = {}, {}
    for leaf in trainer.param_specs:
        tensors = [
            weights.tensors[name]
            for name in [hf_name(leaf.tensor, layer) for layer in leaf.layers] or [hf_name(leaf.tensor)]
        ]
        dtype = config.param_dtype if leaf.trains else None
        parts = trained if leaf.trains else frozen
        parts[leaf.name] = load_array(tensors, leaf.name, param_sharding(mesh, leaf.dims), dtype)
    # Counted before the state takes over the parameters.
    sizes = {"parameters": _nbytes(trained), "gradients": _nbytes(trained), "frozen": _nbytes(frozen)}
    state = trainer.init(trained)
    sizes["moments"] = _nbytes(state.optimizer_state)

    def feed(number: int) -> Any:
        tokens = jax.device_put(job.batch(number)[None], trainer.batch_sharding)
        return tokens, np.zeros(tokens.shape, np.int32), np.zeros(mesh.size, np.int32)

    started = time.perf_counter()
    program = trainer.step.lower(state, frozen, *feed(0)).compile()
    compiling = time.perf_counter() - started
    found = program.memory_analysis()
    compiler = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    compiler["total"] = compiler["argument"] + compiler["output"] - compiler["alias"] + compiler["temp"]

    def step(number: int) -> float:
        nonlocal state
        state, metrics = program(state, frozen, *feed(number))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def peak() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) or _peak_rss()

    facts = {"flops_per_token": trainer.flops_per_token(job.T), "predicted_bytes": sizes, "compiler_bytes": compiler}
    facts |= {"compile_seconds": compiling, "runs_as": f"attention {attention}"}
    return Program(step, facts, peak)


def torch_program(job: Job, contender: Contender) -> Program:
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, job.dtype)
    model: Any = LlamaForCausalLM.from_pretrained(job.folder, dtype=dtype, attn_implementation="sdpa")
    model.to(device).train()
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": WEIGHT_DECAY},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        trains = contender.kind == "full" or ("layers" in parts and job.injected[int(parts[2])])
        parameter.requires_grad_(trains)
        if trains:
            parameter.data = parameter.data.float()
            groups["norm" in name or "embed_tokens" in name]["params"].append(parameter)
    sizes = {
        "parameters": sum(p.numel() * 4 for p in model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
    }
    sizes |= {"gradients": sizes["parameters"], "moments": 2 * sizes["parameters"]}
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    autocast = torch.autocast(device.type, dtype) if job.dtype != "float32" else contextlib.nullcontext()
    trained = [parameter for part in groups for parameter in part["params"]]

    def loss_of(tokens: Any) -> Any:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    loss_fn = torch.compile(loss_of) if job.is_compiled else loss_of

    def step(number: int) -> float:
        tokens = torch.from_numpy(job.batch(number)).long().to(device)
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = loss_fn(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()

    def timed(number: int) -> float:
        loss = step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_rss()

    runs_as = f"torch.compile {job.is_compiled}, {torch.get_num_threads()} threads"
    return Program(timed, {"predicted_bytes": sizes, "runs_as": runs_as}, peak)


def serve(job: Job, contender: Contender, pipe: Any) -> None:
    """Process of a contender: run the step of each number received and reply with seconds, CPU seconds and loss."""
    program = {"jax": jax_program, "torch": torch_program}[contender.library](job, contender)
    for number in range(WARM_UP):
        pipe.send(program.step(number))
    pipe.send(program.facts)
    while (number := pipe.recv()) is not None:
        started, used = time.perf_counter(), time.process_time()
        loss = program.step(number)
        pipe.send((time.perf_counter() - started, time.process_time() - used, loss))
    pipe.send(program.peak())


def compete(job: Job, contenders: list[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Run the contenders in turns, one step each."""
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    pipes: dict[str, Any] = {}
    processes = []
    for contender in contenders:
        # Start one after the other: compilation uses all cores.
        _log(f"{contender.name}: start")
        pipes[contender.name], theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(job, contender, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipe = pipes[contender.name]
        losses = [pipe.recv() for _ in range(WARM_UP)]
        results[contender.name] = (
            contender._asdict() | {"losses": losses, "seconds": [], "cpu_seconds": []} | pipe.recv()
        )
        _log(f"{contender.name}: losses {losses}")
    for number in range(rounds):
        # Vary the order, so that no contender always follows the same one.
        for name in np.roll(list(pipes), -number).tolist()[:: (-1) ** number]:
            pipes[name].send(WARM_UP + number)
            for key, value in zip(("seconds", "cpu_seconds", "losses"), pipes[name].recv(), strict=True):
                results[name][key].append(value)
        _log(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {results[n]['seconds'][-1]:.3f}" for n in pipes))
    for name, pipe in pipes.items():
        pipe.send(None)
        results[name]["peak_bytes"] = pipe.recv()
    for process in processes:
        process.join()
    return results


def check_losses(results: dict[str, dict[str, Any]], tolerance: float) -> dict[str, float]:
    """Return the largest relative difference in loss between contenders that train the same layers.

    Raises:
        SystemExit: the difference is above the tolerance.
    """
    worst = {}
    for kinds in (("full",), ("injected", "naive")):
        losses = np.array([r["losses"][:WARM_UP] for r in results.values() if r["kind"] in kinds])
        worst[kinds[0]] = float((np.ptp(losses, axis=0) / losses.mean(axis=0)).max()) if len(losses) else 0.0
        if not worst[kinds[0]] <= tolerance:
            raise SystemExit(f"{' and '.join(kinds)}: losses differ by {worst[kinds[0]]:.2e}, more than {tolerance}")
    return worst


def summarise(results: dict[str, dict[str, Any]], tokens: int) -> None:
    """Add medians, rates and ratios to each contender."""
    flops = {r["kind"]: r["flops_per_token"] for r in results.values() if "flops_per_token" in r}
    for result in results.values():
        result["median_seconds"] = statistics.median(result["seconds"])
        result["least_seconds"] = min(result["seconds"])
        result["median_cpu_seconds"] = statistics.median(result["cpu_seconds"])
        result["tokens_per_second"] = tokens / result["median_seconds"]
        if result["kind"] in flops:
            result["tflops_per_second"] = result["tokens_per_second"] * flops[result["kind"]] / 1e12
        sizes = result["predicted_bytes"]
        result["predicted_total_bytes"] = sum(sizes.values())
    for name, result in results.items():
        full = results.get(Contender(name, result["kind"], result["library"], result["remat"]).baseline)
        if full is None or result is full:
            continue
        # Ratios within a round, because other load slows a whole round.
        for ratio, key in (("measured_ratio", "seconds"), ("measured_cpu_ratio", "cpu_seconds")):
            result[ratio] = statistics.median(own / other for own, other in zip(result[key], full[key], strict=True))
        if result["kind"] in flops and "full" in flops:
            result["predicted_ratio"] = flops[result["kind"]] / flops["full"]
            if result["predicted_ratio"] < 1:
                predicted = 1 - result["predicted_ratio"]
                result["share_of_predicted_saving"] = (1 - result["measured_ratio"]) / predicted
                result["share_of_predicted_saving_cpu"] = (1 - result["measured_cpu_ratio"]) / predicted
        predicted = full["predicted_total_bytes"] - result["predicted_total_bytes"]
        if "compiler_bytes" in result and predicted:
            saved = full["compiler_bytes"]["total"] - result["compiler_bytes"]["total"]
            result["saved_bytes"] = {"predicted": predicted, "compiler": saved, "share": saved / predicted}


def show(results: dict[str, dict[str, Any]], peak_tflops: float | None) -> Iterator[str]:
    """Two Markdown tables: time and memory."""
    titles = ["", "s/step", "least", "CPU s/step", "tokens/s", "TFLOP/s", *(["MFU"] if peak_tflops else [])]
    titles += ["× full, predicted", "measured", "share of predicted saving", "measured in CPU s"]
    yield "| " + " | ".join(titles) + " |"
    yield "|" + len(titles) * "---|"
    for name, r in results.items():
        rate = r.get("tflops_per_second", math.nan)
        row = [name, *(f"{r[key]:.3f}" for key in ("median_seconds", "least_seconds", "median_cpu_seconds"))]
        row += [f"{r['tokens_per_second']:,.0f}", f"{rate:.3g}"]
        row += [f"{rate / peak_tflops:.1%}"] if peak_tflops else []
        row += [f"{r[key]:.3f}" if key in r else "" for key in ("predicted_ratio", "measured_ratio")]
        share = "share_of_predicted_saving"
        row += [f"{100 * r[share]:.0f} %" if share in r else ""]
        row += [f"{r['measured_cpu_ratio']:.3f}" if "measured_cpu_ratio" in r else ""]
        yield "| " + " | ".join(row) + " |"
    yield ""
    titles = ["MB", "parameters, moments", "gradients", "compiler: arguments", "temporaries", "total"]
    yield "| " + " | ".join([*titles, "saved, of predicted", "peak"]) + " |"
    yield "|" + 8 * "---|"
    for name, r in results.items():
        sizes, compiler, saved = r["predicted_bytes"], r.get("compiler_bytes"), r.get("saved_bytes")
        row = [name, *(_mb(r["predicted_total_bytes"] - sizes["gradients"], sizes["gradients"]))]
        row += _mb(*(compiler[key] for key in ("argument", "temp", "total"))) if compiler else ["", "", ""]
        row += [f"{saved['compiler'] / 1e6:,.0f}, {100 * saved['share']:.0f} %" if saved else ""]
        yield "| " + " | ".join([*row, *_mb(r["peak_bytes"])]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, default="small", help="shape of the base; 1b and 8b are those of Llama 3"
    )
    parser.add_argument("--layers", type=int, help="number of base layers (default: as in the shape)")
    parser.add_argument("--every", type=int, default=4, help="K of tli: one injected layer after every K base layers")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps per contender")
    parser.add_argument("--contenders", nargs="+", choices=[c.name for c in CONTENDERS], help="default: all")
    parser.add_argument("--alone", action="store_true", help="run one contender at a time")
    parser.add_argument("--eager", action="store_true", help="torch without torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, for MFU")
    parser.add_argument("--name", default="train", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    # The processes share an accelerator, and its memory is measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts = machine()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    contenders = [c for c in CONTENDERS if not args.contenders or c.name in args.contenders]
    # Separate groups with and without remat: all at once may not fit.
    groups = [[c for c in contenders if c.remat == remat] for remat in ("none", "full")]
    groups = [[c] for c in contenders] if args.alone else [group for group in groups if group]

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        model, injected, dtype, device = run_in_process(make_model, shape, args.every, args.dtype, folder)
        job = Job(model, injected, folder, dtype, args.batch_size, args.sequence_length, not args.eager)
        for group in groups:
            results |= compete(job, group, args.rounds)
    differences = check_losses(results, 1e-3 if dtype == "float32" else 1e-2)
    summarise(results, args.batch_size * args.sequence_length)
    print(
        f"{model.num_params / 1e6:.0f}M parameters, {model.num_hidden_layers} layers of which {sum(injected)} injected,"
        f" D {model.hidden_size}, V {model.vocab_size}, {args.batch_size} × {args.sequence_length} tokens, {dtype}, on"
        f" {device}; median of {args.rounds} steps. Losses agree to {max(differences.values()):.1e}."
    )
    print(*show(results, args.peak_tflops), sep="\n")
    result = {
        "machine": facts | {"device": device, "load_average_after": os.getloadavg()},
        "versions": versions("tli_jax", "jax", "jaxlib", "optax", "torch", "transformers"),
        "arguments": vars(args),
        "model": shape | {"grown_layers": model.num_hidden_layers, "num_params": model.num_params, "dtype": dtype},
        "injected": [layer for layer, is_injected in enumerate(injected) if is_injected],
        "loss_differences": differences,
        "contenders": results,
    }
    write_result(args.name, result)


def _nbytes(tree: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _mb(*sizes: int) -> list[str]:
    return [f"{size / 1e6:,.0f}" for size in sizes]


def _peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
