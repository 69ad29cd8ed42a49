"""Kills growth and training at random moments, many times, and checks that nothing is lost.

    python benchmarks/killstorm.py [--kills 100] [--seed 0] [--only growth] [--work DIR]

**Growth.** A random model of 0.1 GB is grown 8 → 12 layers, file to file, every other time over an older output.
Each time the command receives SIGKILL at a random moment. The output must then be absent, or the complete old one, or
the complete new one. Running the same command again must give the output of an uninterrupted growth, byte for byte,
and leave no other files.

**Training.** The embedded model, grown 12 → 15 layers, trains its injected layers with a checkpoint every five steps.
The run is killed repeatedly while it starts, trains and saves, and the same command resumes it. At the end its
parameters, optimizer state and exported weights must be those of an uninterrupted run, bit for bit, and
``metrics.jsonl`` must contain every step once, with the same losses.

Prints a summary, writes ``benchmarks/results/killstorm.json``, and exits with 1 if anything was lost. Takes some
minutes; compiled programs are cached, so restarts are fast.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, versions, write_result

import tli_jax
from tli_jax.hf.checkpoint import expected_shapes

SAVE_EVERY, STEPS_PER_KILL = 5, 8


def start(work: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled"), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    log = (work / "log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=os.environ | environment, stdout=log, stderr=log, cwd=work
    )


def finish(work: Path, *arguments: str) -> float:
    """Run a command to the end; return its seconds. It must succeed."""
    started = time.monotonic()
    if code := start(work, *arguments).wait(timeout=1800):
        raise SystemExit(f"FAILED: {' '.join(arguments)} left with {code}: {(work / 'log').read_text()[-500:]}")
    return time.monotonic() - started


def digest(folder: Path) -> str | None:
    """Digest of all names and bytes in a folder; None if it does not exist."""
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {message}")


# --- Growth.


def make_base(folder: Path) -> None:
    config = tli_jax.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    draw, params = np.random.default_rng(0), {}
    from safetensors.numpy import save_file

    for name, shape in expected_shapes(config).items():
        params[name] = draw.standard_normal(shape, np.float32) * np.float32(0.02)
    folder.mkdir()
    save_file(params, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def storm_growth(work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    make_base(work / "base")
    outputs, call = work / "outputs", ["tli_jax.upscale", "--model", "base", "--no-proof", "--overwrite"]
    new = [*call, "--every", "2", "--output", "outputs/out"]
    finish(work, *call, "--method", "stack", "--output", "old")
    seconds = [finish(work, *new) for _ in range(3)]
    old_digest, new_digest, usual = digest(work / "old"), digest(outputs / "out"), statistics.median(seconds)
    moments, found_there, started = Counter[str](), Counter[str](), time.monotonic()
    done = 0
    while done < kills:
        shutil.rmtree(outputs)
        outputs.mkdir()
        has_old = done % 2 == 1
        if has_old:
            shutil.copytree(work / "old", outputs / "out")
        process = start(work, *new)
        time.sleep(rng.uniform(0, 1.05 * usual))
        is_written = any(".partial" in path.name for path in outputs.iterdir())
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it finished before the kill
            moments["too late, not counted"] += 1
            continue
        done += 1
        is_there = (outputs / "out").exists()
        moments["while writing" if is_written else "after" if digest(outputs / "out") == new_digest else "before"] += 1
        if is_there:
            now = digest(outputs / "out")
            expect(now in (new_digest, old_digest if has_old else None), f"kill {done}: half an output")
            found_there["the new output" if now == new_digest else "the old output"] += 1
        else:
            found_there["nothing"] += 1
        finish(work, *new)
        expect(digest(outputs / "out") == new_digest, f"kill {done}: the next growth gave another output")
        left = [path.name for path in outputs.iterdir() if path.name != "out"]
        expect(not left, f"kill {done}: left behind: {left}")
        if done % 10 == 0:
            print(f"growth: {done} of {kills} kills, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "kills": kills,
        "moments": dict(moments),
        "under_the_final_name": dict(found_there),
        "seconds_of_a_growth": usual,
        "seconds": time.monotonic() - started,
        "bytes": sum(path.stat().st_size for path in (outputs / "out").iterdir()),
    }


# --- Training.


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def arrays(run: Path, step: int) -> dict[str, Any]:
    """Digest, dtype and shape of every array in the checkpoint of a step."""
    document = json.loads((run / "checkpoints" / str(step) / "meta" / "meta.json").read_text())
    return document["content"]["arrays"]


def losses(run: Path) -> list[tuple[Any, ...]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"], line["tokens"]) for line in found]


def storm_training(work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    finish(work, "tli_jax.upscale", "--model", "embedded", "--every", "4", "--no-proof", "--output", "grown")
    steps = STEPS_PER_KILL * kills
    call = ["tli_jax.train", "--model", "grown", "--text", "embedded", "--only", "injected", "--batch-size", "2"]
    call += ["--sequence-length", "32", "--dtypes", "compute=float32", "--save-every", str(SAVE_EVERY), "--keep", "2"]
    call += ["--learning-rate", "1e-3", "--steps", str(steps), "--validate-every", str(steps)]
    straight, killed = [*call, "--run", "straight", "--export", "a"], [*call, "--run", "killed", "--export", "b"]
    seconds = finish(work, *straight)
    print(f"training: {steps} steps without a kill, {seconds:.0f} s", file=sys.stderr, flush=True)
    run, moments, started = work / "killed", Counter[str](), time.monotonic()
    again, start_takes = 0, 5.0
    for number in range(1, kills + 1):
        before, at = (run / "metrics.jsonl").stat().st_ino if lines(run) else 0, time.monotonic()
        process = start(work, *killed)
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, start_takes))
        else:
            # Kill it some steps after the checkpoint from which it resumes.
            wanted = rng.randrange(1, 2 * SAVE_EVERY + 4)
            first = -1
            while process.poll() is None:
                if lines(run) and (run / "metrics.jsonl").stat().st_ino != before:
                    if first < 0:
                        first, start_takes = lines(run), time.monotonic() - at
                    if lines(run) >= first + wanted:
                        break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
        expect(process.poll() is None, f"kill {number}: it ended by itself: {(work / 'log').read_text()[-500:]}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = run / "checkpoints"
        saving = folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())
        trains = lines(run) and (run / "metrics.jsonl").stat().st_ino != before
        moments["while saving" if saving else "while training" if trains else "while starting"] += 1
        if number % 10 == 0:
            took = time.monotonic() - started
            print(f"training: {number} of {kills} kills, {took:.0f} s, step {lines(run)} of {steps}", file=sys.stderr)
    again = finish(work, *killed)
    expect(losses(run) == losses(work / "straight"), "the metrics differ from the uninterrupted run")
    expect([line[0] for line in losses(run)] == list(range(1, steps + 1)), "a step is missing or repeated")
    expect(arrays(run, steps) == arrays(work / "straight", steps), "parameters or optimizer state differ")
    names = [sorted(path.name for path in (work / name).glob("*.safetensors")) for name in "ab"]
    expect(names[0] == names[1] != [], "the exports have different files")
    same = all((work / "a" / name).read_bytes() == (work / "b" / name).read_bytes() for name in names[0])
    expect(same, "the exported weights differ")
    left = [
        path.name for path in (run / "checkpoints").iterdir() if not path.name.isdecimal() and path.name != "frozen"
    ]
    expect(not left, f"left behind among the checkpoints: {left}")
    return {
        "kills": kills,
        "moments": dict(moments),
        "steps": steps,
        "save_every": SAVE_EVERY,
        "arrays_compared": len(arrays(run, steps)),
        "seconds_without_a_kill": seconds,
        "seconds_after_the_last_kill": again,
        "seconds": time.monotonic() - started,
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| command | kills | moment of the kill | seconds | result |", "|---|---|---|---|---|"]
    for name, came in {
        "growth": "{kills} outputs absent or complete; {kills} outputs identical after a rerun, byte for byte",
        "training": "{steps} steps, each once; {arrays_compared} arrays and the export identical, bit for bit",
    }.items():
        found = result[name]
        moments = ", ".join(
            f"{count} {moment}" for moment, count in sorted(found["moments"].items()) if "," not in moment
        )
        lines.append(f"| {name} | {found['kills']} | {moments} | {found['seconds']:.0f} | {came.format(**found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["growth", "training"])
    parser.add_argument("--work", type=Path, help="working folder, which is kept (default: a temporary one)")
    parser.add_argument("--no-write", action="store_true", help="do not write the results file")
    parser.add_argument(
        "--table", action="store_true", help="print the stored results as a table, without running anything"
    )
    args = parser.parse_args()
    file = RESULTS / "killstorm.json"
    if args.table:
        print(table(json.loads(file.read_text(encoding="utf-8"))))
        return
    work = (args.work or Path(tempfile.mkdtemp(prefix="killstorm-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    facts = machine()
    found = json.loads(file.read_text()) if args.only and file.is_file() else {}
    for name, storm in {"growth": storm_growth, "training": storm_training}.items():
        if args.only in (None, name):
            found[name] = storm(work, args.kills, random.Random(f"{args.seed} {name}"))
            moments = ", ".join(f"{count} {moment}" for moment, count in sorted(found[name]["moments"].items()))
            print(f"{name}: {args.kills} kills ({moments}) in {found[name]['seconds']:.0f} s: nothing lost", flush=True)
    result = {
        "machine": facts,
        "versions": versions("tli_jax", "jax", "numpy", "orbax-checkpoint"),
        "arguments": {"kills": args.kills, "seed": args.seed},
    }
    result |= {name: found[name] for name in ("growth", "training") if name in found}
    if not args.no_write:
        write_result("killstorm", result)
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
