"""The tokenizer of a model folder. Its ids are those that transformers gives for the same folder and the same text.

The tokenizers library reads ``tokenizer.json`` in milliseconds, transformers takes seconds to import. So transformers
is used only where it would build something else than ``tokenizer.json`` describes: see ``needs_transformers``.
"""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.errors import DataError
from tli_jax.hf.encoding import Loaded, PythonTokenizer, RustTokenizer, Tokenizer, quiet, refusing
from tli_jax.hf.inputs import inside, read_json
from tli_jax.hf.sidecar import allowed_files
from tli_jax.models.config import LlamaConfig

if TYPE_CHECKING:
    import tokenizers

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Any of these is a tokenizer; transformers decides whether it can read it.
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
_FILES = (*_VOCABULARIES, "merges.txt", CONFIG, SPECIAL, ADDED)  # all that ids depend on, beside config.json
# Keys of tokenizer_config.json that do not change ids, or whose effect `needs_transformers` checks.
_KNOWN_KEYS = frozenset(
    [
        *("tokenizer_class", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
        *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "use_default_system_prompt"),
        *("model_max_length", "max_len", "max_length", "model_input_names", "return_token_type_ids", "stride"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "chat_template", "name_or_path"),
        *("padding_side", "truncation_side", "truncation_strategy", "pad_token_type_id", "pad_to_multiple_of"),
        *("special_tokens_map_file", "tokenizer_file", "processor_class", "backend", "is_local", "local_files_only"),
        *("errors", "sp_model_kwargs", "use_fast", "device_map", "auto_map"),
    ]
)


