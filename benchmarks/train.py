"""What training only the injected layers saves, beside full training, a naive mask, and torch, in one run.

    python benchmarks/train.py [--shape small] [--rounds 12] [--batch-size 4] [--sequence-length 256] [--every 4]
    python benchmarks/train.py --shape 1b --batch-size 8 --sequence-length 8192 --alone --peak-tflops 989   # on a GPU

A Llama with random weights grows by ``tli`` with plain copies, and every contender trains it on the same batches:

- ``full``: all of it, by ``tli_jax.training.step.Trainer``.
- ``injected``: the same with ``only=injected``: grouped stacks.
- ``naive mask``: the same loss over one flat stack, differentiated with respect to all parameters, the gradients and
  the updates of frozen layers multiplied by 0: what freezing by a mask comes to where layers are stacked.
- ``torch full``: transformers' LlamaForCausalLM with SDPA, AdamW (fused) and ``torch.compile``.
- ``torch injected``: the same with ``requires_grad = False`` on what is frozen.
- ``full, remat`` and ``injected, remat``: the first two with ``remat: full``, for information.

All run without remat but the last two, with the same AdamW, clipping and weight decay. In bf16 (the default but on a
CPU), parameters that train are fp32; torch then runs under autocast. Each contender is a process of its own, and those
of a group take one step each in turns, so that whatever else slows the machine slows all of them alike; with
``--alone``, for accelerators too small to hold all at once, one after the other. The first steps are checked, not
timed: contenders that train the same layers must have the same losses.

FLOPs of a token, ``Trainer.flops_per_token``: 2 for each weight forward, 2 for activation gradients at and above the
lowest layer that trains, 2 for weight gradients of what trains; causal attention counted half, its backward pass
double, the head counted, the embedding's look-up not, nor what is computed again. The naive mask is counted as what it
computes: everything. CPU seconds, of all threads, are the steadier figure on a machine that others use too; on an
accelerator they say nothing. Bytes are predicted for parameters, gradients and moments; what the compiler says has the
activations besides. Results are printed as Markdown and written to ``benchmarks/results/train.json``.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Nothing above this line or below imports jax or torch before a contender's own process runs: each holds one of them.
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
# Steps before timing starts, whose losses are compared.
WARM_UP = 3
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


class Contender(NamedTuple):
    name: str
    kind: str  # of full, injected and naive
    library: str  # jax or torch
    remat: str = "none"

    @property
    def baseline(self) -> str:
        """Full training by the same means."""
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
    """What the processes are told."""

    model: LlamaConfig  # as grown
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
    """A step, which takes its number and returns the loss when all of it is done; facts; and the peak of memory."""

    step: Callable[[int], float]
    facts: dict[str, Any]
    peak: Callable[[], int]


def make_model(shape: dict[str, Any], every: int, dtype: str | None, folder: Path) -> tuple[LlamaConfig, Any, str, str]:
    """Write the grown model; its configuration, which layers were injected, the dtype, and the device."""
    import jax

    from tli_jax.growth.inject import inject
    from tli_jax.growth.methods import tli
    from tli_jax.hf.save import save_hf
    from tli_jax.models.llama import init_params

    # It is random on any device; an accelerator may not have the room beside what else it holds.
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

    from tli_jax.cli.config import TrainConfig
    from tli_jax.distributed.kernels import choose_attention
    from tli_jax.distributed.mesh import make_mesh, param_sharding
    from tli_jax.hf.checkpoint import hf_name, open_checkpoint
    from tli_jax.hf.load import load_array
    from tli_jax.training.freezing import make_layout
    from tli_jax.training.step import Trainer

    class NaiveTrainer(Trainer):
        """All parameters have gradients and moments; a mask over the layers of each stack freezes some of them."""

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
    kernel, says = choose_attention("auto", mesh, job.T, job.model.head_dim, job.dtype)
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
    # Counted before the state takes the parameters over.
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
    facts |= {"compile_seconds": compiling, "runs_as": f"attention {says}"}
    return Program(step, facts, peak)


def torch_program(job: Job, contender: Contender) -> Program:
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(_cores())
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
    """A contender's process: takes the step of each number that comes in, and says how long it took and the loss."""
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
    """Let contenders take steps in turns."""
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    pipes: dict[str, Any] = {}
    processes = []
    for contender in contenders:
        # One after the other: compilers are busy.
        _say(f"{contender.name}: start")
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
        _say(f"{contender.name}: losses {losses}")
    for number in range(rounds):
        # Everyone comes first, last and after everyone else in turn.
        for name in np.roll(list(pipes), -number).tolist()[:: (-1) ** number]:
            pipes[name].send(WARM_UP + number)
            for key, value in zip(("seconds", "cpu_seconds", "losses"), pipes[name].recv(), strict=True):
                results[name][key].append(value)
        _say(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {results[n]['seconds'][-1]:.3f}" for n in pipes))
    for name, pipe in pipes.items():
        pipe.send(None)
        results[name]["peak_bytes"] = pipe.recv()
    for process in processes:
        process.join()
    return results


def check_losses(results: dict[str, dict[str, Any]], tolerance: float) -> dict[str, float]:
    """The largest relative difference between contenders that train the same, over the first steps.

    Raises:
        SystemExit: it is above the tolerance.
    """
    worst = {}
    for kinds in (("full",), ("injected", "naive")):
        losses = np.array([r["losses"][:WARM_UP] for r in results.values() if r["kind"] in kinds])
        worst[kinds[0]] = float((np.ptp(losses, axis=0) / losses.mean(axis=0)).max()) if len(losses) else 0.0
        if not worst[kinds[0]] <= tolerance:
            raise SystemExit(f"{' and '.join(kinds)}: losses differ by {worst[kinds[0]]:.2e}, more than {tolerance}")
    return worst


def summarise(results: dict[str, dict[str, Any]], tokens: int) -> None:
    """Add to each contender what its figures come to."""
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
        # Of each round by itself, so that what slows a whole round counts for nothing.
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
    """Two Markdown tables: time, memory."""
    titles = ["", "s/step", "least", "CPU s/step", "tokens/s", "TFLOP/s", *(["MFU"] if peak_tflops else [])]
    titles += ["× full, predicted", "measured", "of the predicted saving", "measured in CPU s"]
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


def machine() -> dict[str, Any]:
    """Where and beside what a figure was measured."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": _cores(), "system": platform.platform(), "load_average": os.getloadavg()}


def versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def write_result(name: str, result: dict[str, Any]) -> None:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a process of its own, which imports and holds what it likes.

    Raises:
        BrokenProcessPool: it died, for memory for example.
    """
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the base; a Llama 3's for 1b and 8b")
    parser.add_argument("--layers", type=int, help="of the base, instead of the shape's")
    parser.add_argument("--every", type=int, default=4, help="base layers for each injected one")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each contender")
    parser.add_argument("--contenders", nargs="+", choices=[c.name for c in CONTENDERS], help="default: all")
    parser.add_argument("--alone", action="store_true", help="one contender at a time")
    parser.add_argument("--eager", action="store_true", help="torch without torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--name", default="train", help="of the file in benchmarks/results")
    args = parser.parse_args()
    # Processes share an accelerator, and its memory is measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts = machine()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    contenders = [c for c in CONTENDERS if not args.contenders or c.name in args.contenders]
    # With and without remat apart: all at once may not fit.
    groups = [[c for c in contenders if c.remat == remat] for remat in ("none", "full")]
    groups = [[c] for c in contenders] if args.alone else [group for group in groups if group]

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        model, injected, dtype, device = in_process(make_model, shape, args.every, args.dtype, folder)
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


def _cores() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0))


def _peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
