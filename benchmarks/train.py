"""Times training steps of grown Llamas, all layers or only the injected ones, with torch beside them.

    python benchmarks/train.py                                           # small models on a CPU, step by step in turns
    python benchmarks/train.py --plan gpu --output FILE                  # on one GPU, one after the other
    python benchmarks/train.py "1b all jax 2x8192 remat=dots" --profile  # one contender, and where its time goes
    python benchmarks/train.py --table FILE                              # print stored results

A contender is SHAPE TRAINS LIBRARY BATCHxTOKENS [OPTION=VALUE …]:

- SHAPE: the base, which ``tli`` grows by a layer after every four. 1b and 8b are those of Llama 3.
- TRAINS: ``all``, ``injected``, or ``naive``: gradients of all parameters, of which a mask drops those of kept layers.
- LIBRARY: ``jax``, which is ``tli_jax.Trainer`` with its options, such as remat=dots; or ``torch``, which is
  LlamaForCausalLM of transformers with SDPA and fused AdamW (options: remat=full; compile=blocks, model or no).

Each contender is a process, which makes its weights on its device: N(0, 0.02) in bfloat16, trainable ones in float32;
on a CPU all in float32. Contenders run one after the other, or with ``--turns`` step by step, so that other load on the
machine slows all of them equally. A contender that needs more than ``--seconds`` is killed; that, and running out of
memory, are results like any other. Results are appended to ``--output`` as they come, one line of JSON each.

The first steps are not timed but checked: the loss must start near ln V + D 0.02² / 2, and the losses of jax contenders
that train the same layers must agree. Attention crosses documents (``isolate=false``), as in torch. MFU counts the
FLOPs of ``Trainer.flops_per_token``, which leave out rematerialization. On a CPU, ratios are of CPU seconds: other load
changes them less.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from common import RESULTS, machine, versions
from contenders import INIT, PROGRAMS, SHAPES, Contender

from tli_jax.cli.train_config import TrainConfig

REMATS = get_args(get_type_hints(TrainConfig)["remat"])
# Most wanted first.
PLANS = {
    "cpu": [f"small {what} 4x256" for what in ("all jax", "injected jax", "naive jax", "all torch", "injected torch")],
    "gpu": [
        *("1b all jax 1x8192 remat=dots", "1b all torch 1x8192"),
        *("1b injected jax 1x8192", "1b injected torch 1x8192"),
        *("8b injected jax 1x8192 remat=full", "8b injected torch 1x8192 remat=full"),
        *(f"1b all jax 1x8192 remat={remat}" for remat in REMATS if remat != "dots"),
        *("1b all jax 2x8192 remat=dots", "1b all jax 2x8192 remat=full", "1b all torch 2x8192"),
    ],
}
WARM_UP, PROFILED = 3, 2  # steps before timing starts, and in a profile


class FailedError(Exception):
    """A contender did not get to its end."""


def serve(contender: Contender, text: str, dtype: str | None, pipe: Any) -> None:
    """The process of a contender. It answers ``start``, the numbers of steps, ``peak_bytes`` and ``profile``."""
    try:
        program = PROGRAMS[contender.library](contender, dtype)
        while (request := pipe.recv()) != "end":
            if request == "start":
                losses = [program.step(contender.tokens(text, number)) for number in range(WARM_UP)]
                answer = program.facts | {"losses": losses}
            elif request == "peak_bytes":
                answer = program.peak()
            elif request == "profile":
                answer = program.profile([contender.tokens(text, number) for number in range(PROFILED)])
            else:
                batch = contender.tokens(text, request)
                started, used = time.perf_counter(), time.process_time()
                program.step(batch)
                answer = time.perf_counter() - started, time.process_time() - used
            pipe.send(answer)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        is_memory = any(words in text for words in ("RESOURCE_EXHAUSTED", "out of memory", "MemoryError"))
        pipe.send(FailedError(f"out of memory ({text[:200]})" if is_memory else text[:1000]))


class Worker:
    """The process of a contender, seen from the main process."""

    def __init__(self, contender: Contender, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        target = (contender, args.text, args.dtype, theirs)
        self.process = context.Process(target=serve, args=target, daemon=True)
        self.process.start()
        theirs.close()
        self.limit = self.left = args.seconds

    def ask(self, request: Any) -> Any:
        """Send a request and wait for its answer. Raises ``FailedError``, after which the process is gone."""
        started = time.monotonic()
        try:
            self.pipe.send(request)
            answer = self.pipe.recv() if self.pipe.poll(max(0, self.left)) else FailedError(f"over {self.limit:g} s")
        except (EOFError, OSError):
            self.process.join(10)
            answer = FailedError(f"its process ended with code {self.process.exitcode}")
        self.left -= time.monotonic() - started
        if isinstance(answer, FailedError):
            self.process.kill()
            self.process.join()
            raise answer
        return answer


def race(group: list[Contender], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run contenders step by step in turns. The results of those that do not get to their end have an ``error``."""
    workers: dict[str, Worker] = {}
    started = time.time()
    results = {
        contender.name: contender._asdict() | {"text": args.text, "race": started, "seconds": [], "cpu_seconds": []}
        for contender in group
    }

    def ask(name: str, request: Any) -> Any:
        try:
            return workers[name].ask(request)
        except FailedError as failed:
            results[name]["error"] = str(failed)
            del workers[name]

    for contender in group:  # one after the other, because compilation uses all cores
        name = contender.name
        workers[name] = Worker(contender, args)
        if (facts := ask(name, "start")) is not None:
            results[name] |= facts | {"start_seconds": args.seconds - workers[name].left}
            log(f"{name}: started in {results[name]['start_seconds']:.0f} s, losses {facts['losses']}")
    for number in range(args.rounds):
        # Vary the order, so that no contender always follows the same one.
        for name in np.roll(list(workers), -number).tolist()[:: (-1) ** number]:
            if (times := ask(name, WARM_UP + number)) is not None:
                for key, value in zip(("seconds", "cpu_seconds"), times, strict=True):
                    results[name][key].append(value)
    for name, result in results.items():
        for request in ("peak_bytes", "profile") if args.profile else ("peak_bytes",):
            if name in workers and (answer := ask(name, request)) is not None:
                result[request] = answer
        if name in workers:
            workers[name].pipe.send("end")
            workers[name].process.join()
        yield result | {"load_average": os.getloadavg()}


