"""Prints the tables of docs/results.md and docs/toy_results.md from the comparisons stored in benchmarks/results.

python benchmarks/comparison.py --keep OUTPUT NAME    # store the results in OUTPUT, a folder written by tli_jax.compare
python benchmarks/comparison.py NAME                  # print the tables
python benchmarks/comparison.py NAME --claims         # print the verdicts on the paper's claims
python benchmarks/comparison.py NAME --against OTHER  # print how each contender's losses differ from those of OTHER
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tli_jax.comparison.measured import finals_by_seed
from tli_jax.comparison.paired import decide, difference
from tli_jax.comparison.statistics import judge
from tli_jax.reporting import comparison
from tli_jax.reporting.results import TRAINED, UNKNOWN, signed_with_error

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("name", "layers", "size", "flops", "initial", "change", "rate", "final", "to_rival", "old", "accuracy")
COLUMNS += ("seconds", "memory")
# One row per claim and contender would be a hundred rows: show both readings of the paper's method, and the best start.
CLAIMANTS = ("tli:identity", "tli:copy", "tli:half", "identity-measured", "half-measured", "copy-inner")


def keep(output: Path, name: str) -> None:
    """Store results without plans and proofs, which growth can reproduce, and without local paths."""
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    for start in results["starts"]:
        del start["plan"], start["proof"]
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"(?<![\w.])/[\w./-]*/([\w.-]+)", r"\1", text)
    (RESULTS / f"compare_{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    results = json.loads((RESULTS / f"compare_{name}.json").read_text(encoding="utf-8"))
    for start in results["starts"]:
        start.setdefault("tasks", {})  # comparisons before there were tasks
    return results | {"claims": judge(results, results["summary"])}  # by the statistics of today


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results: dict[str, Any]) -> str:
    """One table for each set of trainable parameters."""
    found = []
    for only in dict.fromkeys(row["only"] for row in results["summary"]):
        rows = [comparison.cells(row) for row in results["summary"] if row["only"] == only]
        keys = [key for key in COLUMNS if key in rows[0]]
        rows = [[re.sub(r"(.*) \*$", r"**\1**", row[key]) for key in keys] for row in rows]
        title = TRAINED[only].capitalize()
        found.append(f"{title}:\n\n{table([comparison.HEADINGS[key] for key in keys], rows)}")
    return "\n\n".join(found)


def claims(results: dict[str, Any]) -> str:
    rows = [
        [claim, row["tli"], row["verdict"], row["numbers"]]
        for claim, found in comparison.claims_by_kind(results).items()
        for row in found
        if row["tli"] in CLAIMANTS and row["verdict"] != UNKNOWN
    ]
    return table(["claim", "", "here", ""], rows)


def differences(results: dict[str, Any], other: str) -> str:
    """Losses after training minus those of another contender, paired by seed. The family is the table."""
    rows, found = [], []
    for only in dict.fromkeys(run["only"] for run in results["runs"]):
        names = dict.fromkeys(run["name"] for run in results["runs"] if run["only"] == only)
        for name in [name for name in names if name != other and other in names]:
            pair = [
                difference(*(finals_by_seed(results, one, only, key) for one in (name, other)))
                for key in ("loss", "old")
            ]
            rows.append((name, TRAINED[only], *pair))
            found += pair
    decide(found)
    cells = [
        [name, trained, *(f"{signed_with_error(one)}, {one['verdict']}" for one in pair)]
        for name, trained, *pair in rows
    ]
    return table(["contender", "", "final loss", "loss on old text"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--keep", type=Path, metavar="OUTPUT")
    parser.add_argument("--claims", action="store_true")
    parser.add_argument("--against", metavar="OTHER")
    options = parser.parse_args()
    if options.keep:
        keep(options.keep, options.name)
        return
    results = read(options.name)
    if options.against:
        print(differences(results, options.against))
    else:
        print((claims if options.claims else tables)(results))


if __name__ == "__main__":
    main()
