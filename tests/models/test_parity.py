"""Parity with Llama in transformers: norm, rotary tables, attention, layer, logits, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tli_jax.models.attention import make_rope
from tli_jax.models.config import LlamaConfig
from tli_jax.models.llama import Block, Llama, forward, init_params
from tli_jax.models.loss import token_losses
from tli_jax.models.modules import RMSNorm

torch = pytest.importorskip("torch", reason="torch is not installed: no transformers model to compare with")
transformers = pytest.importorskip("transformers")

# Longer than every original context below, so that scaled frequencies matter.
B, T = 2, 80
COMMON = {
    "vocab_size": 61,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    # Ten times the default: attention must be far from uniform to detect a wrong rotation.
    "initializer_range": 0.2,
}
MODELS = {
    "untied, plain rope, as many kv heads": {
        **COMMON,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "tied, linear rope, grouped": {
        **COMMON,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "tied, llama3 rope, one kv head": {
        **COMMON,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


class Pair:
    """A random model in transformers and here."""

    def __init__(self, options, stack_layers):
        self.theirs = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**options), attn_implementation="eager", dtype=torch.float32
        ).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in self.theirs.named_parameters():
                # Norms differ from 1, to detect a missing one.
                std, mean = (0.3, 1.0) if "norm" in name else (options["initializer_range"], 0.0)
                tensor.normal_(mean, std, generator=generator)
        # A tied head is in the state dict, but not a parameter.
        self.params = stack_layers({name: p.detach().numpy() for name, p in self.theirs.named_parameters()})
        self.config = LlamaConfig.from_hf(self.theirs.config.to_dict())
        self.layer = jax.tree.map(lambda x: jnp.asarray(x[1]), self.params["layers"])
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, options["vocab_size"], (B, T))
        self.x_BTD = rng.standard_normal((B, T, options["hidden_size"]), dtype=np.float32)
        positions = torch.arange(T)[None]
        self.rope = self.theirs.model.rotary_emb(torch.tensor(self.x_BTD), positions)
        self.mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def pair(request, stack_layers) -> Pair:
    return Pair(request.param, stack_layers)


def close(ours, theirs, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest entry."""
    theirs = theirs.detach().float().numpy()
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_the_trees_are_the_same_shape(pair):
    fresh = jax.eval_shape(lambda key: init_params(pair.config, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, pair.params) == jax.tree.map(jnp.shape, fresh)


def test_rms_norm(pair):
    # Small enough for eps to matter.
    x = 3e-3 * pair.x_BTD
    theirs = pair.theirs.model.layers[1].input_layernorm(torch.tensor(x))
    close(RMSNorm.from_params(pair.layer["input_layernorm"], pair.config.rms_norm_eps)(x), theirs, 1e-6)


def test_rotary_tables(pair):
    rope = make_rope(pair.config, T, jnp.float32)
    for ours, theirs in zip((rope.cos, rope.sin), pair.rope, strict=True):
        # The frequencies are rounded to fp32 differently; at position 79 the difference is at most 79 * 2**-24.
        close(ours[None], theirs, 5e-6)


def test_attention(pair):
    attention = Block.from_params(pair.config, pair.layer).self_attn
    ours, _ = attention(pair.x_BTD, rope=make_rope(pair.config, T, jnp.float32))
    theirs = pair.theirs.model.layers[1].self_attn
    with torch.no_grad():
        close(ours, theirs(torch.tensor(pair.x_BTD), position_embeddings=pair.rope, attention_mask=pair.mask)[0], 5e-6)


def test_layer(pair):
    ours, _, _ = Block.from_params(pair.config, pair.layer)(pair.x_BTD, rope=make_rope(pair.config, T, jnp.float32))
    theirs = pair.theirs.model.layers[1]
    with torch.no_grad():
        close(ours, theirs(torch.tensor(pair.x_BTD), position_embeddings=pair.rope, attention_mask=pair.mask), 5e-6)


def test_logits(pair):
    with torch.no_grad():
        close(forward(pair.config, pair.params, pair.tokens), pair.theirs(torch.tensor(pair.tokens)).logits, 1e-5)


def test_logits_in_bfloat16(pair):
    ours = forward(pair.config, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), pair.params), pair.tokens)
    assert ours.dtype == jnp.bfloat16
    rounded = transformers.LlamaForCausalLM._from_config(
        pair.theirs.config, attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    rounded.load_state_dict(pair.theirs.state_dict())
    with torch.no_grad():
        # bf16 has 8 bits, and the two round at different points of the three layers: 0.04 measured.
        close(ours, rounded(torch.tensor(pair.tokens)).logits, 0.08)


def test_loss_and_gradient_of_every_tensor(pair, stack_layers):
    tokens = torch.tensor(pair.tokens)
    loss = pair.theirs(tokens, labels=tokens).loss
    pair.theirs.zero_grad()
    loss.backward()
    theirs = stack_layers({name: p.grad.numpy() for name, p in pair.theirs.named_parameters()})
    ours_loss, ours = jax.jit(
        jax.value_and_grad(lambda params: token_losses(Llama.from_params(pair.config, params), pair.tokens)[0].mean())
    )(pair.params)
    assert float(ours_loss) == pytest.approx(loss.item(), rel=1e-6)
    off = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), ours, theirs)
    assert max(jax.tree.leaves(off)) < 2e-5, off
