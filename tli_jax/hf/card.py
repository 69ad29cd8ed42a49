"""Model cards, as the Hub reads them: of a grown model, and of a trained one. No card holds a path of this machine."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.console import printable
from tli_jax.cli.tables import show_number
from tli_jax.growth.plan import Plan, draw_layer_map

GUARANTEES = {
    "bit": "exact: the same function as the base, bit for bit",
    "arithmetic": "exact but for rounding",
    "none": "not exact: another function than the base",
}


def grown_card(name: str, record: Mapping[str, Any], plan: Plan) -> str:
    """The card of a model that was grown and not trained since.

    Args:
        record: its ``growth.json``.
    """
    base = record["base"]
    earlier = "".join(f" The base had been trained on {_amount(one)}." for one in base.get("training", ()))
    lines = [
        f"{_base_name(base)} made deeper with [tli_jax] {record['versions']['tli_jax']}: method `{plan.method}`,"
        f" {plan.base_layers} → {len(plan)} layers, {record['parameters']:,} parameters. It has not been trained"
        f" since.{earlier}",
        "",
        *_growth(plan),
        f"- {_proof(record['proof'], 'Proof', record.get('not_proved'))}",
        "- `growth.json` holds the plan row by row, the layer map, the digests of every tensor, and the proof.",
        *_layers(plan),
    ]
    return _card(name, base, ["depth-growth"], lines)


def trained_card(name: str, facts: Mapping[str, Any], growth: Mapping[str, Any] | None) -> str:
    """The card of a trained model.

    Args:
        facts: its ``training.json``.
        growth: its ``growth.json``, None where it was never grown.
    """
    plan = None if growth is None else Plan.from_json(growth)
    base = facts["base"]
    before, after, last = (
        show_number(facts["losses"][key]) for key in ("validation_before", "validation_after", "training")
    )
    grown = (
        f" Before that it was made deeper: method `{plan.method}`, {plan.base_layers} → {len(plan)} layers."
        if plan is not None
        else ""
    )
    rates = ", ".join(f"{value:g} ({group})" for group, value in facts["learning_rate"].items())
    lines = [
        f"{_base_name(base)} trained with [tli_jax] {facts['versions']['tli_jax']} on {_amount(facts)}.{grown}",
        "",
        f"- Trained: `{facts['only']}` of the layers; outside the layers"
        f" {', '.join(f'`{one}`' for one in facts['outer']) or 'nothing'}.",
        f"- Optimizer: {facts['optimizer']}, peak learning rate {rates}.",
        f"- Validation loss, nats per token: {before} before training, {after} after it. Training loss at the end:"
        f" {last}.",
        f"- Digest of the text as tokens: `{facts['text']}`.",
        *(f"- Trained before, on {_amount(one)} (run `{one['run']}`)." for one in facts["earlier"]),
        "- `training.json` holds this record.",
    ]
    if growth is not None and plan is not None:
        proof = _proof(growth.get("proof_before_training"), "Proof of the grown model before it was trained")
        lines += [*_growth(plan), f"- {proof}", *_layers(plan)]
    tags = ["continued-pretraining"] if plan is None else ["depth-growth", "continued-pretraining"]
    return _card(name, base, tags, lines)


def _card(name: str, base: Mapping[str, Any], tags: Sequence[str], lines: Sequence[str]) -> str:
    all_lines = [
        "---",
        *([f"base_model: {base['name']}"] if is_on_hub(base) else []),
        "library_name: transformers",
        f"tags: [{', '.join(['llama', 'tli_jax', *tags])}]",
        "---",
        f"# {name}",
        "",
        *lines,
        "",
        "```python",
        *snippet(name).splitlines(),
        "```",
        "",
        "The licence is that of the base model; its licence and notice files are beside this card.",
    ]
    return "".join(printable(line) + "\n" for line in all_lines)


def is_on_hub(base: Mapping[str, Any]) -> bool:
    """Whether a record names its base by a hub id, which comes with a commit."""
    return base.get("revision") is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"]) is not None


def _base_name(base: Mapping[str, Any]) -> str:
    return base["name"] if is_on_hub(base) else Path(base["name"]).name or "A local model"


def _amount(facts: Mapping[str, Any]) -> str:
    return f"{facts['tokens']:,} tokens in {facts['step']:,} steps"


def _growth(plan: Plan) -> list[str]:
    return [
        f"- Options: {', '.join(f'`{key}` {value}' for key, value in options(plan).items()) or 'none'}",
        f"- Guarantee of the plan, before any training: {GUARANTEES[plan.guarantee]}.",
    ]


def _proof(proof: Mapping[str, Any] | None, title: str, why_not: str | None = None) -> str:
    if proof is None:
        return f"No proof was run ({why_not or '`--no-proof`'})."
    return (
        f"{title}, on {proof['tokens']:,} tokens of {Path(proof['text']).name} in {proof['dtype']}:"
        f" max |Δlogit| {show_number(proof['max_abs_logit_difference'], 'g')},"
        f" KL {show_number(proof['kl'], '.4g')} nats,"
        f" loss {show_number(proof['loss_base'])} before and {show_number(proof['loss_grown'])} after,"
        f" same most likely token at {100 * proof['top1']:.2f} % of positions."
    )


def _layers(plan: Plan) -> list[str]:
    return [
        "",
        "Layers (`[…]` injected; the number is the base layer it is made of, the factor that of its outputs):",
        "",
        "```",
        *draw_layer_map(plan).splitlines(),
        "```",
    ]


def options(plan: Plan) -> dict[str, Any]:
    """The options of a plan, without those that are too long to show, and of its experts those that were given."""
    shown = {key: value for key, value in plan.options.items() if key != "importance"}
    if plan.experts is not None:
        made = {key: value for key, value in plan.experts.to_json().items() if value is not None and key != "count"}
        shown |= {"experts": plan.experts.total} | made
    return shown


def snippet(folder: str | Path) -> str:
    """How to open a folder in transformers."""
    quoted = json.dumps(str(folder), ensure_ascii=not str(folder).isprintable())
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})"
    )
