"""A growth: its plan and what it costs, before; its proof, after; the card that goes with the checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from tli_jax.checkpoint.hf import Checkpoint, grown_config
from tli_jax.checkpoint.stream import Piece
from tli_jax.growth.plan import Plan, draw_layer_map
from tli_jax.models.config import LlamaConfig

PROMISES = {
    "bit": "exact: the same function as the base, bit for bit",
    "arithmetic": "exact but for rounding",
    "none": "not exact: another function than the base",
}


def describe(base: Checkpoint, plan: Plan, pieces: Sequence[Piece], files: Mapping[str, int]) -> dict[str, Any]:
    """The plan and its cost as plain data. Bytes are of tensors; FLOPs are of the forward pass, see ``LlamaConfig``."""
    grown = grown_config(base.config, plan)
    context = min(base.config.max_position_embeddings, 8192)

    def costs(config: LlamaConfig, nbytes: int) -> dict[str, Any]:
        return {
            "layers": config.num_hidden_layers,
            "parameters": config.num_params,
            "active_parameters": config.num_active_params,
            "bytes": nbytes,
            "kv_cache_bytes_per_token": config.kv_cache_bytes_per_token,
            "flops_per_token": config.flops_per_token(context),
        }

    return {
        "plan": plan.to_json(),
        "before": costs(base.config, base.nbytes),
        "after": costs(grown, sum(piece.nbytes for piece in pieces)),
        "context": context,
        "exactness": plan.exactness,
        "is_exact": plan.is_exact,
        "writes": dict(files),
    }


def _told(plan: Plan) -> dict[str, Any]:
    """The options of a plan, but for what is too long, and of its experts, but for what was not given."""
    told = {key: value for key, value in plan.options.items() if key != "importance"}
    if plan.experts is not None:
        made = {key: value for key, value in plan.experts.to_json().items() if value is not None and key != "count"}
        told |= {"experts": plan.experts.total} | made
    return told


def print_plan(screen: rich.console.Console, plan: Plan, description: Mapping[str, Any]) -> None:
    """The layer map and a table of what growth costs."""
    options = ", ".join(f"{key} {value}" for key, value in _told(plan).items())
    screen.print(f"[bold]{plan.method}[/bold] ({options}): {plan.base_layers} → {len(plan)} layers")
    screen.print(
        "layers of the grown model; 3 is base layer 3 kept, \\[3·0] injected, made of 3, residual outputs × 0:"
    )
    for line in draw_layer_map(plan).splitlines():
        screen.print(f"  {line.replace('[', chr(92) + '[')}", soft_wrap=True)
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
    screen.print(f"promise: {PROMISES[plan.exactness]}")
    for note in plan.notes:
        screen.print(f"note: {note}")
    weights = [name for name in description["writes"] if name.endswith(".safetensors")]
    others = [name for name in description["writes"] if name not in weights]
    shards = weights[0] if len(weights) == 1 else f"{weights[0]} … {weights[-1]}"
    screen.print(f"writes {sum(description['writes'].values()):,} bytes: {', '.join([shards, *others])}")


def print_proof(screen: rich.console.Console, proof: Mapping[str, Any]) -> None:
    """What the proof found, and for inexact growth what each injected layer does."""
    screen.print(
        f"proof on {proof['tokens']:,} tokens of {proof['text']}, {proof['dtype']} on {proof['device']},"
        f" {proof['seconds']:.1f} s"
    )
    screen.print(
        f"  max |Δlogit| {proof['max_abs_logit_difference']:g}   KL {proof['kl']:.3g} nats"
        f"   loss {proof['loss_base']:.4f} → {proof['loss_grown']:.4f}   same top-1 {100 * proof['top1']:.2f} %"
    )
    if proof["parted_at"] is None:
        screen.print("  hidden states are bit-equal after every layer")
        return
    screen.print(f"  hidden states part after layer {proof['parted_at']} of the grown model")
    if not proof["changes"]:
        return
    table = rich.table.Table("injected layer", "relative change of the hidden state", "cosine", box=rich.box.SIMPLE)
    for change in proof["changes"]:
        table.add_row(str(change["layer"]), f"{change['relative_change']:.4f}", f"{change['cosine']:.4f}")
    screen.print(table)


def compare_records(records: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """A table of several grown models, one row each, from their ``growth.json``."""
    table = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("folder", "method", "layers", "parameters", "promise"):
        table.add_column(heading, no_wrap=True)
    for heading in ("base loss", "grown loss", "Δ loss", "KL", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for folder, record in records.items():
        proof = record["proof"] or {}
        numbers = ("not proved", "", "", "", "")
        if proof:
            difference = proof["loss_grown"] - proof["loss_base"]
            numbers = (
                f"{proof['loss_base']:.4f}",
                f"{proof['loss_grown']:.4f}",
                f"{difference:+.4f}",
                f"{proof['kl']:.4f}",
                f"{100 * proof['top1']:.1f} %",
            )
        init = record["options"].get("init")
        method = record["method"] + (f" {init}" if init else "")
        layers = f"{record['base']['layers']} → {len(record['rows'])}"
        table.add_row(
            folder,
            method,
            layers,
            f"{record['parameters']:,}" if "parameters" in record else "–",
            record["exactness"],
            *numbers,
        )
    return table


def make_card(name: str, record: Mapping[str, Any], plan: Plan, front: Sequence[str]) -> str:
    """The model card of a grown checkpoint: how it was made, and what was proved of it."""
    proof = record["proof"]
    if proof is None:
        proved = f"No proof was run ({record['not_proved']})."
    else:
        proved = (
            f"Proof, on {proof['tokens']:,} tokens of {proof['text']} in {proof['dtype']}:"
            f" max |Δlogit| {proof['max_abs_logit_difference']:g}, KL {proof['kl']:.4g} nats,"
            f" loss {proof['loss_base']:.4f} before and {proof['loss_grown']:.4f} after,"
            f" same most likely token at {100 * proof['top1']:.2f} % of positions."
        )
    base = record["base"]
    return "\n".join(
        [
            "---",
            *front,
            "library_name: transformers",
            "tags: [llama, tli_jax, depth-growth]",
            "---",
            f"# {name}",
            "",
            f"{base['name']} made deeper with [tli_jax] {record['versions']['tli_jax']}:"
            f" method `{plan.method}`, {plan.base_layers} → {len(plan)} layers,"
            f" {record['parameters']:,} parameters. It has not been trained since.",
            "",
            f"- Options: {', '.join(f'`{key}` {value}' for key, value in _told(plan).items())}",
            f"- Promise of the plan: {PROMISES[plan.exactness]}.",
            f"- {proved}",
            "- `growth.json` holds the plan row by row, the layer map, the digests of every tensor, and the proof.",
            "",
            "Layers (`[…]` injected; the number is the base layer it is made of, the factor that of its outputs):",
            "",
            "```",
            draw_layer_map(plan),
            "```",
            "",
            "```python",
            *snippet(name).splitlines(),
            "```",
            "",
            "The licence is that of the base model; its licence and notice files lie beside this card.",
            "",
        ]
    )


def snippet(folder: str | Path) -> str:
    """How to open a folder in transformers."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )
