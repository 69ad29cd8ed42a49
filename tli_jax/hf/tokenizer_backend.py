"""Whether ``tokenizer.json`` alone gives the ids that transformers gives for a folder."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tli_jax.errors import DataError
from tli_jax.hf.encoding import RustTokenizer, as_data_error, silence_stderr
from tli_jax.hf.inputs import inside, read_json

if TYPE_CHECKING:
    import tokenizers

CONFIG, SPECIAL, ADDED = FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys of tokenizer_config.json that do not change ids, or whose effect `transformers_reason` checks.
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


def read_optional_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty if the file does not exist."""
    return read_json(inside(folder, name)) if (folder / name).is_file() else {}


class TokenizerSettings:
    """Settings from the JSON files that accompany the vocabulary.

    Attributes:
        named: special tokens by key, such as ``bos_token``.
        mentioned: all special tokens in any file, overridden ones included.
        kind: tokenizer class that transformers would look up, without the suffix ``Fast``.
        is_llama: whether transformers builds LlamaTokenizer's own pipeline and takes only the vocabulary.
        code: class in the folder's own code that the files ask for, if any.
    """

    def __init__(self, folder: Path):
        """Raises DataError: a file is not JSON, or asks for a class that is not a tokenizer."""
        self.model, self.config = read_optional_json(folder, "config.json"), read_optional_json(folder, CONFIG)
        special, self.added = read_optional_json(folder, SPECIAL), read_optional_json(folder, ADDED)
        kind = self.config.get("tokenizer_class") or self.model.get("tokenizer_class")
        # transformers looks up any of its classes by this name, even ones that load weights.
        if kind is not None and not (isinstance(kind, str) and ("Tokenizer" in kind or kind.endswith("Backend"))):
            raise DataError(f"{folder / CONFIG}: tokenizer_class {kind!r} is not a tokenizer: correct or remove it")
        # transformers would open these files wherever they are.
        files = [self.config.get("gguf_file"), *(self.config.get("fast_tokenizer_files") or [])]
        if outside := [name for name in files if name and "/" in str(name)]:
            raise DataError(f"{folder / CONFIG}: names the file {outside[0]!r}, not a plain name: correct or remove it")
        self.kind = None if kind is None else kind.removesuffix("Fast")
        file = folder / "tokenizer.json"
        self.is_llama = self.kind == "LlamaTokenizer" and file.exists() and b'"ByteLevel"' not in file.read_bytes()
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if self.is_llama else {}
        self.named: dict[str, str] = {}
        self.mentioned: set[str] = set()
        # A tokenizer_config.json that lists the added tokens overrides special_tokens_map.json, an older one does not.
        files = [special, self.config] if "added_tokens_decoder" in self.config else [self.config, special]
        for values in (defaults, *files):
            for key, value in values.items():
                if key in ("additional_special_tokens", "extra_special_tokens"):
                    tokens = value.values() if isinstance(value, dict) else value or []
                    self.mentioned |= {content for token in tokens if (content := _content(token)) is not None}
                elif key.endswith("_token"):
                    self.named.pop(key, None)
                    if (content := _content(value)) is not None:
                        self.named[key] = content
                        self.mentioned.add(content)
        auto_map = self.config.get("auto_map")
        if isinstance(auto_map, dict):
            auto_map = auto_map.get("AutoTokenizer")
        classes = auto_map if isinstance(auto_map, list) else [auto_map]
        self.code = next((str(name) for name in classes if name), None)


