"""Measures how long runs take to open prepared data of any size, and how fast ``tli-jax prepare`` makes it.

    python benchmarks/open_data.py [--sizes 1 10 100] [--workers 1 2] [--work DIR]

**Opening**: for each size in GB of token ids, a folder of prepared data with sparse shards is written to DIR, which
takes a few MB on disk. A process of its own then opens it as ``train`` does (``open_data``), and reads one batch of
64 × 2,049 tokens. Bytes read are those of all read system calls while it opens the data; memory-mapped pages show in
the resident memory. Last, ``tli-jax train --steps 1`` runs on it as a whole.

**Preparing**: the modules of Python's standard library, four times over, are tokenized for the embedded base.

Prints the results and writes them to ``benchmarks/results/open_data.json`` with facts about the machine (only if all
default sizes and workers are measured).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, run_in_process, versions, write_result

from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Source
from tli_jax.data.batches import open_data
from tli_jax.data.embedded import library_files
from tli_jax.data.shards import SHARD_BYTES, Writer
from tli_jax.data.tokenization import Rules
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import tokenizer_digest

SIZES, WORKERS = [1, 10, 100], [1, 2]
DOCUMENT = 100_000  # tokens
T, BATCH = 2048, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="GB of token ids")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    parser.add_argument("--work", type=Path, help="folder for the data (default: a temporary one)")
    parser.add_argument("--no-train", action="store_true", help="leave out the run of the complete command")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        opened = [measure_open(Path(work), size, not args.no_train) for size in args.sizes]
        prepared = measure_prepare(Path(work), args.workers) if args.workers else []
    packages = versions("tli_jax", "jax", "numpy", "tokenizers")
    result = {"opened": opened, "prepared": prepared, "machine": machine(), "versions": packages}
    print(json.dumps(result, indent=1))
    if (args.sizes, args.workers, args.no_train) == (SIZES, WORKERS, False):
        write_result("open_data", result)


def measure_open(work: Path, gigabytes: int, trains: bool) -> dict[str, Any]:
    folder = work / f"{gigabytes}GB"
    folder.mkdir()
    write_sparse(folder, gigabytes * 10**9)
    found = {"gigabytes": gigabytes, "shards": len(list(folder.glob("*.ids")))} | run_in_process(
        open_once, folder, work
    )
    if trains:
        call = [sys.executable, "-m", "tli_jax.train", "--model=embedded", "--steps=1", "--sequence-length=128"]
        started, cpu = time.perf_counter(), cpu_seconds()
        flags = [f"--text={folder}", f"--run={work / f'run{gigabytes}'}", "--batch-size=2", "--only=last_n(1)"]
        subprocess.run([*call, *flags, "--validation-batches=1"], check=True, stderr=subprocess.DEVNULL)
        found |= {"train_seconds": time.perf_counter() - started, "train_cpu_seconds": cpu_seconds() - cpu}
    return found


def rules_of_base() -> Rules:
    base = hub.resolve("embedded")
    model = open_checkpoint(base).config
    return Rules.of_model(TrainConfig(), model, None, tokenizer_digest(base))


def write_sparse(folder: Path, nbytes: int) -> None:
    """Prepared data whose ids are all zero, and whose documents have 100,000 tokens. Its digests are wrong."""
    import numpy as np

    rules = rules_of_base()
    limit = SHARD_BYTES // rules.dtype.itemsize
    tokens = nbytes // rules.dtype.itemsize
    shards = []
    for number, first in enumerate(range(0, tokens, limit)):
        count = min(limit, tokens - first)
        with (folder / f"{number:05}.ids").open("wb") as file:
            file.truncate(count * rules.dtype.itemsize)
        np.arange(0, count, DOCUMENT, dtype=np.int64).tofile(folder / f"{number:05}.starts")
        shards.append({"tokens": count, "documents": -(-count // DOCUMENT), "sha256": {"ids": "", "starts": ""}})
    counts = {"tokens": tokens, "documents": sum(shard["documents"] for shard in shards)}
    source = {"path": "sparse", "digest": "sparse", "empty": 0, "bad": {}, "notes": [], "places": []} | counts
    with Writer(folder, rules) as writer:
        writer.shards = shards
        writer.finish([source], {})


def open_once(folder: Path, work: Path) -> dict[str, Any]:
    """Open the data as a run does, and read one batch."""
    import grain  # noqa: F401  # takes a second, whatever the data

    base = hub.resolve("embedded")
    model, digest = open_checkpoint(base).config, tokenizer_digest(base)
    config = TrainConfig(text=(Source(str(folder)),), batch_size=BATCH)
    before, started = (read_bytes(), resident()), time.perf_counter()
    data = open_data(config, model, None, digest, T, work / "cache")
    found = {"open_seconds": time.perf_counter() - started, "bytes_read": read_bytes() - before[0]}
    found |= {"resident_bytes": resident() - before[1], "tokens": data.tokens}
    started = time.perf_counter()
    next(data.batches(0, BATCH, range(BATCH), 0))
    return found | {"batch_seconds": time.perf_counter() - started}


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_prepare(work: Path, counts: list[int]) -> list[dict[str, Any]]:
    corpus = work / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for _ in range(4):
            for part in library_files():
                for module in part:
                    text = module.read_text(encoding="utf-8", errors="replace").replace("\0", "")
                    file.write(json.dumps({"text": text}) + "\n")
    results: list[dict[str, Any]] = []
    manifests: list[dict[str, Any]] = []
    for workers in counts:
        output = work / f"prepared{workers}"
        call = [sys.executable, "-m", "tli_jax.prepare", "--model=embedded", f"--text={corpus}", f"--output={output}"]
        started, cpu = time.perf_counter(), cpu_seconds()
        subprocess.run([*call, f"--workers={workers}"], check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        manifests.append(json.loads((output / "manifest.json").read_text()))
        tokens = manifests[-1]["tokens"]
        found = {"workers": workers, "bytes": corpus.stat().st_size, "tokens": tokens, "seconds": seconds}
        found["cpu_seconds"] = cpu_seconds() - cpu
        found |= {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / found["cpu_seconds"]}
        results.append(found)
    assert all(manifest == manifests[0] for manifest in manifests)
    return results


if __name__ == "__main__":
    main()
