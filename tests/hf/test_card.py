"""Model cards: front matter that the Hub accepts, the facts of growth and training, and no path of this machine."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tli_jax.growth.experts import Experts
from tli_jax.growth.methods import moe, tli
from tli_jax.hf import card, hub

NAME = "<img src=x onerror=alert(1)>$a_b$[red]\x1b\udcff"
PROOF = {"tokens": 512, "text": "/home/me/secret/novel.txt", "dtype": "float32", "device": "cpu", "seconds": 1.0}
PROOF |= {"max_abs_logit": 9.0, "max_abs_logit_difference": 0.0, "kl": 0.0, "top1": 1.0, "parted_at": None}
PROOF |= {"loss_base": 1.5394, "loss_grown": 1.5394, "changes": []}
PLAN = tli(4, every=2)
GROWTH = PLAN.to_json() | {"parameters": 123_456_789, "proof": PROOF, "versions": {"tli_jax": "0.1.0"}}
GROWTH["base"] = {"layers": 4, "name": "/home/me/secret/llama", "revision": None, "training": []}
TRAINING = {
    "run": "0123456789abcdef",
    "step": 40,
    "tokens": 81_920,
    "losses": {"validation_before": 3.25, "validation_after": 2.125, "training": 2.25},
    "only": "injected",
    "outer": [],
    "trainable_parameters": 1_234,
    "optimizer": "adamw",
    "learning_rate": {"all": 1e-4, "injected": 1e-3},
    "text": "feed" * 16,
    "base": {"name": "llama", "revision": None},
    "earlier": [],
    "versions": {"tli_jax": "0.1.0"},
}
TRAINED = GROWTH | {"proof": None, "proof_before_training": PROOF, "training": TRAINING}
HUB = {"name": "meta-llama/Llama-3.2-1B", "revision": "4e20de36"}
LICENCE = {
    "license": "other",
    "license_name": "llama3.2",
    "license_link": "https://a.b/c?d=e#f",
    "language": ["en", "no"],
}


def front(text: str) -> dict[str, Any]:
    """The front matter, as huggingface_hub reads it."""
    return ModelCard(text).data.to_dict()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def test_card_of_a_grown_model() -> None:
    text = card.grown_card("out", GROWTH, PLAN)
    common = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert front(text) == common | {"tags": ["llama", "tli_jax", "depth-up-scaling"]}
    assert "llama, grown with tli_jax 0.1.0: 4 → 6 layers, method `tli`, 123,456,789 parameters." in text
    assert "novel.txt" in text and "/home" not in text and "secret" not in text
    assert "0 1 [1·0] 2 3 [3·0]" in text and "Proof, run before any training" in text and "max |Δlogit| 0" in text
    assert "pip install transformers torch" in text and 'AutoModelForCausalLM.from_pretrained("out")' in text
    assert "hf upload ORG/NAME out" in text
    trained = GROWTH | {"base": GROWTH["base"] | {"training": [TRAINING]}}
    assert "The base had been trained on 81,920 tokens in 40 steps." in card.grown_card("out", trained, PLAN)
    assert "No proof was run (`--no-proof`)" in card.grown_card("out", GROWTH | {"proof": None}, PLAN)
    experts = dataclasses.replace(moe(4), experts=Experts(2))
    assert front(card.grown_card("out", GROWTH, experts, None, "mixtral"))["tags"] == ["mixtral", "tli_jax", "moe"]


def test_base_on_the_hub() -> None:
    text = card.grown_card("out", GROWTH | {"base": {"layers": 4, **HUB}}, PLAN, LICENCE)
    found = front(text)
    assert found["base_model"] == HUB["name"] and found["base_model_relation"] == "finetune"
    assert found.items() >= LICENCE.items()
    # A name that a folder may have, without a commit, is not a hub id.
    local = card.grown_card("out", GROWTH | {"base": {"layers": 4, **HUB, "revision": None}}, PLAN)
    assert not {"base_model", "base_model_relation"} & front(local).keys()


def test_card_of_a_trained_model() -> None:
    text = card.trained_card("out", TRAINING | {"base": TRAINING["base"] | {"card": LICENCE}}, TRAINED)
    assert front(text)["tags"] == ["llama", "tli_jax", "depth-up-scaling", "continued-pretraining"]
    assert front(text).items() >= LICENCE.items()
    assert "llama, trained with tli_jax 0.1.0 on 81,920 tokens in 40 steps." in text
    assert "Trainable parameters: 1,234, layers `injected`, tensors outside the layers: none." in text
    assert "Validation loss, nats per token: 3.2500 before training, 2.1250 after. Final training loss: 2.2500" in text
    assert "Proof, run before any training" in text and "512 tokens of novel.txt" in text and "feed" * 16 in text
    assert "peak learning rate 0.0001 (all), 0.001 (injected)" in text and "4 → 6 layers" in text
    assert "/home" not in text and "secret" not in text and "not been trained" not in text


def test_card_of_a_trained_model_that_was_never_grown() -> None:
    text = card.trained_card(NAME, TRAINING | {"base": HUB, "earlier": [TRAINING]}, None)
    assert front(text)["base_model"] == HUB["name"] and "depth-up-scaling" not in text and "Proof" not in text
    assert "Earlier training: 81,920 tokens in 40 steps (run `0123456789abcdef`)." in text
    text.encode()


def test_licence_and_language_of_the_base(base: Path) -> None:
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: https://a.b/c?d=e#f\nlanguage:\n- en\n- 'no'\n"
        "extra_gated_prompt: long\n---\n# A model\n"
    )
    assert card.read_base_card(base) == LICENCE
    assert card.read_base_card(hub.resolve("embedded")) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# no front matter\n",
        b"---\nlicense: [\n---\n",
        b"---\n- a list\n---\n",
        b"---\nlicense: 3\nlanguage: 5\nlicense_link: [a]\n---\n",
        b"---\nlicense: 'mit\\nbase_model: a/b'\n---\n",
        b"---\nlicense: !!python/object/apply:os.system [x]\n---\n",
        b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        b"---\nlicense: mit\n---\n" + b"x" * 2**18,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_damaged_card_of_the_base_counts_as_none(content: bytes, base: Path) -> None:
    (base / "README.md").write_bytes(content)
    assert card.read_base_card(base) == {}


def test_card_of_the_base_is_not_read_through_a_link(base: Path) -> None:
    assert card.read_base_card(base) == {}
    (base.parent / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "README.md").symlink_to("../README.md")
    assert card.read_base_card(base) == {}


def test_closing_snippet_needs_torch_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.importlib.util, "find_spec", lambda name: None)
    assert "transformers" not in card.snippet("a b") and "--model 'a b'" in card.snippet("a b")
    monkeypatch.setattr(card.importlib.util, "find_spec", lambda name: name)
    assert "AutoTokenizer.from_pretrained(" in card.snippet("out")


def test_closing_snippet_runs() -> None:
    folder = hub.resolve("embedded")
    lines = card.snippet(folder).splitlines()
    code = "\n".join(lines[lines.index("import tli_jax") :])
    if "AutoModel" in code:
        assert json.dumps(str(folder)) in code
        code = code[: code.index("# or with")]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
