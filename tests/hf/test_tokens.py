"""Token ids as the model's own tokenizer gives them, whichever file it comes in, and the windows cut from them."""

import shutil

import numpy as np
import pytest

from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import needs_transformers
from tli_jax.hf.tokens import embedded_text, open_tokenizer, windows


def test_ids_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = hub.resolve("embedded")
    tokenizer, warnings = open_tokenizer(folder, open_checkpoint(folder).config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert warnings == []
    ids = tokenizer.encode(embedded_text())
    assert ids == theirs.encode(embedded_text(), add_special_tokens=False)
    assert tokenizer.decode(ids) == embedded_text()


def test_a_lone_sentencepiece_model_gives_the_same_ids(material, tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: tokenizer.model cannot be read")
    whole = material / "stories260k"
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(whole / name, tmp_path / name)
    config = open_checkpoint(whole).config
    (fast, _), (slow, _) = open_tokenizer(whole, config), open_tokenizer(tmp_path, config)
    text = "Once upon a time, there was a little girl named Lily. 한국어, naïve."
    assert needs_transformers(whole) is None and needs_transformers(tmp_path) is not None
    assert fast.encode(text) == slow.encode(text)
    assert fast.size == slow.size == config.vocab_size


@pytest.mark.parametrize(
    ("tokens", "length", "shape"), [(1024, 512, (2, 512)), (128, 512, (1, 128)), (96, 32, (3, 32))]
)
def test_windows_do_not_overlap_and_begin_with_bos(tokens, length, shape):
    config = open_checkpoint(hub.resolve("embedded")).config
    cut = windows(list(range(5000)), config, tokens, length)
    assert cut.shape == shape
    assert (cut[:, 0] == config.bos_token_id).all()
    np.testing.assert_array_equal(cut[:, 1:].reshape(-1), np.arange(shape[0] * (shape[1] - 1)))
