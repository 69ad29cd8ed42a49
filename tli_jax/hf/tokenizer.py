"""The tokenizer of a model folder. Its ids equal those that transformers gives for the same folder and text.

The tokenizers library reads ``tokenizer.json`` in milliseconds, while importing transformers takes seconds. So
transformers is used only where it would build something other than ``tokenizer.json`` describes.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tli_jax.errors import DataError
from tli_jax.hf.encoding import PythonTokenizer, RustTokenizer, Tokenizer, as_data_error, silence_stderr
from tli_jax.hf.inputs import inside
from tli_jax.hf.sidecar import allowed_files
from tli_jax.hf.tokenizer_backend import CONFIG, FILES, TokenizerSettings, read_optional_json, transformers_reason
from tli_jax.models.config import LlamaConfig

# Any of these is a tokenizer. transformers decides whether it can read it.
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
_NAME_CLASS = f'name the class that reads it in {CONFIG}, e.g. {{"tokenizer_class": "GPT2Tokenizer"}}'


def open_tokenizer(
    folder: Path, config: LlamaConfig, parse_special: bool = False
) -> tuple[Tokenizer | None, list[str]]:
    """Open the tokenizer of a model folder.

    Args:
        parse_special: whether special tokens in a text (``</s>``) become their ids. By default they are ordinary text
            (``split_special_tokens`` in transformers), so that no document can contain control tokens.

    Returns:
        The tokenizer, or None if the folder has none that can be used, and a list of warnings.

    Raises:
        DataError: it cannot be read, or does not fit the model's vocabulary.
    """
    vocabularies = allowed_files(folder).keys() & set(_VOCABULARIES)  # refuses pipes, links to elsewhere, LFS pointers
    if not vocabularies:
        return None, [f"{folder}: no tokenizer, so text cannot be read"]
    unreadable = (f"{folder}: the tokenizer cannot be read", "fix or delete its files")
    with as_data_error(*unreadable):
        settings = TokenizerSettings(folder)
    warnings = []
    if settings.code and "tokenizer.json" not in vocabularies:
        return None, [f"{folder}: the tokenizer is code ({settings.code}), which is never run: text cannot be read"]
    if settings.code:
        warnings.append(
            f"{folder / CONFIG}: asks for code ({settings.code}), which is neither run nor copied: the other files"
            " define the tokenizer, and its ids may differ"
        )
    if vocabularies == {"vocab.json"} and settings.kind is None:
        return None, [f"{folder}: vocab.json does not name its tokenizer class, so text cannot be read: {_NAME_CLASS}"]
    if all(name.endswith(".model") for name in vocabularies) and importlib.util.find_spec("sentencepiece") is None:
        return None, [
            f"{folder}: {min(vocabularies)} needs sentencepiece, so text cannot be read:"
            " pip install sentencepiece protobuf"
        ]
    with as_data_error(*unreadable), silence_stderr():
        tokenizer = _load(folder, settings, config.vocab_size, parse_special)
    if vocabularies == {"vocab.json"}:
        # A class that does not read this file knows only its special tokens.
        expected = len(json.loads((folder / "vocab.json").read_bytes()))
        if len(tokenizer.vocab) < expected:
            raise DataError(
                f"{folder}: {settings.kind} has {len(tokenizer.vocab):,} tokens, vocab.json {expected:,}: {_NAME_CLASS}"
            )
    if outside := [i for i in tokenizer.prefix if i >= config.vocab_size]:
        raise DataError(
            f"{folder}: the tokenizer puts id {outside[0]:,} before a text, outside the model's vocabulary of"
            f" {config.vocab_size:,}: fix the post-processor of tokenizer.json"
        )
    warnings += _compare_sizes(tokenizer, config)
    warnings += _compare_special(tokenizer, config)
    if isinstance(tokenizer, RustTokenizer) and (parsed := tokenizer.always_parsed()):
        warnings.append(
            f"{folder}: the vocabulary contains the special tokens {', '.join(map(repr, parsed[:5]))}: in a text they"
            " become their ids, here and in transformers"
        )
    return tokenizer, warnings


def tokenizer_digest(folder: Path, raw: Mapping[str, Any] | None = None) -> str:
    """sha256 of all files that determine how text becomes ids.

    Args:
        raw: the content of ``config.json``, if the folder has that of another model.
    """
    digest = hashlib.sha256()
    for name in (*_VOCABULARIES, "merges.txt", *FILES):
        if (folder / name).is_file():
            digest.update(json.dumps([name, hashlib.sha256(inside(folder, name).read_bytes()).hexdigest()]).encode())
    model = raw or read_optional_json(folder, "config.json")
    digest.update(json.dumps([model.get("model_type"), model.get("tokenizer_class")]).encode())
    return digest.hexdigest()


def _load(folder: Path, settings: TokenizerSettings, vocab_size: int, parse_special: bool) -> Tokenizer:
    if (file := folder / "tokenizer.json").exists():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(file))
        if transformers_reason(folder, settings, fast) is None:
            tokenizer = RustTokenizer(folder, vocab_size, fast, parse_special)
            tokenizer.named = settings.named
            return tokenizer
    loaded = _load_with_transformers(folder, settings)
    # The tokenizer's own files may ask for special tokens to be read as text.
    parse_special = parse_special and not loaded.split_special_tokens
    if hasattr(loaded, "backend_tokenizer"):
        tokenizer = RustTokenizer(folder, vocab_size, loaded.backend_tokenizer, parse_special)
    else:
        tokenizer = PythonTokenizer(folder, vocab_size, loaded, parse_special)
    tokenizer.named = dict(loaded.special_tokens_map)
    return tokenizer


def _load_with_transformers(folder: Path, settings: TokenizerSettings) -> Any:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ValueError:
        if settings.code is None or not (folder / "tokenizer.json").exists():
            raise
        # AutoTokenizer refuses because the class is code in the folder. The file can be read without it.
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)


def _compare_sizes(tokenizer: Tokenizer, config: LlamaConfig) -> list[str]:
    """Raises DataError: the tokenizer has more than added tokens outside the model's vocabulary."""
    folder, size = tokenizer.folder, config.vocab_size
    if tokenizer.size < size:
        return [f"{folder}: the tokenizer uses {tokenizer.size:,} of the {size:,} ids in the model's vocabulary"]
    beyond = {index: token for token, index in tokenizer.vocab.items() if index >= size}
    if not beyond.keys() <= tokenizer.added:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.size:,} tokens, the model's vocabulary {size:,}: use the"
            " tokenizer of this model"
        )
    if not beyond:
        return []
    first = min(beyond)
    more = f" and {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
    return [
        f"{folder}: the model's vocabulary of {size:,} lacks the tokenizer's added token {beyond[first]!r}"
        f" (id {first:,}){more}: a text that contains it is refused"
    ]


