"""The proof: compared with full logits and with transformers, and run on deliberately damaged checkpoints."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tli_jax.data.documents import read_plain
from tli_jax.errors import DataError, ProofError, UsageError
from tli_jax.growth.custom import custom
from tli_jax.growth.methods import average, dus, interpose, llama_pro, slayer, stack, tli
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.headers import read_folder
from tli_jax.hf.load import load_hf
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.models.generate import generate_tokens
from tli_jax.models.llama import forward
from tli_jax.verify import logits, proof

MAKE = Callable[..., Path]
GROW = Callable[..., Any]
EXACT = [
    tli(4, 2),
    tli(4, 1),
    llama_pro(4, 2, 2),
    slayer(4),
    tli(4, 3, "random", scale=0.0),
    custom(4, "2*0, 0-3, 0*0"),
]
INEXACT = [
    tli(4, 2, "copy"),
    tli(4, 2, "half"),
    tli(4, 2, "scaled", scale=0.3),
    tli(4, 3, "noise", noise_ratio=0.3),
    average(4, 1),
    dus(4, 1),
    stack(4),
    interpose(4, after=[1]),
    custom(4, "3, 0-1*0.7"),
]


def random_tokens(vocab: int, rows: int = 3, length: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (rows, length), dtype=np.int32)


def prove(
    base: Path, grown: Path, plan: Plan, tokens_BT: np.ndarray, step: Callable[[], None] = lambda: None
) -> proof.Proof:
    return proof.compare_models(open_checkpoint(base), open_checkpoint(grown), plan, tokens_BT, "random ids", step)


def from_full_logits(base: Path, grown: Path, tokens_BT: np.ndarray) -> dict[str, float]:
    """The same statistics by their definitions, in fp64, from the logits of ``forward``."""
    loaded = [load_hf(folder) for folder in (base, grown)]
    a, b = (np.asarray(forward(config, params, tokens_BT)).astype(np.float64) for config, params in loaded)
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    next_BT1 = tokens_BT[:, 1:, None]
    return {
        "max_abs_logit": np.abs(a).max(),
        "max_abs_logit_difference": np.abs(a - b).max(),
        "kl": (np.exp(log_a) * (log_a - log_b)).sum(-1).mean(),
        "loss_base": -np.take_along_axis(log_a[:, :-1], next_BT1, -1).mean(),
        "loss_grown": -np.take_along_axis(log_b[:, :-1], next_BT1, -1).mean(),
        "top1": (a.argmax(-1) == b.argmax(-1)).mean(),
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, make_model: MAKE) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tied": make_model(folder / "tied"),
        "untied": make_model(folder / "untied", tied=False, shards=2),
        "bfloat16": make_model(folder / "bfloat16", "bfloat16"),
    }


@pytest.mark.parametrize("kind", ["tied", "bfloat16"])
@pytest.mark.parametrize("plan", EXACT, ids=lambda plan: f"{plan.method}-{len(plan)}")
def test_exact_growth_is_proved_bit_for_bit(bases: dict[str, Path], grow: GROW, tmp_path: Path, plan: Plan, kind: str):
    base, steps = bases[kind], []
    grown = grow(base, plan, tmp_path / "grown").folder
    found = prove(base, grown, plan, random_tokens(48), lambda: steps.append(1))
    proof.check(plan, found)
    assert len(steps) == proof.layers_to_run(plan) == len(plan)
    assert found.parted_at is None
    assert (found.max_abs_logit_difference, found.kl, found.top1) == (0.0, 0.0, 1.0)
    assert found.loss_base == found.loss_grown > 0
    assert found.dtype == ("bfloat16" if kind == "bfloat16" else "float32")
    assert (found.tokens, found.text, found.device) == (96, "random ids", jax.devices()[0].device_kind)
    assert [change.layer for change in found.changes] == [i for i, mark in enumerate(plan.injected) if mark]
    assert all(change.relative_change == 0 for change in found.changes)
    assert all(change.cosine == pytest.approx(1, abs=1e-5) for change in found.changes)
    assert found.to_json()["changes"][0] == {"layer": found.changes[0].layer, "relative_change": 0.0} | {
        "cosine": found.changes[0].cosine
    }


@pytest.mark.parametrize("slice_bytes", [16 * 2**20, 640, 1], ids=["whole", "ten-rows", "one-row"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_statistics_equal_those_of_full_logits(
    bases: dict[str, Path],
    grow: GROW,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    slice_bytes: int,
):
    """A vocabulary of 48: in one slice, in slices of ten, and one by one."""
    monkeypatch.setattr(logits, "_SLICE_BYTES", slice_bytes)
    base, plan, tokens_BT = bases[kind], tli(4, 2, "copy"), random_tokens(48)
    grown = grow(base, plan, tmp_path / "grown", "9KB").folder
    found = prove(base, grown, plan, tokens_BT)
    expected = from_full_logits(base, grown, tokens_BT)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < expected["top1"] < 1 and expected["kl"] > 0.001


@pytest.mark.parametrize("plan", INEXACT, ids=lambda plan: f"{plan.method}-{plan.options.get('init', '')}")
def test_statistics_of_inexact_plans(bases: dict[str, Path], grow: GROW, tmp_path: Path, plan: Plan):
    base, tokens_BT, steps = bases["tied"], random_tokens(48), []
    grown = grow(base, plan, tmp_path / "grown").folder
    found = prove(base, grown, plan, tokens_BT, lambda: steps.append(1))
    assert len(steps) == proof.layers_to_run(plan)
    expected = from_full_logits(base, grown, tokens_BT)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    proof.check(plan, found)  # nothing is guaranteed
    # They differ from the first layer on that is not the next one of the base.
    whole = [(row.is_base_layer and row.sources[0][0]) for row in plan.rows]
    first = next(number for number, layer in enumerate(whole) if layer is False or layer != number)
    assert found.parted_at == first
    assert all(change.relative_change > 0.01 for change in found.changes)
    assert all(-1 <= change.cosine < 1 for change in found.changes)


def test_statistics_in_bf16_are_near_those_of_full_logits(bases: dict[str, Path], grow: GROW, tmp_path: Path):
    base, plan, tokens_BT = bases["bfloat16"], tli(4, 2, "copy"), random_tokens(48)
    grown = grow(base, plan, tmp_path / "grown").folder
    found = prove(base, grown, plan, tokens_BT)
    expected = from_full_logits(base, grown, tokens_BT)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=0.05, abs=0.05)


def damage(folder: Path, name: str, row: int = 0) -> None:
    """Flip the sign of the first value in a row of a tensor."""
    tensor = read_folder(folder)[0][name]
    at = tensor.start + row * (tensor.nbytes // tensor.shape[0]) + 3
    with tensor.file.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x80]))


def write_nan(folder: Path, name: str) -> None:
    tensor = read_folder(folder)[0][name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.float32(np.nan).tobytes())


def write_constant(folder: Path, name: str) -> None:
    tensor = read_folder(folder)[0][name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.full(tensor.shape, 0.01, np.float32).tobytes())


DAMAGED = {
    # tli(4, 2) is 0 1 [1*0] 2 3 [3*0]
    "model.layers.0.self_attn.v_proj.weight": (damage, "after layer 0 of the grown model"),
    "model.layers.1.input_layernorm.weight": (damage, "after layer 1 of the grown model"),
    "model.layers.3.mlp.up_proj.weight": (damage, "after layer 3 of the grown model"),
    "model.layers.4.mlp.down_proj.weight": (damage, "after layer 4 of the grown model"),
    "model.layers.2.self_attn.o_proj.weight": (write_constant, "after layer 2 of the grown model"),
    "model.layers.5.mlp.down_proj.weight": (write_constant, "after layer 5 of the grown model"),
    "model.norm.weight": (damage, "in the head"),
    "lm_head.weight": (damage, "in the head"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_wrong_byte_is_found(bases: dict[str, Path], grow: GROW, tmp_path: Path, name: str):
    base, plan, tokens_BT = bases["untied"], tli(4, 2), random_tokens(48)
    grown = grow(base, plan, tmp_path / "grown").folder
    how, where = DAMAGED[name]
    how(grown, name)
    found = prove(base, grown, plan, tokens_BT)
    with pytest.raises(ProofError, match=f"the models differ {re.escape(where)}"):
        proof.check(plan, found)
    # The statistics of the damaged model are correct all the same.
    expected = from_full_logits(base, grown, tokens_BT)
    assert {key: getattr(found, key) for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_nan_in_the_head_is_found(bases: dict[str, Path], grow: GROW, tmp_path: Path, name: str):
    base, plan = bases["untied"], tli(4, 2)
    grown = grow(base, plan, tmp_path / "grown").folder
    write_nan(grown, name)
    with pytest.raises(ProofError, match="the models differ in the head"):
        proof.check(plan, prove(base, grown, plan, random_tokens(48)))


def test_same_nan_in_both_models_is_no_difference(bases: dict[str, Path], make_model: MAKE, grow: GROW, tmp_path: Path):
    base = make_model(tmp_path / "base")
    write_nan(base, "model.layers.3.mlp.down_proj.weight")
    found = prove(base, grow(base, tli(4, 3), tmp_path / "grown").folder, tli(4, 3), random_tokens(48))
    proof.check(tli(4, 3), found)
    assert found.parted_at is None and found.max_abs_logit_difference == 0 and np.isnan(found.loss_base)


def test_base_layer_that_is_marked_injected(bases: dict[str, Path], grow: GROW, tmp_path: Path):
    plan = custom(4, "0i, 1-3")
    assert plan.is_exact
    proof.check(plan, prove(bases["tied"], grow(bases["tied"], plan, tmp_path / "g").folder, plan, random_tokens(48)))


def test_statistics_with_another_embedding(bases: dict[str, Path], grow: GROW, tmp_path: Path):
    base, plan, tokens_BT = bases["untied"], tli(4, 2, "copy"), random_tokens(48)
    grown = grow(base, plan, tmp_path / "grown").folder
    damage(grown, "model.embed_tokens.weight", int(tokens_BT[1, 5]))
    expected = from_full_logits(base, grown, tokens_BT)
    found = prove(base, grown, plan, tokens_BT)
    assert {key: getattr(found, key) for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_damaged_embedding_is_found(bases: dict[str, Path], grow: GROW, tmp_path: Path, kind: str):
    base, plan, tokens_BT = bases[kind], tli(4, 2), random_tokens(48)
    grown = grow(base, plan, tmp_path / "grown").folder
    damage(grown, "model.embed_tokens.weight", int(tokens_BT[1, 5]))
    with pytest.raises(ProofError, match="the models differ after layer 0 of the grown model"):
        proof.check(plan, prove(base, grown, plan, tokens_BT))


def test_layer_that_adds_nothing_may_contain_anything(bases: dict[str, Path], grow: GROW, tmp_path: Path):
    """Behind zeroed residual outputs no logit depends on it; digests check such bytes."""
    base, plan = bases["untied"], tli(4, 2)
    grown = grow(base, plan, tmp_path / "grown").folder
    damage(grown, "model.layers.2.mlp.up_proj.weight")
    found = prove(base, grown, plan, random_tokens(48))
    proof.check(plan, found)
    assert found.parted_at is None


def test_model_that_was_not_grown_as_planned_is_found(bases: dict[str, Path], grow: GROW, tmp_path: Path):
    base = bases["tied"]
    copied = grow(base, tli(4, 2, "copy"), tmp_path / "grown").folder
    with pytest.raises(ProofError, match="after layer 2 of the grown model"):
        proof.check(tli(4, 2), prove(base, copied, tli(4, 2), random_tokens(48)))
    # Or from another base.
    other = [base, bases["untied"]]
    exact = grow(other[1], tli(4, 2), tmp_path / "other").folder
    with pytest.raises(ProofError, match="after layer 0"):
        proof.check(tli(4, 2), prove(base, exact, tli(4, 2), random_tokens(48)))


def test_prove_reads_the_plan_from_the_grown_folder(
    bases: dict[str, Path], grow: GROW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, plan = bases["tied"], tli(4, 2)
    grown = grow(base, plan, tmp_path / "grown").folder
    with pytest.raises(DataError, match=r"no growth\.json"):
        proof.prove(base, grown)
    (grown / "growth.json").write_text(json.dumps(plan.to_json()))
    found = proof.prove(base, open_checkpoint(grown), max_tokens=128)
    assert (found.tokens, found.text, found.max_abs_logit_difference, found.parted_at) == (128, "random ids", 0.0, None)
    with pytest.raises(DataError, match="no tokenizer for the text"):
        proof.prove(base, grown, "a text")
    with pytest.raises(UsageError, match=r"was grown from 4 layers, .* has 6"):
        proof.prove(grown, grown)
    damage(grown, "model.layers.1.input_layernorm.weight")
    with pytest.raises(ProofError, match="the models differ after layer 1"):
        proof.prove(base, grown)


def test_prove_runs_a_text(grow: GROW, tmp_path: Path):
    base, plan = hub.resolve("embedded"), tli(12, 4)
    grown = grow(base, plan, tmp_path / "grown").folder
    (grown / "growth.json").write_text(json.dumps(plan.to_json()))
    text = "def add(a, b):\n    return a + b\n" * 40
    found = proof.prove("embedded", grown, text, max_tokens=256)
    assert (found.tokens, found.text, found.max_abs_logit_difference) == (256, "a given text", 0.0)
    assert found.loss_base == found.loss_grown < 2.0
    assert proof.prove("embedded", grown, max_tokens=256).text == "the embedded text"
    with pytest.raises(DataError, match=r"the text has \d+ tokens"):
        proof.prove("embedded", grown, "short")


def test_number_of_tokens(bases: dict[str, Path]):
    base, plan = open_checkpoint(bases["tied"]), tli(4, 2)
    assert proof.choose_tokens(base, plan, seconds=1e-9) == 128
    assert proof.choose_tokens(base, plan, seconds=1e9) == 4096
    between = proof.choose_tokens(base, plan, seconds=0.02)
    assert 128 <= between <= 4096 and (between < 512 or between % 512 == 0)


def stories_tokens(material: Path) -> np.ndarray:
    """The sample of stories, split as the command splits it: windows of 512 that start with BOS."""
    base = open_checkpoint(material / "stories260k")
    tokenizer, warnings = open_tokenizer(base.folder, base.config)
    assert tokenizer is not None and warnings == []
    text = read_plain(material / "text" / "tinystories_sample_4kb.txt")
    return tokens.windows(tokenizer.encode(text), base.config, 4096, 512)


@pytest.fixture(scope="module")
def transformers_losses() -> Callable[[Path, np.ndarray], float]:
    """Mean cross-entropy by transformers in fp32, without the last token of each window."""
    torch = pytest.importorskip("torch", reason="torch is not installed: no transformers model to compare with")
    transformers = pytest.importorskip("transformers")

    def losses(folder: Path, tokens_BT: np.ndarray) -> float:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        ids = torch.tensor(tokens_BT, dtype=torch.long)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    return losses


@pytest.mark.parametrize(
    "plan",
    [
        tli(5, 1),
        tli(5, 1, "copy"),
        tli(5, 2, "copy"),
        tli(5, 1, "half"),
        tli(5, 2, "average"),
        tli(5, 2, "scaled", scale=0.3),
        dus(5, 1),
        stack(5),
    ],
    ids=lambda plan: "-".join(str(option) for option in (plan.method, *plan.options.values())),
)
def test_transformers_computes_the_loss_of_the_proof(
    material: Path, grow: GROW, tmp_path: Path, transformers_losses: Callable[[Path, np.ndarray], float], plan: Plan
):
    base, tokens_BT = material / "stories260k", stories_tokens(material)
    grown = grow(base, plan, tmp_path / "grown").folder
    found = prove(base, grown, plan, tokens_BT)
    proof.check(plan, found)
    # More than the 1.30 of separate stories: here the marks between them are part of the text.
    assert found.loss_base == pytest.approx(1.8732, abs=5e-4)
    assert found.loss_grown == pytest.approx(transformers_losses(grown, tokens_BT), abs=1e-4)
    assert (found.loss_grown == found.loss_base) if plan.is_exact else (found.loss_grown > found.loss_base + 0.01)


@pytest.mark.parametrize("every", [1, 2])
def test_grown_folder_continues_the_same_story_in_transformers(material: Path, grow: GROW, tmp_path: Path, every: int):
    torch = pytest.importorskip("torch", reason="torch is not installed: no transformers model to compare with")
    transformers = pytest.importorskip("transformers")
    grown = grow(material / "stories260k", tli(5, every), tmp_path / "grown").folder
    model = transformers.LlamaForCausalLM.from_pretrained(grown)
    ids = torch.full((1, 1), model.config.bos_token_id)
    story = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False).numpy()
    config, params = load_hf(material / "stories260k")
    np.testing.assert_array_equal(story, generate_tokens(config, params, ids.numpy(), 200))
    # The tokenizer was copied.
    text = transformers.AutoTokenizer.from_pretrained(grown).decode(story[0], skip_special_tokens=True)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
