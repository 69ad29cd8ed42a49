"""Token ids equal those of transformers, whichever file the tokenizer comes in; windows split them."""

import shutil

import numpy as np
import pytest

from tli_jax.data.embedded import embedded_text
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.hf.tokenizer_backend import why_transformers
from tli_jax.hf.tokens import windows


def test_ids_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = hub.resolve("embedded")
    tokenizer, warnings = open_tokenizer(folder, open_checkpoint(folder).config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert warnings == []
    ids = tokenizer.encode(embedded_text())
    assert ids == theirs.encode(embedded_text(), add_special_tokens=False)
    assert tokenizer.decode(ids) == embedded_text()


def test_sentencepiece_model_alone_gives_the_same_ids(material, tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: tokenizer.model cannot be read")
    folder = material / "stories260k"
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    config = open_checkpoint(folder).config
    (fast, _), (slow, _) = open_tokenizer(folder, config), open_tokenizer(tmp_path, config)
    text = "Once upon a time, there was a little girl named Lily. 한국어, naïve."
    assert why_transformers(folder) is None and why_transformers(tmp_path) is not None
    assert fast.encode(text) == slow.encode(text)
    assert fast.size == slow.size == config.vocab_size


@pytest.mark.parametrize(
    ("tokens", "length", "shape"), [(1024, 512, (2, 512)), (128, 512, (1, 128)), (96, 32, (3, 32))]
)
def test_windows_do_not_overlap_and_start_with_bos(tokens, length, shape):
    config = open_checkpoint(hub.resolve("embedded")).config
    rows = windows(list(range(5000)), config, tokens, length)
    assert rows.shape == shape
    assert (rows[:, 0] == config.bos_token_id).all()
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), np.arange(shape[0] * (shape[1] - 1)))
