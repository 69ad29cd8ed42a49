"""Compares the numbers of two git revisions: bytes of weights, digests and losses, which a refactoring must not change.

    python benchmarks/revisions.py BEFORE            # against the working tree
    python benchmarks/revisions.py BEFORE AFTER

Each revision is checked out into a temporary worktree and runs the same commands, with this interpreter and on the CPU:

- growth: ``configs/demo.yaml``;
- training: six steps of the injected layers with two microbatches per step, in float32 and in bfloat16;
- resume: the bfloat16 run again, stopped after three steps and resumed;
- comparison: four methods before any training (``--steps 0``).

Then every weight file, configuration, tokenizer file, tensor digest, plan row, data digest, array of a checkpoint and
loss is compared exactly. The resumed run is also compared with the uninterrupted one. Prints a table and exits with 1
if anything differs. Takes about four minutes on 2 cores.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
# Current names of flags and of keys in JSON files, with the names that they had before.
FLAGS = {
    "--grad-accum-steps": ("--accumulation",),
    "--clip-norm": ("--clip",),
    "--validation-fraction": ("--validation-share",),
}
KEYS = {"guarantee": ("exactness",), "optimizer_state": ("moments",)}
CURRENT = {old: new for new, olds in KEYS.items() for old in olds}
# Depend on the machine.
MACHINE = {"seconds", "tokens_per_second", "mfu"}

Results = dict[str, str]


@contextlib.contextmanager
def checkout(revision: str | None, folder: Path) -> Iterator[Path]:
    """A temporary worktree of a revision; for None, the working tree."""
    if revision is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*git, "add", "--detach", str(folder), revision], capture_output=True, text=True)
    if added.returncode:
        raise SystemExit(f"error: {revision}: {added.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


class Revision:
    """Runs commands of one source tree in a folder of its own."""

    def __init__(self, name: str, tree: Path, work: Path) -> None:
        self.name, self.tree, self.work = name, tree, work
        work.mkdir()
        cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = os.environ | cache | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.environment.pop("XLA_FLAGS", None)

    def run(self, *words: str) -> str:
        print(f"{self.name}: python {' '.join(words)}", file=sys.stderr, flush=True)
        ended = subprocess.run(
            [sys.executable, *words], cwd=self.work, env=self.environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"error: {self.name}: {' '.join(words)} exited with {ended.returncode}:\n{ended.stderr}")
        return ended.stdout

    def run_all(self) -> None:
        file = self.run("-c", "import tli_jax; print(tli_jax.__file__)").strip()
        assert Path(file).is_relative_to(self.tree), f"{file} was imported instead of the package in {self.tree}"
        self.run("-m", "tli_jax.upscale", "--config", str(self.tree / "configs" / "demo.yaml"), "--output", "grown")
        self.train("float32", "--dtypes", "compute=float32", "--steps", str(STEPS))
        # The learning rate of a constant schedule does not depend on the number of steps.
        bfloat16 = ["--dtypes", "compute=bfloat16", "--schedule", "constant"]
        self.train("bfloat16", *bfloat16, "--steps", str(STEPS))
        self.train("resumed", *bfloat16, "--steps", str(STEPS // 2))
        self.train("resumed", *bfloat16, "--steps", str(STEPS))
        self.run(
            *("-m", "tli_jax.compare", "--model", "embedded", "--methods", "tli:identity,tli:copy,dus,moe"),
            *("--every", "2", "--text", "embedded", "--old-text", "embedded", "--batch-size", "8"),
            *("--sequence-length", "128", "--dtypes", "compute=float32", "--validation-batches", "4"),
            *("--steps", "0", "--seeds", "1", "--no-baselines", "--output", "comparison"),
        )

    def train(self, run: str, *flags: str) -> None:
        self.run(
            *("-m", "tli_jax.train", "--model", "grown", "--text", "embedded", "--run", run),
            *("--only", "injected", "--batch-size", "4", "--sequence-length", "64", "--learning-rate", "1e-3"),
            *(self.flag("--grad-accum-steps"), "2", self.flag("--clip-norm"), "0.5"),
            *(self.flag("--validation-fraction"), "0.1", "--validation-batches", "2"),
            *("--validate-every", str(STEPS // 2), "--save-every", str(STEPS // 2)),
            *("--export", f"{run}-trained", "--overwrite", *flags),
        )

    def flag(self, name: str) -> str:
        """The name that a flag has in this revision."""
        if not hasattr(self, "help"):
            self.help = self.run("-m", "tli_jax.train", "--help")
        return next(flag for flag in (name, *FLAGS[name]) if flag in self.help)

    def results(self) -> Results:
        found = of_folder(self.work / "grown", "grown")
        for run in ("float32", "bfloat16", "resumed"):
            found |= of_run(self.work / run, run) | of_folder(self.work / f"{run}-trained", f"{run}-trained")
        for start in read(self.work / "comparison" / "results.json")["starts"]:
            name = f"comparison/results.json {start['name']}"
            found |= {f"{name} {key}": repr(start[key]) for key in ("new", "old")}
            if start["plan"]:
                found |= {f"{name} · plan row {i}": json.dumps(row) for i, row in enumerate(start["plan"]["rows"])}
        return found


# Values by name. The part of a name before " · " is a group, which the table shows in one line.


def of_folder(folder: Path, name: str) -> Results:
    """Files of a Hugging Face folder, plan rows, tensor digests and the proof."""
    patterns = ("*.safetensors*", "config.json", "*token*.json", "vocab.json", "merges.txt", "generation_config.json")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    found = {f"{name}/{file.name} sha256": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    growth = read(folder / "growth.json")
    found |= {f"{name}/growth.json · plan row {i}": json.dumps(row) for i, row in enumerate(growth["rows"])}
    for key in ("digests", "parameters", "guarantee", "injected"):
        found |= flatten(growth[key], f"{name}/growth.json · {key}")
    if growth["proof"]:
        # A slow machine proves fewer tokens, and then the other numbers are different ones.
        found |= flatten(growth["proof"], f"{name}/growth.json proof of {growth['proof']['tokens']} tokens ·")
    return found


def of_run(run: Path, name: str) -> Results:
    """Digest of the data, the metrics of each step, and the digests of the arrays in each checkpoint."""
    found = {f"{name}/run.json data digest": read(run / "run.json")["data"]}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        for key, value in metrics.items():
            if key not in MACHINE:
                found[f"{name}/metrics.jsonl step {metrics['step']} {'' if 'loss' in key else '· '}{key}"] = repr(value)
    for file in sorted((run / "checkpoints").glob("*/meta/meta.json")):
        for array, value in read(file)["content"]["arrays"].items():
            top, _, rest = array.partition(".")
            found[f"{name}/checkpoints/{file.parts[-3]} · {CURRENT.get(top, top)}.{rest}"] = json.dumps(value)
    return found


def read(file: Path) -> Any:
    return rename(json.loads(file.read_text(encoding="utf-8")))


def rename(content: Any) -> Any:
    """JSON with the current names of its keys."""
    if isinstance(content, dict):
        return {CURRENT.get(key, key): rename(value) for key, value in content.items()}
    return [rename(value) for value in content] if isinstance(content, list) else content


def flatten(content: Any, path: str) -> Results:
    """Each leaf of a JSON tree by its path. ``repr`` of a float identifies it exactly."""
    if not isinstance(content, dict | list):
        return {path: repr(content)}
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return {
        key: leaf
        for name, value in entries
        if name not in MACHINE
        for key, leaf in flatten(value, f"{path} {name}").items()
    }


def find_differences(before: Results, after: Results) -> list[str]:
    return [key for key in before | after if before.get(key) != after.get(key)]


def tabulate(before: Results, after: Results) -> Iterator[str]:
    """A line for each group or single value, and up to five differences."""
    groups: dict[str, list[str]] = {}
    for key in before | after:
        groups.setdefault(key.partition(" · ")[0], []).append(key)
    for group, keys in groups.items():
        different = [key for key in keys if before.get(key) != after.get(key)]
        value = f"{len(keys) - len(different)} of {len(keys)}" if " · " in keys[0] else before.get(group, "")[:24]
        yield f"{'DIFFERENT' if different else 'identical'}  {group}  {value}"
        for key in different[:5]:
            yield f"           {key}: {before.get(key, 'missing')} → {after.get(key, 'missing')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="git revision")
    parser.add_argument("after", metavar="AFTER", nargs="?", help="git revision (default: the working tree)")
    parser.add_argument("--work", type=Path, help="keep the outputs in this new folder")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="revisions-"))
    work = work.resolve()
    work.mkdir(exist_ok=True)
    try:
        with (
            checkout(args.before, work / "before-tree") as before_tree,
            checkout(args.after, work / "after-tree") as after_tree,
            ThreadPoolExecutor(2) as pool,
        ):
            revisions = [
                Revision("before", before_tree, work / "before"),
                Revision("after", after_tree, work / "after"),
            ]
            list(pool.map(Revision.run_all, revisions))
        before, after = (revision.results() for revision in revisions)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    print(f"{args.before} → {args.after or 'working tree'}")
    print(*tabulate(before, after), sep="\n")
    # A run that was stopped and resumed must equal the same run without a stop.
    straight, resumed = (
        {key.removeprefix(run): value for key, value in after.items() if key.startswith(f"{run}/")}
        for run in ("bfloat16", "resumed")
    )
    unlike = find_differences(straight, resumed)
    print(f"{'DIFFERENT' if unlike else 'identical'}  resumed and uninterrupted run  {len(straight)} values")
    for key in unlike[:5]:
        print(f"           {key}: {straight.get(key, 'missing')} → {resumed.get(key, 'missing')}")
    different = find_differences(before, after)
    print(f"{len(before | after) - len(different)} of {len(before | after)} values are identical")
    sys.exit(1 if different or unlike else 0)


if __name__ == "__main__":
    main()