def check(result: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Set ``wrong`` if the losses are not the expected ones."""
    losses, base = result["losses"], SHAPES[result["shape"]]
    expected = math.log(base.vocab_size) + base.hidden_size * INIT**2 / 2
    if not abs(losses[0] / expected - 1) < 0.05:
        result["wrong"] = f"the loss starts at {losses[0]:.3f}, not near {expected:.3f}"
    for other in others:
        if result["library"] == "jax" and "losses" in other and job(other) == job(result):
            difference = max(abs(a / b - 1) for a, b in zip(losses, other["losses"], strict=True))
            if not difference <= (1e-3 if result["dtype"] == "float32" else 1e-2):
                result["wrong"] = f"losses differ by {difference:.1e} from those of {other['name']}"


def job(result: dict[str, Any], **changed: str) -> tuple[Any, ...]:
    """What two contenders have in common if their losses or times are compared."""
    result = result | {"trains": result["trains"].replace("naive", "injected")} | changed
    return tuple(result[key] for key in ("library", "trains", "shape", "batch", "T", "text", "dtype"))


def show(results: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table. Ratios are to the fastest contender that trains all layers, and to the fastest of torch."""
    done = [result for result in results if "peak_bytes" in result]
    fastest: dict[Any, dict[str, Any]] = {}
    for result in sorted(done, key=_seconds):
        if result["trains"] != "naive":
            fastest.setdefault(job(result), result)
    # The mask of naive saves no FLOPs.
    flops = {
        (r["trains"] != "injected", r["shape"], r["T"]): r["flops_per_token"] for r in done if "flops_per_token" in r
    }
    peak = next((result["peak_flops"] for result in done if result.get("peak_flops")), math.nan)
    titles = ["contender", "s/step", "CPU s/step", "tokens/s", "TFLOP/s", "MFU", "peak GB", "start, s"]
    yield "| " + " | ".join([*titles, "× FLOPs of all", "× time of all", "× time of torch"]) + " |"
    yield "|---|" + 10 * "---:|"
    for result in results:
        if result not in done:
            yield f"| {result['name']} | {result['error']} |" + 9 * " |"
            continue
        own, of_all = (
            flops.get((is_all, result["shape"], result["T"])) for is_all in (result["trains"] != "injected", True)
        )
        rate = result["batch"] * result["T"] / _seconds(result)
        speed = rate * (own or math.nan)
        ratios = [own / of_all if own and of_all else math.nan]
        for other in (fastest.get(job(result, trains="all")), fastest.get(job(result, library="torch"))):
            ratios.append(math.nan if other in (None, result) else _ratio(result, other))
        cells = [f"{_seconds(result):.3f}", f"{statistics.median(result['cpu_seconds']):.3f}", f"{rate:,.0f}"]
        cells += [f"{speed / 1e12:.3g}", f"{speed / peak:.1%}", f"{result['peak_bytes'] / 1e9:.1f}"]
        cells += [f"{result['start_seconds']:.0f}", *(f"{ratio:.3f}" for ratio in ratios)]
        cells = ["" if "nan" in cell else cell for cell in cells]
        yield "| " + " | ".join([f"{result['name']}{' **wrong**' * ('wrong' in result)}", *cells]) + " |"
    yield from (f"\n{result['name']}: {result['wrong']}" for result in results if "wrong" in result)


def _seconds(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"])


def _ratio(result: dict[str, Any], other: dict[str, Any]) -> float:
    key = "cpu_seconds" if result["device"] == "cpu" else "seconds"
    if result["race"] != other["race"]:
        return statistics.median(result[key]) / statistics.median(other[key])
    # Within a round, because other load slows a whole round.
    return statistics.median(a / b for a, b in zip(result[key], other[key], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", type=Contender.parse, help="contenders, instead of those of a plan")
    parser.add_argument("--plan", choices=PLANS, default="cpu", help="a list of contenders (cpu runs in turns)")
    parser.add_argument("--turns", action="store_true", help="run all contenders at once, step by step in turns")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each contender")
    parser.add_argument("--seconds", type=float, help="limit for each contender (default: 100, in turns 3600)")
    parser.add_argument("--text", default="zipf", help="token ids: zipf, uniform, or the bytes of a FILE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--profile", action="store_true", help=f"also trace {PROFILED} steps: where their time goes")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "train.jsonl", help="file that results are appended to"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of stored results")
    args = parser.parse_args()
    if args.table:
        lines = args.table.read_text(encoding="utf-8").splitlines()
        print(*show(list({(r["name"], r["text"]): r for r in map(json.loads, lines)}.values())), sep="\n")
        return
    contenders = args.contenders or [Contender.parse(name) for name in PLANS[args.plan]]
    in_turns = args.turns or (not args.contenders and args.plan == "cpu")
    args.seconds = args.seconds or (3600 if in_turns else 100)
    # On an accelerator, contenders in turns share its memory; one alone may have nearly all of it.
    memory = {"PREALLOCATE": "false"} if in_turns else {"MEM_FRACTION": "0.92"}
    os.environ.update({f"XLA_PYTHON_CLIENT_{key}": value for key, value in memory.items()})
    # Otherwise torch's threads spin while they wait, which other load on the cores makes a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    facts = {"machine": machine(), "versions": versions("tli_jax", "jax", "jaxlib", "optax", "torch", "transformers")}
    results: list[dict[str, Any]] = []
    for group in [contenders] if in_turns else [[contender] for contender in contenders]:
        for result in race(group, args):
            if "losses" in result:
                check(result, results)
            results.append(result)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result | facts) + "\n")
            log(*list(show([result]))[2:], result.get("profile", ""))
    print(*show(results), sep="\n")
    sys.exit(any("wrong" in result for result in results))


def log(*lines: str) -> None:
    print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
