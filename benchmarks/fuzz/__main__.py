"""Feeds damaged inputs to the commands and checks how each of them ends.

    python benchmarks/fuzz [TARGET ...] [--seconds 600] [--seed 0] [--jobs 1]
    python benchmarks/fuzz headers --seed 0 --trial 1234    # repeat one trial and print its output

Targets: headers, config, growth, yaml, tokenizer, text, tasks, run. A trial changes a copy of valid inputs in a few
places (``mutate.py``) and runs a command on it (``targets.py``). The command must

- end within 30 s (longer on a busy machine) and 1 GB, with a documented exit code other than 70, and not by a signal;
- print no traceback and no control characters; after a failure, exactly one line starting with "error:", as the last;
- leave a complete output after 0 and none otherwise, no temporary files, and strictly valid JSON;
- after damage to a run directory, refuse to resume or end with the same weights, bit for bit.

Every trial runs in a process forked from one that has already imported the package, so a trial costs only the work of
the command. A trial depends only on the seed, the target and its number. Each failure is printed in one line and kept
in ``--failures``: the folder of the trial with its output and ``failure.json``; at most three of each kind. Exits with
1 if anything failed. ``--write`` updates ``benchmarks/results/fuzz.json``.
"""

import argparse
import atexit
import contextlib
import filecmp
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

# Before numpy and jax are imported: a process that forks must have no threads.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}

import targets

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, machine, versions, write_result