def _compare_special(tokenizer: Tokenizer, config: LlamaConfig) -> list[str]:
    """One warning if config.json, generation_config.json and the tokenizer disagree about BOS or EOS."""
    generation = read_optional_json(tokenizer.folder, "generation_config.json")
    bos = () if config.bos_token_id is None else (config.bos_token_id,)
    parts = []
    for name, used, affix in (("bos", bos, tokenizer.prefix), ("eos", config.eos_token_ids, tokenizer.suffix)):
        others: dict[str, list[Any]] = {}  # generation_config.json may contain anything
        if (value := generation.get(f"{name}_token_id")) is not None:
            others["generation_config.json"] = value if isinstance(value, list) else [value]
        named = tokenizer.vocab.get(tokenizer.named.get(f"{name}_token", ""))
        if affix or tokenizer.named:
            others["the tokenizer"] = affix[-1:] or ([] if named is None else [named])
        differing = [
            f"{_join_ids(ids)} in {source}"
            for source, ids in others.items()
            if (ids or used) and not any(i in used for i in ids)
        ]
        if differing:
            parts.append(f"{name}_token_id is {_join_ids(used)} in config.json, {', '.join(differing)}")
    return [f"{tokenizer.folder}: {'; '.join(parts)}: config.json is followed"] if parts else []


def _join_ids(ids: Iterable[Any]) -> str:
    return ", ".join(map(str, ids)) or "none"
