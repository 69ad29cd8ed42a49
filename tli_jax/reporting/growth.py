"""Grown and trained models: the plan and its cost, the proof, and models side by side."""

from collections.abc import Mapping
from typing import Any

import rich.console
import rich.text
from rich.filesize import decimal

from tli_jax.cli.console import printable
from tli_jax.cli.tables import Table, make_columns, show_number
from tli_jax.growth.plan import Plan, draw_layer_map
from tli_jax.hf.card import GUARANTEES
from tli_jax.hf.card import options as options_of
from tli_jax.hf.records import reading
from tli_jax.reporting.records import Trained


def print_plan(screen: rich.console.Console, plan: Plan, description: Mapping[str, Any]) -> None:
    """The layer map, and what the growth costs in size, memory and compute."""
    options = printable(", ".join(f"{key} {value}" for key, value in options_of(plan).items()))
    layers = f"{plan.base_layers} → {len(plan)} layers"
    screen.print(rich.text.Text.assemble((printable(plan.method), "bold"), f" ({options}): {layers}"), soft_wrap=True)
    screen.print(
        "layer map: 3 is base layer 3, kept; [3·0] is injected: a copy of layer 3 with its residual outputs × 0",
        soft_wrap=True,
    )
    for line in draw_layer_map(plan).splitlines():
        screen.print(f"  {line}", soft_wrap=True)
    before, after = description["before"], description["after"]
    labels = {
        "layers": "layers",
        "parameters": "parameters",
        "active_parameters": "active parameters per token",
        "bytes": "bytes of weights",
        "kv_cache_bytes_per_token": "KV cache, bytes per token",
        "flops_per_token": f"forward FLOPs per token (context {description['context']:,})",
    }
    if all(sizes["active_parameters"] == sizes["parameters"] for sizes in (before, after)):
        del labels["active_parameters"]
    columns = make_columns({"": 0}, {"before": 0, "after": 0, "×": 0})
    rows = [
        [label, f"{before[key]:,.0f}", f"{after[key]:,.0f}", f"{after[key] / before[key]:.3f}"]
        for key, label in labels.items()
    ]
    Table(columns, rows).render(screen)
    screen.print(f"guarantee: {GUARANTEES[plan.guarantee]}", soft_wrap=True)
    for note in plan.notes:
        screen.print(f"note: {note}", soft_wrap=True)
    weights = [name for name in description["writes"] if name.endswith(".safetensors")]
    others = [name for name in description["writes"] if name not in weights]
    shards = weights[0] if len(weights) == 1 else f"{weights[0]} … {weights[-1]}"
    total = sum(description["writes"].values())
    screen.print(f"files, about {decimal(total)}: {', '.join([shards, *others])}", soft_wrap=True)


def print_proof(screen: rich.console.Console, proof: Mapping[str, Any]) -> None:
    """How far the grown model differs from the base, and for inexact growth how much each injected layer changes."""
    screen.print(
        f"proof on {proof['tokens']:,} tokens of {printable(proof['text'])}, {proof['dtype']} on {proof['device']},"
        f" {proof['seconds']:.1f} s",
        soft_wrap=True,
    )
    screen.print(
        f"  max |Δlogit| {show_number(proof['max_abs_logit_difference'], 'g')}"
        f"   KL {show_number(proof['kl'], '.3g')} nats"
        f"   loss {show_number(proof['loss_base'])} → {show_number(proof['loss_grown'])}"
        f"   same top-1 {_percent(proof['top1'], 2)}",
        soft_wrap=True,
    )
    if proof["parted_at"] is None:
        screen.print("  hidden states are equal after every layer, bit for bit")
        return
    screen.print(f"  hidden states differ from layer {proof['parted_at']} of the grown model on")
    if proof["changes"]:
        columns = make_columns({}, {"injected layer": 0, "relative change of the hidden state": 0, "cosine": 0})
        rows = [
            [str(change["layer"]), show_number(change["relative_change"]), show_number(change["cosine"])]
            for change in proof["changes"]
        ]
        Table(columns, rows).render(screen)


def summarise_grown(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a grown model that has not been trained since.

    Raises:
        DataError: its ``growth.json`` is damaged.
    """
    with reading(f"{name}: growth.json"):
        proof = record["proof"]
        facts = {**_summarise_plan(name, record), "parameters": record.get("parameters"), "proof": proof}
        if proof is not None:
            base, grown = proof["loss_base"], proof["loss_grown"]
            facts["loss_change"] = None if base is None or grown is None else grown - base
        return facts


def summarise_trained(name: str, model: Trained) -> dict[str, Any]:
    """The facts of a trained model, which may have been grown before.

    Raises:
        DataError: its ``growth.json`` is damaged.
    """
    facts, growth = model
    trainings = [*facts["earlier"], facts]
    summary = {
        "trained_layers": facts["only"],
        "steps": [training["step"] for training in trainings],
        "tokens": [training["tokens"] for training in trainings],
        "losses": facts["losses"],
        "growth": None,
    }
    if growth is not None:
        with reading(f"{name}: growth.json"):
            summary["growth"] = _summarise_plan(name, growth)
            summary["growth"]["proof_before_training"] = growth.get("proof_before_training")
    return summary


def _summarise_plan(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    plan = Plan.from_json(record, f"{name}: growth.json")
    return {
        "method": plan.method,
        "init": plan.options.get("init"),
        "base_layers": plan.base_layers,
        "layers": len(plan),
        "guarantee": plan.guarantee,
    }


def make_grown_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per grown model."""
    columns = make_columns(
        {"folder": 0, "method": 0, "layers": 0, "guarantee": 1},
        {"parameters": 2, "base loss": 3, "grown loss": 3, "Δ loss": 0, "KL": 1, "same top-1": 4},
    )
    rows = []
    for name, model in models.items():
        numbers, proof = ["not proved", *[""] * 4], model["proof"]
        if proof is not None:
            losses = (show_number(proof["loss_base"]), show_number(proof["loss_grown"]))
            change = show_number(model["loss_change"], "+.4f")
            numbers = [*losses, change, show_number(proof["kl"]), _percent(proof["top1"], 1)]
        rows.append([name, *_growth_cells(model), model["guarantee"], show_number(model["parameters"], ","), *numbers])
    return Table(columns, rows, "grown models")


def make_trained_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per trained model."""
    columns = make_columns(
        {"folder": 0, "method": 1, "layers": 1, "proof before training": 3, "trained layers": 2},
        {"steps": 2, "tokens": 0, "loss": 3, "validation before": 0, "validation after": 0},
    )
    rows = []
    for name, model in models.items():
        growth, grown = model["growth"], ["–", "–", "–"]
        if growth is not None:
            proof = growth["proof_before_training"]
            proved = "not proved" if proof is None else f"KL {show_number(proof['kl'])}"
            grown = [*_growth_cells(growth), f"{growth['guarantee']}, {proved}"]
        amounts = [" + ".join(f"{count:,}" for count in model[key]) for key in ("steps", "tokens")]
        losses = [show_number(model["losses"][key]) for key in ("training", "validation_before", "validation_after")]
        rows.append([name, *grown, printable(model["trained_layers"]), *amounts, *losses])
    return Table(columns, rows, "trained models")


def _growth_cells(facts: Mapping[str, Any]) -> list[str]:
    init = f" {facts['init']}" if facts["init"] else ""
    return [facts["method"] + init, f"{facts['base_layers']} → {facts['layers']}"]


def _percent(fraction: float | None, digits: int) -> str:
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"
