"""A growth: its plan and what it costs, before; its proof, after; and models side by side."""

from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from tli_jax.cli.console import printable
from tli_jax.cli.tables import show_number
from tli_jax.growth.plan import Plan, draw_layer_map
from tli_jax.hf.card import GUARANTEES
from tli_jax.hf.card import options as options_of
from tli_jax.hf.records import reading
from tli_jax.reporting.records import Trained


def print_plan(screen: rich.console.Console, plan: Plan, description: Mapping[str, Any]) -> None:
    """The layer map and a table of what growth costs."""
    options = printable(", ".join(f"{key} {value}" for key, value in options_of(plan).items()))
    method, layers = printable(plan.method), f"{plan.base_layers} → {len(plan)} layers"
    screen.print(rich.text.Text.assemble((method, "bold"), f" ({options}): {layers}"))
    screen.print("layers of the grown model; 3 is base layer 3 kept, [3·0] injected, made of 3, residual outputs × 0:")
    for line in draw_layer_map(plan).splitlines():
        screen.print(f"  {line}", soft_wrap=True)
    table = rich.table.Table(box=rich.box.SIMPLE)
    for heading in ("", "before", "after", "×"):
        table.add_column(heading, justify="right" if heading else "left")
    labels = {
        "layers": "layers",
        "parameters": "parameters",
        "active_parameters": "parameters that a token goes through",
        "bytes": "bytes of weights",
        "kv_cache_bytes_per_token": "KV cache, bytes a token",
        "flops_per_token": f"forward FLOPs a token (at {description['context']:,} tokens)",
    }
    for key, label in labels.items():
        before, after = description["before"][key], description["after"][key]
        if key == "active_parameters" and (before, after) == tuple(
            description[when]["parameters"] for when in ("before", "after")
        ):
            continue
        table.add_row(label, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.3f}")
    screen.print(table)
    screen.print(f"guarantee: {GUARANTEES[plan.guarantee]}")
    for note in plan.notes:
        screen.print(f"note: {note}")
    weights = [name for name in description["writes"] if name.endswith(".safetensors")]
    others = [name for name in description["writes"] if name not in weights]
    shards = weights[0] if len(weights) == 1 else f"{weights[0]} … {weights[-1]}"
    screen.print(f"writes {sum(description['writes'].values()):,} bytes: {', '.join([shards, *others])}")


def print_proof(screen: rich.console.Console, proof: Mapping[str, Any]) -> None:
    """What the proof found, and for inexact growth what each injected layer does."""
    screen.print(
        f"proof on {proof['tokens']:,} tokens of {printable(proof['text'])}, {proof['dtype']} on {proof['device']},"
        f" {proof['seconds']:.1f} s"
    )
    screen.print(
        f"  max |Δlogit| {show_number(proof['max_abs_logit_difference'], 'g')}"
        f"   KL {show_number(proof['kl'], '.3g')} nats"
        f"   loss {show_number(proof['loss_base'])} → {show_number(proof['loss_grown'])}"
        f"   same top-1 {100 * proof['top1']:.2f} %"
    )
    if proof["parted_at"] is None:
        screen.print("  hidden states are bit-equal after every layer")
        return
    screen.print(f"  hidden states part after layer {proof['parted_at']} of the grown model")
    if not proof["changes"]:
        return
    table = rich.table.Table("injected layer", "relative change of the hidden state", "cosine", box=rich.box.SIMPLE)
    for change in proof["changes"]:
        table.add_row(str(change["layer"]), show_number(change["relative_change"]), show_number(change["cosine"]))
    screen.print(table)


def compare_records(records: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """A table of grown models that were not trained since, one row each, from their ``growth.json``.

    Raises:
        DataError: a record is damaged.
    """
    table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0), title="grown models", title_justify="left")
    for heading in ("folder", "method", "layers", "parameters", "guarantee"):
        table.add_column(heading, no_wrap=True)
    for heading in ("base loss", "grown loss", "Δ loss", "KL", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for folder, record in records.items():
        with reading(f"{folder}: growth.json"):
            plan, proof = Plan.from_json(record, f"{folder}: growth.json"), record["proof"]
            numbers = ("not proved", "", "", "", "")
            if proof is not None:
                base, grown = proof["loss_base"], proof["loss_grown"]
                numbers = (
                    show_number(base),
                    show_number(grown),
                    show_number(None if base is None or grown is None else grown - base, "+.4f"),
                    show_number(proof["kl"]),
                    f"{100 * proof['top1']:.1f} %",
                )
            parameters = f"{record['parameters']:,}" if "parameters" in record else "–"
            table.add_row(folder, method(plan), layers(plan), parameters, plan.guarantee, *numbers)
    return table


def compare_trained(models: Mapping[str, Trained]) -> rich.table.Table:
    """A table of models that were trained, grown before or not, one row each.

    Raises:
        DataError: a record is damaged.
    """
    table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0), title="trained models", title_justify="left")
    for heading in ("folder", "method", "layers", "proof, before training", "trained"):
        table.add_column(heading, no_wrap=True)
    for heading in ("steps", "tokens", "loss", "validation before", "after"):
        table.add_column(heading, justify="right", no_wrap=True)
    for folder, (facts, growth) in models.items():
        runs = [*facts["earlier"], facts]
        trained = (
            printable(facts["only"]),
            " + ".join(f"{one['step']:,}" for one in runs),
            " + ".join(f"{one['tokens']:,}" for one in runs),
            *(show_number(facts["losses"][key]) for key in ("training", "validation_before", "validation_after")),
        )
        grown = ("–", "–", "–")
        if growth is not None:
            with reading(f"{folder}: growth.json"):
                plan, proof = Plan.from_json(growth, f"{folder}: growth.json"), growth.get("proof_before_training")
                proved = "not proved" if proof is None else f"KL {show_number(proof['kl'])}"
                grown = (method(plan), layers(plan), f"{plan.guarantee}, {proved}")
        table.add_row(folder, *grown, *trained)
    return table


def method(plan: Plan) -> str:
    """A plan's method, and the initialiser where it has one."""
    init = plan.options.get("init")
    return plan.method + (f" {init}" if init else "")


def layers(plan: Plan) -> str:
    """Of the base and of the grown model."""
    return f"{plan.base_layers} → {len(plan)}"
