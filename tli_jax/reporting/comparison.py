"""A comparison as text: tables for the terminal, the verdict on each claim, and a CSV file."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tli_jax.cli.console import printable
from tli_jax.cli.tables import Column, Table
from tli_jax.reporting.results import (
    FAILS,
    HOLDS,
    TRAINED,
    UNDECIDED,
    UNKNOWN,
    by_only,
    final_loss,
    mean_and_spread,
    signed,
    start_of,
)

HEADINGS = {
    "name": "contender",
    "final": "final loss",
    "rate": "learning rate",
    "initial": "initial loss",
    "change": "Δ base",
    "to_rival": "tokens to base's final loss",
    "to_base": "tokens to base's initial loss",
    "old": "loss on old text",
    "accuracy": "task accuracy",
    "layers": "layers",
    "parameters": "parameters",
    "size": "± size",
    "flops": "FLOPs per token",
    "seconds": "seconds",
    "memory": "memory, MB",
}
LEGEND = (
    "± is the standard deviation over seeds, and losses are in nats per token",
    "parameters: total, and in brackets the active ones per token; ± size: active parameters against the common size",
    "FLOPs per token: of the forward pass; Δ base: initial loss minus the base's",
    "tokens to base's loss: training tokens until the loss equals that of the untrained base (initial) or of the base"
    " trained in the same way (final), seed by seed",
    "seconds and memory: per run; memory is the compiler's figure for the train step",
)
# The columns of a terminal, and the order in which a narrow one drops them: the highest number first.
_PRIORITIES = {
    "name": 0,
    "layers": 4,
    "size": 5,
    "initial": 1,
    "change": 3,
    "final": 0,
    "to_rival": 3,
    "accuracy": 2,
    "rate": 4,
}


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the summary as text, under the keys of ``HEADINGS``. Rows without training lack the keys of a run."""
    marks = {"best": " *", "alike": " ≈"}
    mark = {key: marks.get(mark, "") for key, mark in row.get("marks", {}).items()}
    old = mean_and_spread(row["old_before"])
    active = f" ({row['active_parameters'] / 1e6:,.2f}M)" * (row["active_parameters"] != row["parameters"])
    text = {
        "name": printable(row["name"]),
        "layers": str(row["layers"]),
        "parameters": f"{row['parameters'] / 1e6:,.2f}M{active}",
        "size": f"{row['size_difference']:+.1%}" if round(row["size_difference"], 3) else "=",
        "flops": f"{row['forward_flops_per_token'] / 1e6:,.2f}M",
        "initial": mean_and_spread(row["initial"]) + mark.get("initial", ""),
        "change": "–" if row["change"] is None else signed(row["change"]),
    }
    before, after = (percent(row.get(f"accuracy_{when}")) for when in ("before", "after"))
    has_tasks = row.get("accuracy_before") is not None
    if row["only"] is None:
        return text | {"old": old} | ({"accuracy": before} if has_tasks else {})
    new = row["old_after"]
    rate = row.get("learning_rate")
    return text | {
        **({} if rate is None else {"rate": f"{rate:g}"}),
        "final": "diverged" if row["final"] is None else mean_and_spread(row["final"]) + mark.get("final", ""),
        "to_base": _thousands(row["to_base"]),
        "to_rival": _thousands(row["to_rival"]),
        "old": "–" if new is None else f"{old} → {mean_and_spread(new)}{mark.get('old_after', '')}",
        **({"accuracy": f"{before} → {after}{mark.get('accuracy_after', '')}"} if has_tasks else {}),
        "seconds": "–" if row["seconds"] is None else f"{row['seconds']:,.0f}",
        "memory": "–" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f}",
    }


def _thousands(tokens: Mapping[str, Any] | None) -> str:
    if tokens is None:
        return "–"
    if 0 < tokens["mean"] < 500:
        return "<1k"
    return f"{tokens['mean'] / 1000:,.0f}k" if tokens["mean"] else "0"