ALLOWED = {0, 2, 65, 66, 69, 73, 74, 75, 76}
SECONDS, MEMORY, FILE = 30, 2**30, 2**28
STORED = RESULTS / "fuzz.json"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run(call: targets.Call, folder: Path) -> tuple[str, float, int, int]:
    """Run a command in a child process; return the failure (or ""), seconds, peak bytes and the exit code."""
    (folder / "tmp").mkdir(exist_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(call, folder)
    code, peak, wrong = None, 0, ""
    while code is None:
        time.sleep(0.002 if time.monotonic() - started < 0.5 else 0.02)
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            code, peak = os.waitstatus_to_exitcode(status), max(peak, usage.ru_maxrss * 1024)
            break
        peak = max(peak, _resident(child))
        busy = min(3, max(1, os.getloadavg()[0] / (os.cpu_count() or 1)))
        if (took := time.monotonic() - started) > SECONDS * busy:
            wrong = f"hang of {took:.0f} s"
        elif peak > MEMORY:
            wrong = f"memory {peak / 1e6:,.0f} MB"
        if wrong:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -9
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not wrong and peak > MEMORY:
        wrong = f"memory {peak / 1e6:,.0f} MB"
    return wrong or check(call, code, folder), time.monotonic() - started, peak, code


def _become(call: targets.Call, folder: Path) -> None:
    """Run the command in this process and exit, after joining threads and running exit handlers.

    Skips the interpreter's teardown of modules, which would take longer than the command.
    """
    os.setpgid(0, 0)
    os.chdir(folder)
    # Fuzzed sizes must not fill the disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    for number, name in enumerate((os.devnull, "out", "err")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o600), number)
    tempfile.tempdir = str(folder / "tmp")
    from tli_jax.cli.frame import run_command
    from tli_jax.distributed import processes

    code: Any = 1
    try:
        processes.leave(run_command(importlib.import_module(f"tli_jax.{call.module}").main, call.arguments))
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def check(call: targets.Call, code: int, folder: Path) -> str:
    """Return how a command violates the rules, or ""."""
    out, err = ((folder / name).read_bytes().decode("utf-8", "surrogateescape") for name in ("out", "err"))
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    if code not in ALLOWED:
        return f"exit {code}"
    if "Traceback" in err or "Traceback" in out:
        return "traceback"
    if found := _CONTROL.search(err) or _CONTROL.search(out):
        return f"control character {found[0]!a}"
    if len(errors) != (code != 0) or (code and not lines[-1].startswith("error:")):
        return "not exactly one error line, as the last"
    if left := [path.name for path in (folder / "tmp").iterdir()]:
        return f"left in TMPDIR: {left[0]}"
    if code == 0 and "--json" in call.arguments and not _is_strict(out):
        return "stdout is not JSON"
    if call.output is None:
        return ""
    output = folder / call.output
    if code and output.parent.exists() and (left := sorted(path.name for path in output.parent.iterdir())):
        return f"left after a failure: {left[0]!a}"
    if code == 0:
        if not (output / targets.SINGLE).is_file() and not (output / targets.INDEX).is_file():
            return "exit 0 without output"
        # Only files that we write: copied files may contain other dialects of JSON.
        for name in ("config.json", "growth.json", "training.json"):
            if (output / name).is_file() and not _is_strict((output / name).read_text()):
                return f"{name} is not JSON"
        if call.same and not filecmp.cmp(output / targets.SINGLE, folder / call.same / targets.SINGLE, shallow=False):
            return "different weights"
    return ""


def _is_strict(text: str) -> bool:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def fuzz(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the trials of a target until the time or number is reached; return counts."""
    target, good, trial = targets.TARGETS[name], work / name / "good", work / name / "trial"
    good.mkdir(parents=True)
    for module in target.modules:
        importlib.import_module(module)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process that forks must have no threads"
    gc.freeze()
    if (child := os.fork()) == 0:  # preparing may start JAX, and so threads
        os.dup2(os.open(work / name / "log", os.O_WRONLY | os.O_CREAT, 0o600), 1)
        os.dup2(1, 2)
        target.prepare(good)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{name}: preparing the valid inputs failed:\n{(work / name / 'log').read_text()[-2000:]}")
    started, number, codes, seen = time.monotonic(), args.trial or 0, Counter[str](), Counter[str]()
    slowest, peak = 0.0, 0
    while True:
        _remove(trial)
        shutil.copytree(good, trial)
        calls = target.trial(random.Random(f"{args.seed} {name} {number}"), trial)
        for call in calls:
            wrong, seconds, used, code = run(call, trial)
            codes[str(code)] += 1
            slowest, peak = max(slowest, seconds), max(peak, used)
            if args.trial is not None:
                print(call.module, *map(ascii, call.arguments), f"→ {code}, {seconds:.1f} s, {used / 1e6:.0f} MB")
                print(ascii((trial / "err").read_bytes()[-2000:].decode("utf-8", "replace")).replace("\\n", "\n"))
            if wrong:
                _keep(args, name, number, call, wrong, code, seconds, trial, seen)
                break
        number += 1
        is_over = time.monotonic() - started > args.seconds if args.trials is None else number >= args.trials
        if is_over or args.trial is not None:
            break
    _remove(trial)
    took = time.monotonic() - started
    found = {"trials": number - (args.trial or 0), "seconds": round(took, 1), "exit_codes": dict(sorted(codes.items()))}
    found |= {"slowest_seconds": round(slowest, 1), "peak_mb": round(peak / 1e6), "failures": dict(seen)}
    print(f"{name}: {found['trials']:,} trials in {took:.0f} s, {seen.total()} failed; slowest {slowest:.1f} s,"
          f" peak {found['peak_mb']} MB; exit codes {found['exit_codes']}", flush=True)  # fmt: skip
    return found


def _keep(args: Any, name: str, number: int, call: Any, wrong: str, code: int, seconds: float, trial: Path, seen: Any):
    err = (trial / "err").read_bytes().decode("utf-8", "replace")
    last = (err.splitlines() or [""])[-1]
    kind = f"{wrong}: {call.module}: " + re.sub(r"\d+|'[^']*'|\"[^\"]*\"|(?<=\()[^()]*", "…", last)[:90]
    seen[kind] += 1
    if seen[kind] > 3:
        return
    folder = Path(args.failures).resolve() / f"{name}-{args.seed}-{number}"
    print(f"{name} {number}: {wrong}: {last[:200]!a} ({folder})", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove(folder)
    shutil.move(trial, folder)
    facts = {"target": name, "seed": args.seed, "trial": number, "command": call.module, "arguments": call.arguments}
    facts |= {"wrong": wrong, "exit_code": code, "seconds": round(seconds, 1), "stderr": err[-4000:]}
    (folder / "failure.json").write_text(json.dumps(facts, indent=1))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=600, help="time for each target")
    parser.add_argument("--trials", type=int, help="number of trials for each target, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="run only this trial")
    parser.add_argument("--jobs", type=int, default=1, help="targets to run in parallel")
    parser.add_argument("--failures", default="out/fuzz", help="folder for failed trials")
    parser.add_argument("--write", action="store_true", help="update benchmarks/results/fuzz.json")
    parser.add_argument("--table", action="store_true", help="print that file as a table, without running anything")
    args = parser.parse_args()
    if args.table:
        print(_table(json.loads(STORED.read_text(encoding="utf-8"))))
        return
    names = args.targets or list(targets.TARGETS)
    if unknown := set(names) - targets.TARGETS.keys():
        parser.error(f"unknown target {', '.join(sorted(unknown))}: choose from {', '.join(targets.TARGETS)}")
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    running: dict[int, str] = {}
    waiting, codes = list(names), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            if (child := os.fork()) == 0:
                found = fuzz(name, args, work)
                (work / f"{name}.json").write_text(json.dumps(found))
                sys.stdout.flush()
                os._exit(1 if found["failures"] else 0)
            running[child] = name
        child, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        del running[child]
    if args.write:
        _write({name: json.loads((work / f"{name}.json").read_text()) for name in names}, args)
    shutil.rmtree(work)
    sys.exit(1 if any(codes) else 0)


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    # Targets that were not run keep their stored results.
    stored = json.loads(STORED.read_text(encoding="utf-8"))["targets"] if STORED.is_file() else {}
    result = {
        "machine": machine(),
        "versions": versions("tli_jax", "jax", "numpy", "pydantic", "tokenizers", "pyarrow", "orbax-checkpoint"),
        "limits": {"seconds": SECONDS, "bytes": MEMORY},
        "targets": stored | {name: counts | {"seed": args.seed} for name, counts in found.items()},
    }
    write_result("fuzz", result)


def _table(result: dict[str, Any]) -> str:
    lines = ["| target | trials | failures | exit codes | slowest | peak memory |", "|---|---|---|---|---|---|"]
    for name, found in result["targets"].items():
        codes = ", ".join(f"{code}: {count:,}" for code, count in found["exit_codes"].items())
        cells = (f"`{name}`", f"{found['trials']:,}", f"{sum(found['failures'].values())}", codes)
        lines.append(f"| {' | '.join(cells)} | {found['slowest_seconds']:.1f} s | {found['peak_mb']:,} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
