"""Continuations of a prompt by a model on disk."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np

from tli_jax.cli.console import warn
from tli_jax.errors import DataError, UsageError
from tli_jax.hf import hub
from tli_jax.hf.chat import has_chat_template, render_chat
from tli_jax.hf.load import load_hf
from tli_jax.hf.tokenizer import open_tokenizer


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continued prompt.

    Attributes:
        prompt: token ids of the prompt, with BOS and the chat template.
        tokens: new token ids, up to and including the first EOS.
        text: the new tokens as text.
    """

    model: str
    is_chat: bool
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def continue_prompt(
    model: Path | str,
    prompt: str,
    *,
    revision: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Continuation:
    """Continue a prompt with a model: a folder, a Hub id or ``"embedded"``.

    Example::

        tli_jax.continue_prompt("embedded", "def main(", max_new_tokens=20).text

    Args:
        chat: wrap the prompt in the chat template; by default if the model has one.
        max_new_tokens: at most this many; fewer where the model's context ends.
        temperature: 0 is greedy; otherwise tokens are sampled with ``seed``.

    Raises:
        TliError: the model cannot be loaded, has no tokenizer, or its context is too short for the prompt.
    """
    import jax
    import jax.numpy as jnp

    from tli_jax.models.generate import generate_tokens

    folder = hub.resolve(model, revision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        config, params = load_hf(folder)
    is_chat = has_chat_template(folder) if chat is None else chat
    tokenizer, notes = open_tokenizer(folder, config, parse_special=is_chat)
    for note in (*(str(warning.message) for warning in caught), *notes):
        warn(note)
    if tokenizer is None:
        raise DataError(f"{folder}: the model has no tokenizer to read the prompt with")
    bos = [] if is_chat or config.bos_token_id is None else [config.bos_token_id]
    ids = bos + tokenizer.encode(render_chat(folder, prompt) if is_chat else prompt)
    if not ids:
        raise UsageError("the prompt is empty, and the model has no BOS: give a prompt")
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise UsageError(f"a prompt of {len(ids):,} tokens fills the model's context: give a shorter prompt")
    key = jax.random.key(seed) if temperature else None
    count = min(max_new_tokens, room)
    output = generate_tokens(config, params, jnp.asarray([ids]), count, temperature=temperature, key=key)
    new = np.asarray(output)[0, len(ids) :].tolist()
    end = next((i + 1 for i, token in enumerate(new) if token in config.eos_token_ids), len(new))
    before, complete = tokenizer.decode(ids), tokenizer.decode(ids + new[:end])
    # Decoded alone, the new tokens would lose a leading space.
    text = complete.removeprefix(before) if complete.startswith(before) else tokenizer.decode(new[:end])
    return Continuation(str(model), is_chat, tuple(ids), tuple(new[:end]), text)
