"""The text of a run: its sources, tokenized for a model."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tli_jax.cli.train_config import Recipe
from tli_jax.cli.values import Source
from tli_jax.data.embedded import topics
from tli_jax.distributed import processes
from tli_jax.errors import MissingInputError
from tli_jax.hf import hub
from tli_jax.hf.encoding import Tokenizer
from tli_jax.hf.files import replace_file, storage_errors
from tli_jax.hf.tokenizer import tokenizer_digest
from tli_jax.models.config import LlamaConfig

if TYPE_CHECKING:
    from tli_jax.data.batches import Data


def sequence_length(config: Recipe, model: LlamaConfig) -> int:
    """Tokens per sequence: as configured, or the model's context up to 2,048."""
    return config.sequence_length or min(model.max_position_embeddings, 2048)


def open_text(
    config: Recipe,
    model: LlamaConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    T: int,
    cache: Path,
    known: Sequence[str] = (),
) -> "Data":
    """Open the text of a recipe, tokenized for a model.

    The source ``embedded`` is the text that was held out from training the embedded base model. The first process of a
    run hashes the sources and the cached token ids. The others wait for it, and trust its digests.

    Args:
        folder: model folder with the tokenizer.
        T: tokens per sequence.
        cache: folder for tokenized text.
        known: digests of the sources if a run has used them before, see ``open_data``.

    Raises:
        MissingInputError: a source is missing, in the first process and then in all.
        TliError: a source is damaged or too short, see ``open_data``.
    """
    from tli_jax.data.batches import open_data

    is_first = processes.is_first()
    checked = {} if is_first else processes.gather_json({})[0]
    if "missing" in checked:
        raise MissingInputError(checked["missing"])
    file = cache / "topics.jsonl"
    text, validation_text = (
        replace_embedded(sources, config.field, file, topics) for sources in (config.text, config.validation_text)
    )
    config = dataclasses.replace(config, text=text, validation_text=validation_text)
    known = checked.get("sources", known)
    digest = tokenizer_digest(folder, json.loads(model.source))
    try:
        data = open_data(config, model, tokenizer, digest, T, cache, known, is_checked=not is_first)
    except MissingInputError as error:
        if is_first:
            processes.gather_json({"missing": str(error)})
        raise
    if is_first:
        processes.gather_json({"sources": data.sources})
    return data


def replace_embedded(
    sources: Sequence[Source], field: str, file: Path, read: Callable[[], list[str]]
) -> tuple[Source, ...]:
    """Replace the source ``embedded`` by a JSONL file.

    Args:
        field: field that holds the text of a document in the file.
        file: written if needed.
        read: returns the embedded documents.
    """

    def replace(source: Source) -> Source:
        if source.path != hub.EMBEDDED or Path(source.path).exists():
            return source
        if processes.is_first() or not file.is_file():  # machines of a run in object storage each need the file
            file.parent.mkdir(exist_ok=True)
            with storage_errors(file), replace_file(file) as temporary:
                lines = [json.dumps({field: document}) for document in read()]
                temporary.write_text("\n".join(lines), encoding="utf-8")
        return dataclasses.replace(source, path=str(file))

    return tuple(map(replace, sources))
