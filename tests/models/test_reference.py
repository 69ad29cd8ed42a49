"""Third-party checkpoints against third-party numbers: logits, hidden states, gradients, losses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.models.attention import inverse_frequencies, make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Block, forward
from tli_jax.models.loss import losses
from tli_jax.models.modules import RMSNorm

FOLDERS = ["stories260k", "tiny_random/gqa_llama3rope_tied", "tiny_random/mha_untied"]


@pytest.fixture(scope="module", params=FOLDERS)
def checkpoint(request, material, read_folder):
    config, params = read_folder(material / request.param)
    with np.load(material / request.param / "reference.npz") as reference:
        return config, params, dict(reference)


def test_logits_equal_those_computed_in_fp64(checkpoint):
    config, params, reference = checkpoint
    logits = forward(config, params, reference["input_ids"])
    assert np.abs(logits - reference["logits_numpy_fp64"]).max() < 1e-4


def test_hidden_states_layer_by_layer(checkpoint):
    config, params, reference = checkpoint
    block = jax.jit(lambda layer, x_BTD, rope: Block.from_params(config, layer)(x_BTD, rope=rope)[0])
    x_BTD = jnp.asarray(params["embed_tokens"]["weight"][reference["input_ids"]])
    rope = make_rope(config, x_BTD.shape[1], jnp.float32)
    for i in range(config.num_hidden_layers):
        assert np.abs(x_BTD - reference[f"hidden_{i}"]).max() < 1e-4, f"before layer {i}"
        x_BTD = block(jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params["layers"]), x_BTD, rope)
    # The last hidden state in transformers is after the final norm.
    last = RMSNorm.from_params(params["norm"], config.rms_norm_eps)(x_BTD)
    assert np.abs(last - reference[f"hidden_{config.num_hidden_layers}"]).max() < 1e-4


def test_loss_and_gradient_norms(checkpoint):
    config, params, reference = checkpoint
    loss, gradients = jax.jit(jax.value_and_grad(lambda params: losses(config, params, reference["input_ids"]).mean()))(
        params
    )
    assert float(loss) == pytest.approx(float(reference["loss_numpy_fp64"]), abs=1e-5)
    norms = {key.removeprefix("gradnorm/model."): float(reference[key]) for key in reference if "gradnorm/" in key}
    assert len(norms) == 9 * config.num_hidden_layers + len(config.outer_tensors)
    for name, expected in norms.items():
        leaf, number = gradients, None
        for part in name.removeprefix("gradnorm/").split("."):
            if part.isdigit():
                number = int(part)
            else:
                leaf = leaf[part]
        norm = float(jnp.linalg.norm(leaf if number is None else leaf[number]))
        assert norm == pytest.approx(expected, rel=1e-4), name


def test_the_loss_of_stories260k_as_published(stories260k, material):
    config, params = stories260k
    with np.load(material / "stories260k" / "reference.npz") as reference:
        assert float(losses(config, params, reference["input_ids"])[0].mean()) == pytest.approx(1.2876, abs=1e-4)


def test_inverse_frequencies_of_llama3(material):
    cases = json.loads((material / "rope" / "llama3_rope_inv_freq.json").read_text())
    assert len(cases) == 4
    for name, case in cases.items():
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        raw = {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "head_dim": case["head_dim"],
            "rope_theta": case["rope_theta"],
            "rope_scaling": {"rope_type": "llama3"} | {key: case[key] for key in keys},
        }
        ours = inverse_frequencies(LlamaConfig.from_hf(raw))
        assert ours.dtype == np.float32
        # Rounded once from fp64, so within half a unit of fp32; transformers also rounds intermediate results.
        np.testing.assert_allclose(ours, case["inv_freq_fp64_formula"], rtol=2.0**-24, atol=0, err_msg=name)
        np.testing.assert_allclose(ours, case["inv_freq_fp32"], rtol=1e-6, atol=0, err_msg=name)


def windows(tokenizer, text: str, predictions: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows as in the published losses: ``(tokens [N, 513], counts [N, 512])``.

    Stories are stripped of white space. Texts start with a BOS and are concatenated to a stream. A window predicts 512
    tokens, each from the tokens before it in the window. The next window starts with the last predicted token. The last
    window is padded.
    """
    texts = [text] if "<|endoftext|>" not in text else [s.strip() for s in text.split("<|endoftext|>") if s.strip()]
    stream: list[int] = []
    for story in texts:
        if len(stream) > predictions:
            break
        stream += tokenizer(story)["input_ids"]
    stream = stream[: predictions + 1]
    starts = range(0, len(stream) - 1, 512)
    rows = [stream[at : at + 513] for at in starts]
    tokens = np.array([row + [0] * (513 - len(row)) for row in rows])
    counts = np.array([np.arange(512) < len(row) - 1 for row in rows])
    return tokens, counts


def mean_loss(config, params, tokens: np.ndarray, counts: np.ndarray) -> float:
    total = 0.0
    for at in range(0, len(tokens), 8):
        batch = np.resize(tokens[at : at + 8], (8, 513))
        total += float(losses(config, params, batch)[: len(tokens) - at][counts[at : at + 8]].sum())
    return total / counts.sum()


def permuted(weight_LoD: np.ndarray, heads: int) -> np.ndarray:
    """q or k in the interleaved order of the original checkpoints."""
    L, o, D = weight_LoD.shape
    return weight_LoD.reshape(L, heads, 2, o // heads // 2, D).swapaxes(2, 3).reshape(L, o, D)


def test_loss_on_stories_from_its_distribution(stories260k, tokenizer, material):
    config, params = stories260k
    text = (material / "text" / "tinystories_sample_4kb.txt").read_text()
    tokens, counts = windows(tokenizer, text, 102_400)
    assert mean_loss(config, params, tokens, counts) == pytest.approx(1.300, abs=2e-3)
    # The loss detects the most common bug of converters.
    wrong = dict(params["layers"]["self_attn"])
    wrong["q_proj"] = {"weight": permuted(wrong["q_proj"]["weight"], config.num_attention_heads)}
    wrong["k_proj"] = {"weight": permuted(wrong["k_proj"]["weight"], config.num_key_value_heads)}
    wrong_params = params | {"layers": params["layers"] | {"self_attn": wrong}}
    assert mean_loss(config, wrong_params, tokens, counts) == pytest.approx(4.678, abs=2e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "expected"), [("tinystories", 1.524), ("english_books", 3.754), ("tinyshakespeare", 4.660)]
)
def test_loss_on_long_texts(stories260k, tokenizer, material, name, expected):
    config, params = stories260k
    # A token has less than four characters on average.
    text = (material / "text" / f"{name}.txt").read_text()[: 102_400 * 4]
    tokens, counts = windows(tokenizer, text, 102_400)
    assert counts.sum() == 102_400
    assert mean_loss(config, params, tokens, counts) == pytest.approx(expected, abs=2e-3)