def open_tokenizer(
    folder: Path, config: LlamaConfig, parse_special: bool = False
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a model folder, or None if there is none, and warnings.

    Args:
        parse_special: whether special tokens in a text (``</s>``) become their ids. By default they are text like any
            other (``split_special_tokens`` in transformers), so that no document can hold control tokens.

    Raises:
        DataError: it cannot be read, has more tokens than the model, or adds one that the model does not have.
    """
    vocabularies = allowed_files(folder).keys() & set(_VOCABULARIES)  # refuses pipes, links out of the folder, pointers
    if not vocabularies:
        return None, [f"{folder}: no tokenizer, so text cannot be read"]
    with refusing(f"{folder}: the tokenizer cannot be read", "fix or delete its files"):
        settings = _Settings(folder)
    warnings = []
    if settings.code and "tokenizer.json" not in vocabularies:
        return None, [f"{folder}: the tokenizer is code ({settings.code}), never run here: text cannot be read"]
    if settings.code:
        warnings.append(
            f"{folder / CONFIG}: asks for code ({settings.code}), which is neither run nor copied: the tokenizer is"
            " what the other files say, and its ids may differ"
        )
    if vocabularies == {"vocab.json"} and settings.kind is None:
        how = f'name the class in {CONFIG} that reads it, e.g. {{"tokenizer_class": "GPT2Tokenizer"}}'
        return None, [f"{folder}: vocab.json does not say how to use it, so text cannot be read: {how}"]
    if all(name.endswith(".model") for name in vocabularies) and importlib.util.find_spec("sentencepiece") is None:
        what = f"reading {min(vocabularies)}, and so text, needs pip install 'tli_jax[sentencepiece]'"
        return None, [f"{folder}: {what}"]
    with refusing(f"{folder}: the tokenizer cannot be read", "fix or delete its files"), quiet():
        found = _open(folder, settings, config.vocab_size, parse_special)
    if vocabularies == {"vocab.json"}:
        # The class may be one that does not read this file, and then knows nothing but its special tokens.
        expected = len(json.loads((folder / "vocab.json").read_bytes()))
        if len(found.vocab) < expected:
            raise DataError(
                f"{folder}: {settings.kind} has {len(found.vocab):,} tokens, vocab.json {expected:,}: name the class in"
                f' {CONFIG} that reads it, e.g. {{"tokenizer_class": "GPT2Tokenizer"}}'
            )
    if strange := [one for one in found.prefix if one >= config.vocab_size]:
        raise DataError(
            f"{folder}: the tokenizer puts id {strange[0]:,} in front of a text, the model's vocabulary has"
            f" {config.vocab_size:,}: fix the post-processor of tokenizer.json"
        )
    warnings += _compare_sizes(found, config)
    warnings += _compare_special(found, config)
    if isinstance(found, RustTokenizer) and (parsed := found.parsed_anyway()):
        warnings.append(
            f"{folder}: the vocabulary itself holds the special tokens {', '.join(map(repr, parsed[:5]))}: in a text"
            " they become their ids, here and in transformers"
        )
    return found, warnings


def tokenizer_digest(folder: Path) -> str:
    """sha256 of all files that say how text becomes ids."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            digest.update(json.dumps([name, hashlib.sha256(inside(folder, name).read_bytes()).hexdigest()]).encode())
    model = _read(folder, "config.json")
    digest.update(json.dumps([model.get("model_type"), model.get("tokenizer_class")]).encode())
    return digest.hexdigest()


class _Settings:
    """What the JSON files beside the vocabulary say.

    Attributes:
        named: special tokens by their key, such as ``bos_token``.
        mentioned: all special tokens, those too that another file overrides.
        kind: the class that transformers is asked for, without ``Fast``.
        is_llama: whether transformers takes the vocabulary alone and builds LlamaTokenizer's own pipeline around it.
        code: the class in the folder that is asked for, if any.
    """

    def __init__(self, folder: Path):
        """Raises DataError: a file is not JSON, or asks for a class that is no tokenizer."""
        self.model, self.config = _read(folder, "config.json"), _read(folder, CONFIG)
        special, self.added = _read(folder, SPECIAL), _read(folder, ADDED)
        kind = self.config.get("tokenizer_class") or self.model.get("tokenizer_class")
        # transformers finds any of its classes by this name, those that load weights too.
        if kind is not None and not (isinstance(kind, str) and ("Tokenizer" in kind or kind.endswith("Backend"))):
            raise DataError(f"{folder / CONFIG}: tokenizer_class {kind!r} is no tokenizer: correct or remove it")
        # transformers would open these wherever they are.
        files = [self.config.get("gguf_file"), *(self.config.get("fast_tokenizer_files") or [])]
        if outside := [one for one in files if one and "/" in str(one)]:
            raise DataError(f"{folder / CONFIG}: names the file {outside[0]!r}, not a plain name: correct or remove it")
        self.kind = None if kind is None else kind.removesuffix("Fast")
        file = folder / "tokenizer.json"
        self.is_llama = self.kind == "LlamaTokenizer" and file.exists() and b'"ByteLevel"' not in file.read_bytes()
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if self.is_llama else {}
        self.named: dict[str, str] = {}
        self.mentioned: set[str] = set()
        # The newer file has all there is; before it did, the other one was followed.
        files = [special, self.config] if "added_tokens_decoder" in self.config else [self.config, special]
        for values in (defaults, *files):
            for key, value in values.items():
                if key in ("additional_special_tokens", "extra_special_tokens"):
                    parts = value.values() if isinstance(value, dict) else value or []
                    self.mentioned |= {content for part in parts if (content := _content(part)) is not None}
                elif key.endswith("_token"):
                    self.named.pop(key, None)
                    if (content := _content(value)) is not None:
                        self.named[key] = content
                        self.mentioned.add(content)
        auto_map = self.config.get("auto_map")
        if isinstance(auto_map, dict):
            auto_map = auto_map.get("AutoTokenizer")
        classes = auto_map if isinstance(auto_map, list) else [auto_map]
        self.code = next((str(one) for one in classes if one), None)


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(inside(folder, name)) if (folder / name).is_file() else {}


def _content(token: Any) -> str | None:
    """Of a special token, as a string or with its options."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _open(folder: Path, settings: _Settings, vocab_size: int, parse_special: bool) -> Loaded:
    if (file := folder / "tokenizer.json").exists():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(file))
        if _why_transformers(folder, settings, fast) is None:
            found = RustTokenizer(folder, vocab_size, fast, parse_special)
            found.named = settings.named
            return found
    loaded = _load_with_transformers(folder, settings)
    # A tokenizer may ask for its special tokens to be read as text.
    parse_special = parse_special and not loaded.split_special_tokens
    if hasattr(loaded, "backend_tokenizer"):
        found = RustTokenizer(folder, vocab_size, loaded.backend_tokenizer, parse_special)
    else:
        found = PythonTokenizer(folder, vocab_size, loaded, parse_special)
    found.named = dict(loaded.special_tokens_map)
    return found


def _load_with_transformers(folder: Path, settings: _Settings) -> Any:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except ValueError:
        if settings.code is None or not (folder / "tokenizer.json").exists():
            raise
        # It refuses because the class is code in the folder; the file itself can be read without it.
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)


def needs_transformers(folder: Path) -> str | None:
    """Why the ids of a folder are not simply those of its ``tokenizer.json``; None if they are.

    Raises:
        DataError: a file of the tokenizer cannot be read.
    """
    if not (folder / "tokenizer.json").exists():
        return "no tokenizer.json"
    import tokenizers

    with refusing(f"{folder}: the tokenizer cannot be read", "fix or delete its files"), quiet():
        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return _why_transformers(folder, _Settings(folder), fast)


def _why_transformers(folder: Path, settings: _Settings, fast: "tokenizers.Tokenizer") -> str | None:
    """Compare ``tokenizer.json`` with what transformers 5 builds from it and the files beside it.

    It takes the file as it is (``TokenizersBackend``), unless the class is one that builds its own pipeline around the
    vocabulary. It then adds the special tokens of the other files that the file lacks. It ignores ``add_bos_token``
    and ``add_eos_token``, or follows them, depending on its version: where they agree with the file, it is all the
    same.
    """
    config, added = settings.config, fast.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    if unknown := sorted(key for key in config if key not in {*_KNOWN_KEYS, *settings.named} and config[key]):
        return f"{CONFIG} has {unknown[0]}"
    if settings.code:
        return f"{CONFIG} has auto_map"
    if (folder / "tekken.json").exists():
        return "tekken.json"
    if settings.is_llama:
        if settings.model.get("model_type") != "llama" or not _is_llama_pipeline(fast, config):
            return "LlamaTokenizer builds another pipeline than tokenizer.json has"
        # It keeps the vocabulary and adds the other tokens anew, one after the other.
        vocab = fast.get_vocab(with_added_tokens=False)
        beyond = sorted(i for i, token in added.items() if vocab.get(token.content) != i)
        if beyond != list(range(len(vocab), len(vocab) + len(beyond))):
            return "LlamaTokenizer gives added tokens other ids"
    elif settings.kind not in (None, "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer"):
        return f"tokenizer_class {settings.kind}"
    elif config.get("add_prefix_space") is not None:
        return f"{CONFIG} has add_prefix_space"
    padding = {fast.padding["pad_token"]} if fast.padding else set()
    if lacking := sorted((settings.mentioned | padding) - special):
        return f"special token {lacking[0]!r} is not one in tokenizer.json"
    if (listed := config.get("added_tokens_decoder")) is not None:
        import tokenizers

        try:
            tokens = {int(index): repr(tokenizers.AddedToken(**token)) for index, token in listed.items()}
        except (TypeError, ValueError, AttributeError):
            return "added_tokens_decoder is not understood"
        own = {index: repr(token) for index, token in added.items()}
        if not set(tokens.values()) <= set(own.values()) or (settings.is_llama and tokens != own):
            return f"{CONFIG} has added tokens that tokenizer.json has not, or with other options"
    elif any(index not in added or added[index].content != token for token, index in settings.added.items()):
        return f"{ADDED} has tokens that tokenizer.json has not"
    if any(config.get(key) is not None for key in ("add_bos_token", "add_eos_token")):
        with_file = RustTokenizer(folder, sys.maxsize, fast, False)
        affixes = {"add_bos_token": with_file.prefix, "add_eos_token": with_file.suffix}
        if any(bool(ids) != config[key] for key, ids in affixes.items() if config.get(key) is not None):
            return "add_bos_token or add_eos_token is not what tokenizer.json does"
    return None


def _is_llama_pipeline(fast: "tokenizers.Tokenizer", config: Mapping[str, Any]) -> bool:
    """Whether it is already the pipeline that LlamaTokenizer of transformers 5 builds around any vocabulary."""
    model: Any = fast.model
    before: Any = fast.pre_tokenizer
    scheme = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    return (
        type(model).__name__ == "BPE"
        and (model.fuse_unk, model.byte_fallback, model.ignore_merges) == (True, True, False)
        and (model.dropout, model.unk_token) == (None, None)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and fast.normalizer is None
        and type(before).__name__ == "Metaspace"
        and (before.replacement, before.prepend_scheme, before.split) == ("▁", scheme, False)
    )


def _compare_sizes(found: Loaded, config: LlamaConfig) -> list[str]:
    """Raises DataError: the vocabulary is larger than the model's by more than added tokens."""
    size = config.vocab_size
    if found.size < size:
        return [f"{found.folder}: the tokenizer uses {found.size:,} of the {size:,} in the model's vocabulary"]
    if found.size == size:
        return []
    beyond = {index: token for token, index in found.vocab.items() if index >= size}
    if not beyond.keys() <= found.added:
        raise DataError(
            f"{found.folder}: the tokenizer has {found.size:,} tokens, the model's vocabulary {size:,}: they do not"
            " belong together"
        )
    first = min(beyond)
    others = f" and {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
    return [
        f"{found.folder}: the model's vocabulary of {size:,} does not have the tokenizer's added token"
        f" {beyond[first]!r} (id {first:,}){others}: a text that holds it is refused"
    ]


def _compare_special(found: Loaded, config: LlamaConfig) -> list[str]:
    """One warning if config.json, generation_config.json and the tokenizer name other ids for BOS or EOS."""
    generation = _read(found.folder, "generation_config.json")
    bos = () if config.bos_token_id is None else (config.bos_token_id,)
    parts = []
    for name, used, affix in (("bos", bos, found.prefix), ("eos", config.eos_token_ids, found.suffix)):
        others: dict[str, list[Any]] = {}  # generation_config.json may hold anything
        if (value := generation.get(f"{name}_token_id")) is not None:
            others["generation_config.json"] = value if isinstance(value, list) else [value]
        named = found.vocab.get(found.named.get(f"{name}_token", ""))
        if affix or found.named:
            others["the tokenizer"] = affix[-1:] or ([] if named is None else [named])
        differing = [
            f"{_ids(ids)} in {where}"
            for where, ids in others.items()
            if (ids or used) and not any(one in used for one in ids)
        ]
        if differing:
            parts.append(f"{name}_token_id is {_ids(used)} in config.json, {', '.join(differing)}")
    return [f"{found.folder}: {'; '.join(parts)}: config.json is followed"] if parts else []


def _ids(ids: Iterable[Any]) -> str:
    return ", ".join(map(str, ids)) or "none"