def _content(token: Any) -> str | None:
    """The text of a special token, which is a string or an object with options."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def why_transformers(folder: Path) -> str | None:
    """Why a folder's ids are not simply those of its ``tokenizer.json``; None if they are.

    Raises:
        DataError: a file of the tokenizer cannot be read.
    """
    if not (folder / "tokenizer.json").exists():
        return "no tokenizer.json"
    import tokenizers

    with as_data_error(f"{folder}: the tokenizer cannot be read", "fix or delete its files"), silence_stderr():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return transformers_reason(folder, TokenizerSettings(folder), tokenizer)


def transformers_reason(folder: Path, settings: TokenizerSettings, tokenizer: "tokenizers.Tokenizer") -> str | None:
    """Why transformers 5 would build another tokenizer than ``tokenizer.json`` describes; None if it would not.

    transformers uses the file as it is (``TokenizersBackend``), unless the class builds its own pipeline around the
    vocabulary. It then adds special tokens of the other files that the file lacks. Whether it follows
    ``add_bos_token`` and ``add_eos_token`` depends on its version, so they must agree with the file.
    """
    config, added = settings.config, tokenizer.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    if unknown := sorted(key for key in config if key not in {*_KNOWN_KEYS, *settings.named} and config[key]):
        return f"{CONFIG} has {unknown[0]}"
    if settings.code:
        return f"{CONFIG} has auto_map"
    if (folder / "tekken.json").exists():
        return "tekken.json"
    if settings.is_llama:
        if settings.model.get("model_type") != "llama" or not _is_llama_pipeline(tokenizer, config):
            return "LlamaTokenizer builds another pipeline than tokenizer.json"
        # transformers keeps the vocabulary and renumbers the other tokens, one after the other.
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        beyond = sorted(i for i, token in added.items() if vocab.get(token.content) != i)
        if beyond != list(range(len(vocab), len(vocab) + len(beyond))):
            return "LlamaTokenizer gives added tokens other ids"
    elif settings.kind not in (None, "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer"):
        return f"tokenizer_class {settings.kind}"
    elif config.get("add_prefix_space") is not None:
        return f"{CONFIG} has add_prefix_space"
    padding = {tokenizer.padding["pad_token"]} if tokenizer.padding else set()
    if missing := sorted((settings.mentioned | padding) - special):
        return f"special token {missing[0]!r} is not special in tokenizer.json"
    if (listed := config.get("added_tokens_decoder")) is not None:
        import tokenizers

        try:
            tokens = {int(index): repr(tokenizers.AddedToken(**token)) for index, token in listed.items()}
        except (TypeError, ValueError, AttributeError):
            return "added_tokens_decoder cannot be parsed"
        own = {index: repr(token) for index, token in added.items()}
        if not set(tokens.values()) <= set(own.values()) or (settings.is_llama and tokens != own):
            return f"{CONFIG} has added tokens that tokenizer.json lacks or gives other options"
    elif any(index not in added or added[index].content != token for token, index in settings.added.items()):
        return f"{ADDED} has tokens that tokenizer.json lacks"
    if any(config.get(key) is not None for key in ("add_bos_token", "add_eos_token")):
        loaded = RustTokenizer(folder, sys.maxsize, tokenizer, False)
        affixes = {"add_bos_token": loaded.prefix, "add_eos_token": loaded.suffix}
        if any(bool(ids) != config[key] for key, ids in affixes.items() if config.get(key) is not None):
            return "add_bos_token or add_eos_token disagrees with tokenizer.json"
    return None


def _is_llama_pipeline(tokenizer: "tokenizers.Tokenizer", config: Mapping[str, Any]) -> bool:
    """Whether the pipeline equals the one that LlamaTokenizer of transformers 5 builds around any vocabulary."""
    model: Any = tokenizer.model
    pre_tokenizer: Any = tokenizer.pre_tokenizer
    scheme = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    return (
        type(model).__name__ == "BPE"
        and (model.fuse_unk, model.byte_fallback, model.ignore_merges) == (True, True, False)
        and (model.dropout, model.unk_token) == (None, None)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and tokenizer.normalizer is None
        and type(pre_tokenizer).__name__ == "Metaspace"
        and (pre_tokenizer.replacement, pre_tokenizer.prepend_scheme, pre_tokenizer.split) == ("▁", scheme, False)
    )
