"""Compares the cross-entropy fused with the head with the plain one, which holds all logits: memory and time.

    python benchmarks/loss.py [--tokens 2048 8192] [--vocab 32000 128256] [--hidden-size 512] [--rounds 10]

Measures value and gradients for hidden states ``[1, tokens, D]`` and a head ``[V, D]``, with
``tli_jax.models.cross_entropy.objective`` and with the obvious two lines.

``temporaries`` is the memory that the compiler allocates besides arguments and results. ``peak`` is the additional
memory of one call in a process of its own, results included: resident memory on a CPU, device memory elsewhere. Cases
that need more than ``--limit-gb`` are only compiled. Times are medians over rounds in which both methods take turns.
Prints Markdown and writes ``benchmarks/results/loss.json``.
"""

import argparse
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import machine, run_in_process, versions, write_result

METHODS = ("fused", "plain")


class Case(NamedTuple):
    tokens: int
    V: int
    D: int
    dtype: str | None


def programs(case: Case, methods: tuple[str, ...]) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Compile value and gradient of each method; also return a function that creates their arguments."""
    import jax
    import jax.numpy as jnp

    from tli_jax.models.cross_entropy import chunked_cross_entropy, objective

    dtype = case.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def fused(x_BTD: jax.Array, head_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return objective(chunked_cross_entropy, 0.0, x_BTD, head_VD, tokens_BT[:, 1:])[0] / case.tokens

    def plain(x_BTD: jax.Array, head_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD, preferred_element_type=jnp.float32)
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1).mean()

    def make() -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        x_BTD = jax.random.normal(keys[0], (1, case.tokens, case.D), dtype)
        head_VD = (0.02 * jax.random.normal(keys[1], (case.V, case.D))).astype(dtype)
        return jax.block_until_ready((x_BTD, head_VD, jax.random.randint(keys[2], (1, case.tokens + 1), 0, case.V)))

    functions = {"fused": fused, "plain": plain}
    shapes = jax.eval_shape(make)
    return {
        name: jax.jit(jax.value_and_grad(functions[name], argnums=(0, 1))).lower(*shapes).compile() for name in methods
    }, make


def compile_only(case: Case) -> dict[str, Any]:
    """Bytes that each method needs, according to the compiler."""
    compiled, _ = programs(case, METHODS)
    found = {name: program.memory_analysis() for name, program in compiled.items()}
    keys = {"arguments": "argument", "results": "output", "temporaries": "temp"}
    return {
        name: {f"{ours}_bytes": getattr(memory, f"{theirs}_size_in_bytes") for ours, theirs in keys.items()}
        for name, memory in found.items()
    }


def peak(case: Case, method: str) -> int:
    """Peak bytes that one call adds."""
    import jax

    compiled, make = programs(case, (method,))
    arrays = make()
    device = jax.devices()[0]
    if device.platform != "cpu":
        held = device.memory_stats()["bytes_in_use"]
        jax.block_until_ready(compiled[method](*arrays))
        return device.memory_stats()["peak_bytes_in_use"] - held
    # Reset the peak, which includes compilation.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    held = _status("VmRSS")
    jax.block_until_ready(compiled[method](*arrays))
    return _status("VmHWM") - held


def compare(case: Case, methods: tuple[str, ...], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the seconds of each round by method, after checking that values and gradients agree.

    Raises:
        SystemExit: values or gradients differ.
    """
    import jax
    import numpy as np

    compiled, make = programs(case, methods)
    arrays = make()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name in methods[:: (-1) ** number]:
            started = time.perf_counter()
            jax.block_until_ready(compiled[name](*arrays))
            # Round 0 is the warm-up.
            seconds[name] += [time.perf_counter() - started] if number else []
    # With one method there is nothing to compare.
    results = [jax.tree.map(np.asarray, compiled[name](*arrays)) for name in methods if len(methods) > 1]
    tolerance = 1e-4 if arrays[0].dtype == "float32" else 2e-2
    for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        error = np.linalg.norm((a - b).astype(np.float32)) / np.linalg.norm(b.astype(np.float32))
        if not error <= tolerance:
            raise SystemExit(f"{case}: the methods differ by {error:.1e}, more than {tolerance}")
    return {name: {"seconds": taken, "median_seconds": statistics.median(taken)} for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="B·T")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit-gb", type=float, default=6, help="cases that need more memory are only compiled")
    parser.add_argument("--name", default="loss", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    # Measure the memory in use, not the memory preallocated.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts, cases = machine(), []
    print("| V | tokens | | results, MB | temporaries, MB | peak, MB | seconds | × plain |")
    print("|---|---|---|---|---|---|---|---|")
    for V, tokens in itertools.product(args.vocab, args.tokens):
        case = Case(tokens, V, args.hidden_size, args.dtype)
        found = run_in_process(compile_only, case)
        runs = tuple(name for name in METHODS if sum(found[name].values()) <= 1e9 * args.limit_gb)
        if runs:
            timed = run_in_process(compare, case, runs, args.rounds)
            for name in runs:
                found[name] |= timed[name] | {"peak_bytes": run_in_process(peak, case, name)}
        if "plain" in runs:
            for name in METHODS:
                found[name]["ratio_to_plain"] = found[name]["median_seconds"] / found["plain"]["median_seconds"]
        for name in METHODS:
            row = found[name]
            cells = [f"{row[key] / 1e6:,.0f}" for key in ("results_bytes", "temporaries_bytes")]
            cells += [*(["", "", ""] if name not in runs else [])]
            if name in runs:
                cells += [f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['median_seconds']:.2f}"]
                cells += [f"{row['ratio_to_plain']:.2f}" if "ratio_to_plain" in row else ""]
            print(f"| {V:,} | {tokens:,} | {name} | " + " | ".join(cells) + " |", flush=True)
        cases.append(case._asdict() | found)
    result = {
        "machine": facts | {"load_average_after": os.getloadavg()},
        "versions": versions("tli_jax", "jax", "jaxlib"),
        "arguments": vars(args),
        "cases": cases,
    }
    write_result(args.name, result)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
