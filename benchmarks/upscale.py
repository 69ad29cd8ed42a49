"""Measures growth from file to file against ``cp`` and mergekit's passthrough, in one run.

    python benchmarks/upscale.py --work DIR [--mergekit VENV/bin/mergekit-yaml] [--repeat 3] [--shape NAME] [--proof]

The base has the shape of a published Llama and random weights. The default is Llama-3.2-1B (16 layers, D 2048,
F 8192, 32/8 heads, V 128256, tied, bf16, 2.5 GB), grown 16 → 24 by ``tli`` with K=2. All contenders read from and
write to DIR, which needs 15 GB (60 GB for Llama-3.1-8B); their writes are synced. All files have been read once
before, so reads come from the page cache if it is large enough.

- ``cp``: ``cp -r`` of the grown folder, synced: the bytes that every contender has to write.
- ``write``: the part of tli_jax that writes, synced; without imports, digests, finite check and proof.
- ``process``: ``python -m tli_jax.upscale --no-proof`` as a whole: imports, headers, digests, finite check, writing.
- ``proof``: the same with the proof (``--proof``).
- ``mergekit``: ``mergekit-yaml`` with a passthrough of the same layers as plain copies, in its own environment:
  ``python -m venv VENV && VENV/bin/pip install torch==2.13.0 mergekit``.

Peak memory is the largest resident set of the process, including the interpreter and mapped pages. Prints the results
and writes them to ``benchmarks/results/upscale.json`` with facts about the machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from common import machine, run_in_process, versions, write_result

from tli_jax.hf.checkpoint import expected_shapes
from tli_jax.hf.shards import OutputTensor, parse_size, split_shards, write_shards
from tli_jax.hf.sidecar import write_json
from tli_jax.models.shapes import SHAPES


def make_base(folder: Path, shape: str, layers: int, max_shard_size: str) -> None:
    """Write random bf16 weights from N(0, 0.02), with norms of 1."""
    config = SHAPES[shape].with_layers(layers)
    rng = np.random.default_rng(0)

    def piece(name: str, shape: tuple[int, ...]) -> OutputTensor:
        def make() -> Iterator[Any]:
            values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.02
            yield values.astype(ml_dtypes.bfloat16).reshape(-1).view(np.uint8).data

        return OutputTensor(name, "BF16", shape, make=make)

    folder.mkdir(parents=True)
    pieces = [piece(name, shape) for name, shape in expected_shapes(config).items()]
    write_shards(folder, split_shards(pieces, parse_size(max_shard_size)), {})
    write_json(folder / "config.json", config.to_hf())


def measure(arguments: list[str], output: Path) -> tuple[dict[str, float], str]:
    """Run a command that writes ``output`` and sync it; return seconds, peak memory in MB, and stdout."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments[0]} failed, see above")
    subprocess.run(["sync", *map(str, output.iterdir())], check=True)
    return {"seconds": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1000}, printed


def grow(base: Path, output: Path, every: int, *flags: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tli_jax.upscale",
        "--model",
        str(base),
        "--output",
        str(output),
        f"--every={every}",
    ]
    found, printed = measure([*command, "--json", *flags], output)
    seconds = json.loads(printed)["seconds"]
    return found | {f"of_which_{name}": value for name, value in seconds.items()}


def merge(mergekit: str, base: Path, output: Path, layers: int, every: int) -> dict[str, float]:
    slices = []
    for end in range(every, layers + 1, every):
        slices += [[end - every, end], [end - 1, end]]
    slices += [[layers - layers % every, layers]] * (layers % every > 0)
    recipe = {"merge_method": "passthrough", "dtype": "bfloat16"}
    recipe |= {"slices": [{"sources": [{"model": str(base), "layer_range": part}]} for part in slices]}
    file = output.with_suffix(".yaml")
    # JSON is YAML.
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return measure([mergekit, str(file), str(output), "--no-copy-tokenizer"], output)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--mergekit", help="path of mergekit-yaml (default: do not measure mergekit)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="llama3.2-1b")
    parser.add_argument("--layers", type=int, help="number of base layers (default: as in the shape)")
    parser.add_argument("--every", type=int, default=2, help="K of tli")
    parser.add_argument("--max-shard-size", default="5GB", help="of the base; a smaller size makes a sharded base")
    parser.add_argument("--output-shard-size", default="5GB", help="of the grown model")
    parser.add_argument("--proof", action="store_true", help="also measure the proof")
    parser.add_argument("--name", default="upscale", help="name of the file in benchmarks/results")
    args = parser.parse_args()
    layers = args.layers or SHAPES[args.shape].num_hidden_layers
    base = args.work / f"base-{args.shape}-{layers}-{args.max_shard_size}"
    if not base.exists():
        # In another process: children inherit the peak memory of the process that forks them.
        run_in_process(make_base, base, args.shape, layers, args.max_shard_size)
    output, copied, merged = (args.work / name for name in ("grown", "copied", "merged"))

    runs: dict[str, list[dict[str, float]]] = {"cp": [], "process": [], "mergekit": []}
    shards = ("--max-shard-size", args.output_shard_size)
    grow(base, output, args.every, "--no-proof", *shards)  # reads everything once and writes the folder that cp copies
    for number in range(args.repeat):
        print(f"round {number + 1} of {args.repeat}", file=sys.stderr)
        runs["cp"].append(measure(["cp", "-r", str(output), str(copied)], copied)[0])
        shutil.rmtree(copied)
        runs["process"].append(grow(base, output, args.every, "--no-proof", *shards))
        if args.mergekit:
            runs["mergekit"].append(merge(args.mergekit, base, merged, layers, args.every))
            shutil.rmtree(merged)
    if args.proof:
        runs["proof"] = [grow(base, output, args.every, *shards)]

    def median(name: str, key: str = "seconds") -> float:
        return statistics.median(run[key] for run in runs[name])

    cp = median("cp")
    grown_bytes = sum(file.stat().st_size for file in output.iterdir())
    rows = {"cp": (cp, median("cp", "peak_mb")), "write": (median("process", "of_which_write"), None)}
    rows["process"] = (median("process"), median("process", "peak_mb"))
    rows |= {name: (median(name), median(name, "peak_mb")) for name in ("proof", "mergekit") if runs.get(name)}
    print(f"{base.name}: {grown_bytes / 1e9:.2f} GB written, median of {args.repeat}")
    print(f"{'':10}{'seconds':>9}{'× cp':>8}{'peak MB':>9}")
    for name, (seconds, peak) in rows.items():
        print(f"{name:10}{seconds:9.2f}{seconds / cp:8.2f}" + (f"{peak:9.0f}" if peak else ""))
    result = {
        "machine": machine(),
        "versions": versions("tli_jax", "jax", "numpy"),
        "arguments": {key: value for key, value in vars(args).items() if key not in ("work", "mergekit")}
        | {"mergekit": bool(args.mergekit)},
        "bytes_written": grown_bytes,
        "ratios_to_cp": {name: seconds / cp for name, (seconds, _) in rows.items()},
        "runs": runs,
    }
    write_result(args.name, result)


if __name__ == "__main__":
    main()
