"""Model cards by the Hub's conventions, for grown and for trained models. They contain no path of this machine."""

import importlib.util
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tli_jax.cli.console import printable
from tli_jax.cli.tables import show_number
from tli_jax.growth.plan import Plan, draw_layer_map
from tli_jax.hf.inputs import inside

GUARANTEES = {
    "bit": "exact: the same function as the base, bit for bit",
    "arithmetic": "exact up to rounding",
    "none": "not exact: another function than the base",
}
_LARGEST_CARD = 2**18  # bytes; longer cards are not read
# The keys that a card takes from the base's, with the form of their text. Anyone may have written a base's card.
_INHERITED = {
    "license": r"[\w.+-]{1,60}",
    "license_name": r"[\w. +-]{1,100}",
    "license_link": r"[\w.:/?&=%#~+-]{1,300}",
    "language": r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*",
}
_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # not strings unless quoted


def grown_card(
    name: str,
    record: Mapping[str, Any],
    plan: Plan,
    base_card: Mapping[str, Any] | None = None,
    model_type: str = "llama",
) -> str:
    """The card of a grown model that has not been trained since.

    Args:
        record: the content of its ``growth.json``.
        base_card: what ``read_base_card`` found.
        model_type: as in ``config.json``.
    """
    base = record["base"]
    lines = [
        f"{_base_name(base)}, grown with tli_jax {record['versions']['tli_jax']}: {_layers(plan)}, method"
        f" `{plan.method}`, {record['parameters']:,} parameters. It has not been trained since.",
        *(f"The base had been trained on {_amount(one)}." for one in base.get("training", ())),
        *_growth(plan),
        *_proof(record["proof"], record.get("not_proved")),
        "",
        "`growth.json` has the plan, the layer map, the sha256 of every tensor, and the proof.",
    ]
    return _card(name, base, base_card or {}, _growth_tags(model_type, plan), lines)


def trained_card(
    name: str, facts: Mapping[str, Any], growth: Mapping[str, Any] | None, model_type: str = "llama"
) -> str:
    """The card of a trained model.

    Args:
        facts: the content of its ``training.json``.
        growth: the content of its ``growth.json``; None if it was never grown.
        model_type: as in ``config.json``.
    """
    plan = None if growth is None else Plan.from_json(growth)
    base = facts["base"]
    grown = "" if plan is None else f" Before that it was grown: {_layers(plan)}, method `{plan.method}`."
    before, after, last = (
        show_number(facts["losses"][key]) for key in ("validation_before", "validation_after", "training")
    )
    rates = ", ".join(f"{value:g} ({group})" for group, value in facts["learning_rate"].items())
    outer = ", ".join(f"`{tensor}`" for tensor in facts["outer"]) or "none"
    count = facts.get("trainable_parameters")
    lines = [
        f"{_base_name(base)}, trained with tli_jax {facts['versions']['tli_jax']} on {_amount(facts)}.{grown}",
        "",
        "## Training",
        "",
        f"- Trainable parameters: {'' if count is None else f'{count:,}, '}layers `{facts['only']}`, tensors outside"
        f" the layers: {outer}.",
        f"- Optimizer: {facts['optimizer']}, peak learning rate {rates}.",
        f"- Validation loss, nats per token: {before} before training, {after} after. Final training loss: {last}.",
        f"- Data: sha256 of the token ids `{facts['text']}`.",
        *(f"- Earlier training: {_amount(one)} (run `{one['run']}`)." for one in facts["earlier"]),
        "",
        "`training.json` has this record.",
    ]
    tags = [model_type, "tli_jax"]
    if growth is not None and plan is not None:
        lines += [*_growth(plan), *_proof(growth.get("proof_before_training"), growth.get("not_proved"))]
        tags = _growth_tags(model_type, plan)
    return _card(name, base, base.get("card", {}), [*tags, "continued-pretraining"], lines)


def read_base_card(folder: Path) -> dict[str, Any]:
    """The licence and language in the front matter of a base model's card.

    A damaged card counts as none: it is no reason to refuse the model.
    """
    try:
        if inside(folder, "README.md").stat().st_size > _LARGEST_CARD:
            return {}
        from huggingface_hub.repocard import metadata_load

        return _inherited(metadata_load(str(folder / "README.md")) or {})
    except Exception:  # those of YAML too
        return {}


def _inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    def is_valid(key: str, value: Any) -> bool:
        if key == "language" and isinstance(value, list):
            return 0 < len(value) < 500 and all(is_valid(key, one) for one in value)
        return isinstance(value, str) and re.fullmatch(_INHERITED[key], value, re.ASCII) is not None

    return {key: card[key] for key in _INHERITED if key in card and is_valid(key, card[key])}