def percent(value: Mapping[str, Any] | None) -> str:
    """The mean and standard deviation of a fraction, in percent."""
    if value is None:
        return "–"
    return mean_and_spread({key: None if part is None else 100 * part for key, part in value.items()}, 1) + " %"


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """The summary for a terminal, one table for each choice of trained layers."""
    tables = []
    for only, rows in by_only(results).items():
        keys = ["name", "layers", "size", "initial", "change", *(["final", "to_rival"] if only else [])]
        keys += ["rate"] if only and rows[0].get("learning_rate") is not None else []
        keys += ["accuracy"] if results["config"]["tasks"] else []
        columns = [Column(HEADINGS[key], "left" if key == "name" else "right", _PRIORITIES[key]) for key in keys]
        lines = []
        for row in rows:
            text, old = cells(row), row["old_after"] if only else row["old_before"]
            change = "–" if old is None else signed(old["mean"] - results["base"]["old"])
            lines.append([*(text[key] for key in keys), change])
        tables.append(Table([*columns, Column("Δ old text", "right", 2)], lines, TRAINED[only]))
    return tables


def claims_by_kind(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Each claim of the paper with its verdicts on all ``tli`` contenders."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for claim in results["claims"]:
        kind = f" ({TRAINED[claim['only']]})" if claim["only"] else ""
        kinds.setdefault(claim["claim"] + kind, []).append(claim)
    return kinds


def describe(results: Mapping[str, Any]) -> list[str]:
    """The lines below the tables: how to read them, the claims, and which methods were left out."""
    lines = [
        "* best of its column; ≈ indistinguishable from the best with these seeds; fewer than five seeds decide nothing"
        " that depends on a seed; losses in nats per token, ± standard deviation over seeds"
    ]
    not_measured = []
    for claim, rows in claims_by_kind(results).items():
        kinds = (HOLDS, FAILS, UNDECIDED, UNKNOWN)
        names = {kind: [row["tli"] for row in rows if row["verdict"] == kind] for kind in kinds}
        if len(names[UNKNOWN]) == len(rows):
            not_measured.append(claim)
        else:
            lines.append(f"{claim}: " + "; ".join(f"{kind}: {', '.join(some)}" for kind, some in names.items() if some))
    if not_measured:
        claims = "1 claim" if len(not_measured) == 1 else f"{len(not_measured)} claims"
        lines.append(f"not measured: {claims}, which report.html lists")
    lines += [
        f"{one['name']} ({TRAINED[one['only']]}): its learning rate, {one['rate']:g}, is at the end of the grid"
        for one in results.get("learning_rates", ())
        if one["rate"] in (one["losses"][0][0], one["losses"][-1][0])
    ]
    lines += [f"{name} was left out: {why}" for name, why in results["left_out"].items()]
    return lines


def write_csv(results: Mapping[str, Any], file: Path) -> None:
    """One row per run, or one per model if nothing was trained."""
    sizes = ("layers", "parameters", "active_parameters", "forward_flops_per_token")
    measured = ("seconds", "memory", "trained_parameters", "flops_per_token")
    rows = []
    for run in results["runs"] or [{**start, "only": None} for start in results["starts"]]:
        start = start_of(results["starts"], run["name"], run["seed"])
        row = {"name": run["name"], "only": run["only"], "seed": run["seed"], **{key: start[key] for key in sizes}}
        row["learning_rate"] = run.get("learning_rate")
        row |= {"initial_loss": start["new"], "old_loss_before": start["old"], "accuracy_before": start["accuracy"]}
        if run["only"] is not None:
            has_ended = not run["diverged"]
            row |= {
                "final_loss": final_loss(run) if has_ended else None,
                "old_loss_after": run["old"] if has_ended else None,
                "accuracy_after": run["accuracy"] if has_ended else None,
            }
            row |= {key: run[key] if has_ended else None for key in measured}
        rows.append(row)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
