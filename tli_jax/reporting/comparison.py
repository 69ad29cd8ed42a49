"""A comparison as text: tables for a terminal, a line for each claim, a file for a spreadsheet."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from tli_jax.reporting.results import FAILS, HOLDS, UNKNOWN, final_loss, number, plus, select

ONLY = {"all": "everything trains", "injected": "injected layers alone train"}


def _tokens(value: Mapping[str, Any] | None) -> str:
    if value is None or not 0 < value["mean"] < 500:
        return "–" if value is None else f"{value['mean'] / 1000:,.0f}k" if value["mean"] else "0"
    return "<1k"


HEADINGS = {
    "name": "contender",
    "layers": "layers",
    "parameters": "parameters",
    "size": "± size",
    "flops": "FLOPs",
    "initial": "initial loss",
    "change": "Δ base",
    "final": "final loss",
    "to_base": "to base's start",
    "to_rival": "to base's end",
    "old": "loss on old text",
    "accuracy": "right on tasks",
    "seconds": "s",
    "memory": "MB",
}
# What a heading is short for.
LEGEND = (
    "parameters: in brackets those that a token goes through; ± size: these, against the common size; FLOPs: of a"
    " token, forward, in millions; to base's start, end: tokens, in thousands, after which the loss is that of the base"
    " before, and that of the base trained likewise, seed by seed; s and MB: of a run, memory by the compiler"
)


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the summary as text, by the keys of ``HEADINGS``; without what only training gives, where there was
    none."""
    marks = {"best": " *", "alike": " ≈"}
    tail = {key: marks.get(mark, "") for key, mark in row.get("marks", {}).items()}
    old = number(row["old_before"])
    active = f" ({row['active_parameters'] / 1e6:,.2f}M)" * (row["active_parameters"] != row["parameters"])
    found = {
        "name": row["name"],
        "layers": str(row["layers"]),
        "parameters": f"{row['parameters'] / 1e6:,.2f}M{active}",
        "size": f"{row['size_difference']:+.1%}" if round(row["size_difference"], 3) else "=",
        "flops": f"{row['forward_flops_per_token'] / 1e6:,.2f}M",
        "initial": number(row["initial"]) + tail.get("initial", ""),
        "change": "–" if row["change"] is None else plus(row["change"]),
    }
    before, after = (share(row.get(f"accuracy_{when}")) for when in ("before", "after"))
    has_tasks = row.get("accuracy_before") is not None
    if row["only"] is None:
        return found | {"old": old} | ({"accuracy": before} if has_tasks else {})
    final = "diverged" if row["final"] is None else number(row["final"]) + tail.get("final", "")
    return found | {
        "final": final,
        "to_base": _tokens(row["to_base"]),
        "to_rival": _tokens(row["to_rival"]),
        "old": "–" if row["old_after"] is None else f"{old} → {number(row['old_after'])}{tail.get('old_after', '')}",
        **({"accuracy": f"{before} → {after}{tail.get('accuracy_after', '')}"} if has_tasks else {}),
        "seconds": "–" if row["seconds"] is None else f"{row['seconds']:,.0f}",
        "memory": "–" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f}",
    }


def share(value: Mapping[str, Any] | None) -> str:
    """A mean, and its spread, in percent."""
    return "–" if value is None else number({k: None if v is None else 100 * v for k, v in value.items()}, 1) + " %"


def tabulate(results: Mapping[str, Any]) -> rich.console.Group:
    """The summary for a terminal, a table for each kind of run; no more columns than fit, the rest is in the report."""
    tables = []
    for only in dict.fromkeys(row["only"] for row in results["summary"]):
        title = "before any training" if only is None else ONLY[only]
        table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
        keys = ["name", "layers", "size", "initial", "change", *(["final", "to_rival"] if only else [])]
        keys += ["accuracy"] if results["config"]["tasks"] else []
        for heading in [*(HEADINGS[key] for key in keys), "Δ old text"]:
            table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
        for row in results["summary"]:
            if row["only"] == only:
                text, old = cells(row), row["old_after"] if only else row["old_before"]
                forgot = "–" if old is None else plus(old["mean"] - results["base"]["old"])
                table.add_row(*(text[key] for key in keys), forgot)
        tables.append(table)
    return rich.console.Group(*tables)


def claims_by_kind(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The claims, of all contenders together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for claim in results["claims"]:
        kind = f", {ONLY[claim['only']]}" if claim["only"] else ""
        found.setdefault(claim["claim"] + kind, []).append(claim)
    return found


def describe(results: Mapping[str, Any]) -> list[str]:
    """What stands below the table: its signs, the claims, who was left out."""
    lines = ["* lowest, ≈ not to be told from it by these seeds; losses in nats a token, ± over seeds"]
    for claim, rows in claims_by_kind(results).items():
        said = {
            verdict: [row["tli"] for row in rows if row["verdict"] == verdict] for verdict in (HOLDS, FAILS, UNKNOWN)
        }
        lines.append(f"{claim}: " + "; ".join(f"{v}: {', '.join(names)}" for v, names in said.items() if names))
    lines += [f"{name} is left out: {why}" for name, why in results["left_out"].items()]
    return [*lines, f"written to {results['config']['output']}: results.json, results.csv, report.html and pictures"]


def write_csv(results: Mapping[str, Any], file: Path) -> None:
    """A row a run, or before any training a row a model."""
    sizes = ("layers", "parameters", "active_parameters", "forward_flops_per_token")
    measured = ("seconds", "memory", "trained_parameters", "flops_per_token")
    starts = {(start["name"], start["seed"]): start for start in results["starts"]}
    rows = []
    for run in results["runs"] or [{**s, "only": None} for s in results["starts"]]:
        start = starts.get((run["name"], run["seed"])) or select(results["starts"], name=run["name"])[0]
        row = {"name": run["name"], "only": run["only"], "seed": run["seed"], **{key: start[key] for key in sizes}}
        row |= {"initial_loss": start["new"], "old_loss_before": start["old"], "accuracy_before": start["accuracy"]}
        if run["only"] is not None:
            is_done = not run["diverged"]
            row |= {
                "final_loss": final_loss(run) if is_done else None,
                "old_loss_after": run["old"] if is_done else None,
                "accuracy_after": run["accuracy"] if is_done else None,
            }
            row |= {key: run[key] if is_done else None for key in measured}
        rows.append(row)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
