"""Compiles every shipped configuration for TPU slices, on a machine without TPUs, and tabulates what fits.

    python benchmarks/scaling.py                      # all rows: an hour and a half on 2 cores
    python benchmarks/scaling.py --match v5e-8        # rows whose flags contain this text
    python benchmarks/scaling.py --table              # print the table of the stored results
    python benchmarks/scaling.py --gpus               # memory of H100s on paper: nothing compiles, seconds

Compiling needs the extra ``tpu``. Each row is one call of ``python -m tli_jax.preflight`` in a process of its own.
Results are stored in benchmarks/results/scaling.json after each row; stored rows are skipped unless ``--again`` is set.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
INJECTED, ALL = [], ["--train.only", "all"]
_BATCH, _MESH = "--train.batch-size", "--train.mesh"
# A layer of 405B takes 6 GiB in bfloat16, and FSDP gathers two layers per chip. Tensor parallelism keeps them sharded.
TENSOR = [_MESH, "data=2,fsdp=32,tensor=8", "--train.sequence-length", "2048"]
# Configuration, slice, number of slices, additional flags.
ROWS: list[tuple[str, str, int, list[str]]] = [
    ("llama3.2-1b-tli", "v5e-4", 1, INJECTED),
    ("llama3.2-1b-tli", "v5e-4", 1, ALL),
    ("llama3.2-3b-tli", "v5e-8", 1, INJECTED),
    ("llama3.2-3b-tli", "v5e-16", 1, ALL),
    ("llama3.1-8b-tli", "v5e-4", 1, ["--train.sequence-length", "2048"]),
    ("llama3.1-8b-tli", "v5e-8", 1, INJECTED),
    ("llama3.1-8b-tli", "v5e-8", 1, ALL),
    ("llama3.1-8b-tli", "v5e-16", 1, ALL),
    ("llama3.1-8b-tli", "v5e-16", 1, [*ALL, _BATCH, "16"]),
    *(
        ("llama3.1-8b-tli", slice_, 1, flags)
        for slice_ in ("v5e-256", "v5p-16", "v5p-64", "v5p-256", "v6e-64", "v6e-256")
        for flags in (INJECTED, ALL)
    ),
    ("llama3.1-8b-dus", "v5e-16", 1, INJECTED),
    ("llama3.1-8b-dus", "v5p-64", 1, ALL),
    ("llama3.1-8b-llama-pro", "v5e-8", 1, INJECTED),
    ("llama3.1-8b-llama-pro", "v5p-64", 1, ALL),
    *(("llama3.1-70b-tli", slice_, 1, flags) for slice_ in ("v5p-256", "v6e-256") for flags in (INJECTED, ALL)),
    ("llama3.1-405b-tli", "v5p-1024", 1, INJECTED),
    ("llama3.1-405b-tli", "v5p-1024", 1, ALL),
    ("llama3.1-405b-tli", "v6e-256", 2, TENSOR),
    ("llama3.1-405b-tli", "v6e-256", 2, ALL),
]

NODES = (1, 2, 4, 8, 16, 32, 64)
# Configuration and its batch size, for GPUs.
GPU_ROWS = {"llama3.1-8b-tli": 256, "llama3.1-70b-tli": 512, "llama3.1-405b-tli": 512}


def flags_of(config: str, slice_: str, slices: int, flags: list[str]) -> list[str]:
    several = ["--slices", str(slices)] if slices > 1 else []
    return ["--config", f"configs/{config}.yaml", "--topology", slice_, *several, *flags]


def run(arguments: list[str]) -> dict[str, Any]:
    """Run one preflight and return the memory of its train step."""
    call = [sys.executable, "-m", "tli_jax.preflight", *arguments, "--json"]
    done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(f"{' '.join(call)} ended with {done.returncode}")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    step, mesh = checks["step compiles"], checks["mesh"]
    if "limit" not in step:
        sys.exit(f"{' '.join(call)}: {step['text']}")
    return {
        "command": " ".join(["python -m tli_jax.preflight", *arguments]),
        "step": {key: value for key, value in step.items() if key not in ("name", "status")},
        "growth_peak": checks["growth compiles"].get("peak"),
        "mesh": mesh["mesh"],
        "sequence_length": mesh["sequence_length"],
        "parameters": checks["growth"]["parameters"],
        "versions": checks["processes"]["versions"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table in the order of ``ROWS``."""

    def gib(nbytes: float) -> str:
        return f"{nbytes / 2**30:.1f}"

    lines = ["| configuration | B parameters | slice | trains | tokens | | peak, GiB | on paper | Δ | compiled in |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for config, slice_, slices, flags in ROWS:
        row = rows.get(" ".join(flags_of(config, slice_, slices, flags)))
        if row is None:
            continue
        step, paper = row["step"], row["step"]["on_paper"]["peak"]
        where = f"{slices} × {slice_}" if slices > 1 else slice_
        trains = "all" if "all" in flags else "injected"
        trains += f", batch of {flags[flags.index(_BATCH) + 1]}" if _BATCH in flags else ""
        trains += f", {flags[flags.index(_MESH) + 1]}" if _MESH in flags else ""
        peak = f"{gib(step['peak'])} of {gib(step['limit'])}"
        delta = f"{paper / step['peak'] - 1:+.0%}" if step["fits"] else ""
        lines.append(
            f"| {config} | {row['parameters'] / 1e9:.2f} | {where} | {trains}"
            f" | {row['sequence_length']:,} | {'compiles' if step['fits'] else '**does not fit**'}"
            f" | {peak if step['fits'] else '≥ ' + peak} | {gib(paper)} | {delta} | {step['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def gpu_table() -> str:
    """A Markdown table of estimated memory per GPU, for every size and number of nodes."""
    from tli_jax.checks import compilation, files, setup
    from tli_jax.checks.context import Context, DoesNotFitError, NotCheckedError
    from tli_jax.cli.growth_config import PreflightConfig
    from tli_jax.cli.parse import parse
    from tli_jax.distributed.topology import GPUS_PER_NODE
    from tli_jax.training.memory import gib

    def cell(config: str, nodes: int, flags: list[str], batch: int) -> str:
        gpus = nodes * GPUS_PER_NODE
        arguments = [*flags_of(config, f"h100-{gpus}", 1, flags), _BATCH, str(max(batch, gpus))]
        context = Context(parse(PreflightConfig, "scaling", "", arguments))
        with contextlib.suppress(NotCheckedError):  # the model is not here: its shape is in the configuration
            files.check_model(context)
        files.check_growth(context)
        setup.check_mesh(context)
        try:
            facts = compilation.check_step(context)[1]
        except DoesNotFitError as error:
            facts = error.facts
        needed = gib(facts["on_paper"]["peak"]).removesuffix(" GiB")
        return needed if facts["fits"] else f"~~{needed}~~"

    lines = [f"| configuration | trains | {' | '.join(map(str, NODES))} |", "|---|---|" + "---|" * len(NODES)]
    for config, batch in GPU_ROWS.items():
        for trains, flags in (("injected", INJECTED), ("all", ALL)):
            cells = [cell(config, nodes, flags, batch) for nodes in NODES]
            lines.append(f"| {config} | {trains} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every shipped configuration for TPU slices.")
    parser.add_argument("--match", default="", help="only rows whose flags contain this text")
    parser.add_argument("--again", action="store_true", help="repeat rows that are in the results")
    parser.add_argument("--table", action="store_true", help="print the table without compiling")
    parser.add_argument("--gpus", action="store_true", help="print the table of GPUs, which is estimated")
    options = parser.parse_args()
    if options.gpus:
        print(gpu_table())
        return
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for row in [] if options.table else ROWS:
        arguments = flags_of(*row)
        name = " ".join(arguments)
        if options.match not in name or (name in found["rows"] and not options.again):
            continue
        print(name, file=sys.stderr)
        found["rows"][name] = run(arguments)
        found["machine"] = {"cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.platform()}
        found["date"] = datetime.date.today().isoformat()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