def _card(
    name: str, base: Mapping[str, Any], base_card: Mapping[str, Any], tags: Sequence[str], lines: Sequence[str]
) -> str:
    # Of the Hub's relations (adapter, finetune, merge, quantized) a model with more layers is nearest to a finetune: it
    # has one base and its own weights. The relation means nothing without a base on the Hub.
    relation = {"base_model": base["name"], "base_model_relation": "finetune"} if is_on_hub(base) else {}
    front = relation | _inherited(base_card)
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(tags)}
    metadata = "\n".join(f"{key}: {_yaml(value)}" for key, value in front.items())
    body = "\n".join(map(printable, lines))
    return f"""\
---
{metadata}
---
# {printable(name)}

{body}

## Use

```bash
pip install transformers torch
```
```python
{_transformers_snippet(name)}
```

## Upload

```bash
hf upload ORG/NAME {printable(shlex.quote(name))}
```

The licence is that of the base model; its licence and notice files, if any, are in this folder.
"""


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    is_plain = re.fullmatch(r"[A-Za-z][\w./-]*", value, re.ASCII) and value.lower() not in _YAML_WORDS
    return value if is_plain else json.dumps(value)


def is_on_hub(base: Mapping[str, Any]) -> bool:
    """Whether a record names its base by a hub id, which always comes with a commit."""
    return base.get("revision") is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base["name"]) is not None


def _base_name(base: Mapping[str, Any]) -> str:
    if is_on_hub(base):
        return f"[{base['name']}](https://huggingface.co/{base['name']})"
    return Path(base["name"]).name or "A local model"


def _layers(plan: Plan) -> str:
    return f"{plan.base_layers} → {len(plan)} layers"


def _amount(facts: Mapping[str, Any]) -> str:
    return f"{facts['tokens']:,} tokens in {facts['step']:,} steps"


def _growth_tags(model_type: str, plan: Plan) -> list[str]:
    kinds = ["depth-up-scaling"] * (len(plan) != plan.base_layers) + ["moe"] * (plan.experts is not None)
    return [model_type, "tli_jax", *kinds]


def _growth(plan: Plan) -> list[str]:
    return [
        "",
        "## Layers",
        "",
        "`3` is layer 3 of the base. `[3·0]` is injected: built from layer 3, its residual outputs times 0.",
        "",
        "```",
        *draw_layer_map(plan).splitlines(),
        "```",
        "",
        f"- Options: {', '.join(f'`{key}` {value}' for key, value in options(plan).items()) or 'none'}.",
        f"- Guarantee of the plan, before any training: {GUARANTEES[plan.guarantee]}.",
    ]


def _proof(proof: Mapping[str, Any] | None, reason: str | None = None) -> list[str]:
    heading = ["", "## Proof, run before any training", ""]
    if proof is None:
        return [*heading, f"No proof was run ({reason or '`--no-proof`'})."]
    return [
        *heading,
        f"Base and grown model were run on {proof['tokens']:,} tokens of {Path(proof['text']).name} in"
        f" {proof['dtype']}:",
        "",
        f"- max |Δlogit| {show_number(proof['max_abs_logit_difference'], 'g')},"
        f" KL {show_number(proof['kl'], '.4g')} nats",
        f"- loss {show_number(proof['loss_base'])} of the base, {show_number(proof['loss_grown'])} of the grown model",
        f"- same most likely token at {100 * proof['top1']:.2f} % of positions",
    ]


def options(plan: Plan) -> dict[str, Any]:
    """The options of a plan that are short enough to show, and those of its experts that were given."""
    shown = {key: value for key, value in plan.options.items() if key != "importance"}
    if plan.experts is not None:
        given = {key: value for key, value in plan.experts.to_json().items() if value is not None and key != "count"}
        shown |= {"experts": plan.experts.total} | given
    return shown


def snippet(folder: str | Path) -> str:
    """How to use a folder in this environment: with tli_jax, and with transformers if torch is installed."""
    text = f"""\
# continue a text:
python -m tli_jax generate --model {shlex.quote(str(folder))} --prompt 'Once upon a time'
# in Python:
import tli_jax
config, params = tli_jax.load_hf({_quote(folder)})"""
    if importlib.util.find_spec("torch") is not None:
        text += f"\n# or with transformers:\n{_transformers_snippet(folder)}"
    return text


def _transformers_snippet(folder: str | Path) -> str:
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({_quote(folder)})
tokenizer = AutoTokenizer.from_pretrained({_quote(folder)})"""


def _quote(folder: str | Path) -> str:
    return json.dumps(str(folder), ensure_ascii=not str(folder).isprintable())
