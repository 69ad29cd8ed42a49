"""Ids equal those of transformers for every kind of folder; files that are unsafe to read are refused first."""

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import tli_jax
from tli_jax.errors import DataError
from tli_jax.hf import hub, sidecar
from tli_jax.hf.tokenizer import open_tokenizer, tokenizer_digest
from tli_jax.hf.tokenizer_backend import why_transformers

transformers = pytest.importorskip("transformers")

CORPUS = [
    "Once upon a time, there was a little girl named Lily. She was 3 years old.",
    "def main():\n    return  {'a': 1}\t# naïve café\n\n\nif x < y > z: pass",
    "옛날 옛적에 작은 소녀가 살았습니다. 한국어 문장입니다. 🙂👨‍👩‍👧",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two leading spaces and a trailing one ",
    "<s>a</s> tag</s> in <unk> a page <s> <pad> <PAD>",
    "<s>",
    "Lily<ent> and <ent> Lily <lr>  <lr>  x<lr>x word WORD words\tword",
    "한국어 문장 🙂👨‍👩‍👧 café café ﬁne ｆｕｌｌ",
    "\n\n\ttabs\r\n\x00\u3000\u200b▁under ▁",
    "".join(random.Random(0).choices("ab <s>/\n한🙂▁é", k=300)),
]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer"} | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<s>")
PADDING = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8, "pad_type_id": 0}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
OPTIONS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def template(before: str = "<s>", after: str = "") -> processors.TemplateProcessing:
    single = " ".join(part for part in (before, "$A", after) if part)
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = template()
    return made


def llama3() -> Tokenizer:
    made = byte_level()
    split = pre_tokenizers.Split(Regex(r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template()])
    return made


def sentencepiece_like(scheme: str | None = "first") -> Tokenizer:
    """As LlamaTokenizer builds it, or with None as old converters did, with a normalizer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + fallback, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    unk = None if scheme == "first" else "<unk>"
    made = Tokenizer(models.BPE(model["vocab"], merges, fuse_unk=True, byte_fallback=True, unk_token=unk))
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    if scheme is None:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = template()
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = template(after="</s>")
    return made


def words(**options: Any) -> Tokenizer:
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, "word", "Lily", "a"])}, **options))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return made


def letters() -> Tokenizer:
    """Letters of DNA, without an unknown token: other text is dropped."""
    made = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def adding(make: Callable[[], Tokenizer], **options: Any) -> Callable[[], Tokenizer]:
    """Adds added tokens of every kind."""

    def made() -> Tokenizer:
        tokenizer = make()
        tokenizer.add_tokens([AddedToken("<ent>", **options), AddedToken("<lr>", lstrip=True, rstrip=True)])
        tokenizer.add_tokens([AddedToken("word", single_word=True), AddedToken("ﬁne", normalized=True)])
        tokenizer.add_special_tokens([AddedToken("<pad>", lstrip=True), AddedToken("<PAD>", rstrip=True)])
        return tokenizer

    return made


@dataclasses.dataclass
class Kind:
    """A tokenizer folder: tokenizer.json, changes to it, other files, and why transformers is needed, if it is."""

    make: Callable[[], Tokenizer]
    config: dict[str, Any] | None = None
    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    model_type: str = "llama"

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        content = json.loads(self.make().to_str()) | self.change
        files = {"tokenizer.json": content, "config.json": {"model_type": self.model_type}} | self.beside
        if self.config is not None:
            files["tokenizer_config.json"] = self.config
        for name, one in files.items():
            if one is not None:
                (folder / name).write_text(one if isinstance(one, str) else json.dumps(one), encoding="utf-8")


def vocab_and_merges(config: dict[str, Any]) -> Kind:
    model = json.loads(byte_level().to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"])
    beside = {"tokenizer.json": None, "vocab.json": model["vocab"], "merges.txt": merges}
    return Kind(byte_level, config, beside=beside, reason="no tokenizer.json")


def listed(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(i): OPTIONS | token for i, token in enumerate(tokens)}}


OURS = [{"content": token} for token in SPECIAL]
OTHER = "LlamaTokenizer builds another pipeline"
KINDS = {
    "byte-level BPE": Kind(byte_level, FAST),
    "byte-level BPE, nothing beside": Kind(byte_level),
    "byte-level BPE, called LlamaTokenizer": Kind(byte_level, LLAMA | {"tokenizer_class": "LlamaTokenizerFast"}),
    "byte-level BPE, called GPT2Tokenizer": Kind(byte_level, GPT2, reason="tokenizer_class GPT2Tokenizer"),
    "byte-level BPE, class in config.json": Kind(
        byte_level,
        beside={"config.json": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}},
        reason="tokenizer_class GPT2Tokenizer",
    ),
    "byte-level BPE, add_prefix_space": Kind(byte_level, FAST | {"add_prefix_space": True}, reason="add_prefix_space"),
    "Llama-3 pre-tokenizer": Kind(llama3, FAST),
    "Metaspace BPE with byte fallback": Kind(sentencepiece_like, LLAMA),
    "Metaspace BPE, unknown class": Kind(sentencepiece_like, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "Metaspace BPE, legacy": Kind(sentencepiece_like, LLAMA | {"legacy": True}, reason=OTHER),
    "Metaspace BPE, no prefix space": Kind(sentencepiece_like, LLAMA | {"add_prefix_space": False}, reason=OTHER),
    "Metaspace BPE, Mixtral": Kind(sentencepiece_like, LLAMA, reason=OTHER, model_type="mixtral"),
    "Llama-2 normalizer": Kind(lambda: sentencepiece_like(None), LLAMA, reason=OTHER),
    "Llama-2 normalizer, legacy": Kind(lambda: sentencepiece_like(None), LLAMA | {"legacy": True}, reason=OTHER),
    "Llama-2 normalizer, as it is": Kind(lambda: sentencepiece_like(None), FAST),
    "unigram with BOS and EOS": Kind(unigram, FAST),
    "unigram, called T5Tokenizer": Kind(
        unigram, {"tokenizer_class": "T5Tokenizer"}, reason="tokenizer_class T5Tokenizer"
    ),
    "WordPiece": Kind(word_piece, FAST),
    "word level": Kind(lambda: words(unk_token="<unk>"), FAST),
    "word level without unknown token": Kind(lambda: words(unk_token="[UNK]"), FAST),
    "letters without unknown token": Kind(letters, {"bos_token": "<s>", "eos_token": "</s>"}),
    "truncation block": Kind(byte_level, FAST, {"truncation": TRUNCATION}),
    "truncation block, LlamaTokenizer": Kind(sentencepiece_like, LLAMA, {"truncation": TRUNCATION}),
    "padding block": Kind(byte_level, FAST, {"padding": PADDING | {"pad_id": 2, "pad_token": "</s>"}}),
    "padding block with a new token": Kind(
        byte_level, FAST, {"padding": PADDING | {"pad_id": 0, "pad_token": "<pad>"}}, reason="special token '<pad>'"
    ),
    "added tokens": Kind(adding(byte_level), FAST),
    "added tokens, normalized": Kind(adding(unigram, normalized=True), FAST),
    "added tokens, single words": Kind(adding(llama3, single_word=True), FAST),
    "added tokens, LlamaTokenizer": Kind(adding(sentencepiece_like), LLAMA),
    "added tokens, Llama-2 normalizer": Kind(adding(lambda: sentencepiece_like(None)), LLAMA, reason=OTHER),
    "added tokens, listed too": Kind(byte_level, FAST | listed(*OURS)),
    "added tokens, listed with other options": Kind(
        byte_level, FAST | listed(OURS[0], OURS[1] | {"lstrip": True}, OURS[2]), reason="added tokens"
    ),
    "added tokens, only listed": Kind(
        byte_level,
        FAST | listed(*OURS, {"content": "<ent>", "special": False}, {"content": "<lr>", "rstrip": True}),
        reason="added tokens",
    ),
    "added tokens, some not listed, LlamaTokenizer": Kind(
        adding(sentencepiece_like), LLAMA | listed(*OURS), reason="added tokens"
    ),
    "added_tokens.json": Kind(byte_level, FAST, beside={"added_tokens.json": {"<ent>": 400}}, reason="added_tokens"),
    "special_tokens_map.json": Kind(
        byte_level,
        beside={"special_tokens_map.json": {"pad_token": OPTIONS | {"content": "<pad>", "lstrip": True}}},
        reason="special token '<pad>'",
    ),
    "pad token not in the file": Kind(byte_level, FAST | {"pad_token": "<pad>"}, reason="special token '<pad>'"),
    "additional special tokens": Kind(
        byte_level, FAST | {"additional_special_tokens": ["<ent>", "<lr>"]}, reason="special token '<ent>'"
    ),
    "special token that the file has as another": Kind(
        adding(byte_level), FAST | {"image_token": "<ent>"}, reason="special token '<ent>'"
    ),
    "two files that disagree": Kind(
        byte_level, FAST, beside={"special_tokens_map.json": {"bos_token": "<pad>"}}, reason="special token '<pad>'"
    ),
    "BOS that is an ordinary token": Kind(byte_level, FAST | {"bos_token": "a"}, reason="special token 'a'"),
    "add_bos_token, as the file does": Kind(byte_level, FAST | {"add_bos_token": True, "add_eos_token": False}),
    "add_eos_token, unlike the file": Kind(byte_level, FAST | {"add_eos_token": True}, reason="add_bos_token or"),
    "add_bos_token false, unlike the file": Kind(
        byte_level, FAST | {"add_bos_token": False}, reason="add_bos_token or"
    ),
    "no post-processor": Kind(byte_level, FAST, {"post_processor": None}),
    "no post-processor, add_bos_token": Kind(
        byte_level, FAST | {"add_bos_token": True}, {"post_processor": None}, reason="add_bos_token or"
    ),
    "split_special_tokens": Kind(byte_level, FAST | {"split_special_tokens": True}, reason="split_special_tokens"),
    "unknown key": Kind(byte_level, FAST | {"normalize": True}, reason="normalize"),
    "vocab.json and merges.txt": vocab_and_merges(GPT2),
    "vocab.json and merges.txt, Python": vocab_and_merges({"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}),
}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[list[str]]:
    """A table that ``pytest -s`` shows."""
    rows: list[str] = []
    yield rows
    print("\n\n| tokenizer | read by | ids compared | differing |\n|---|---|---|---|")
    print("\n".join(rows))


def config_of(vocab_size: int, **ids: Any) -> tli_jax.LlamaConfig:
    ids = {"bos_token_id": 1, "eos_token_ids": (2,)} | ids
    return tli_jax.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **ids,
    )


def outcome(call: Callable[[], list[int]]) -> list[int] | None:
    """Ids, or None if the text cannot be encoded."""
    try:
        return call()
    except Exception as error:  # the library's own, which transformers lets through, or ours
        if "Missing [UNK] token" not in str(error):
            raise
        return None


def compare(folder: Path, name: str, reason: str | None, table: list[str]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    why = why_transformers(folder)
    assert why is None if reason is None else reason in str(why)
    count, differing = 0, 0
    for parse in (False, True):
        ours: Any
        ours, _ = open_tokenizer(folder, config_of(10_000), parse)
        options = {} if parse else {"split_special_tokens": True}
        for text in TEXTS:
            with_affixes = outcome(lambda text=text, options=options: theirs(text, **options)["input_ids"])
            expected = outcome(
                lambda text=text, options=options: theirs.encode(text, add_special_tokens=False, **options)
            )
            ids = outcome(lambda text=text, ours=ours: ours.encode(text))
            assert ids == expected, (text, parse)
            assert ids is None or ours.prefix + ids + ours.suffix == with_affixes, (text, parse)
            count += len(ids or [])
            differing += ids != expected
            if ids is not None:
                assert ours.decode(with_affixes) == theirs.decode(
                    with_affixes, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        batch = [text for text in TEXTS if outcome(lambda text=text, ours=ours: ours.encode(text)) is not None]
        assert ours.encode_batch(batch) == [ours.encode(text) for text in batch]
    table.append(f"| {name} | {f'transformers: {why}' if why else 'tokenizers'} | {count:,} | {differing} |")


@pytest.mark.parametrize("name", KINDS)
def test_ids_equal_those_of_transformers(name: str, tmp_path: Path, table: list[str]) -> None:
    KINDS[name].write(tmp_path)
    compare(tmp_path, name, KINDS[name].reason, table)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_a_sentencepiece_model_alone(kind: str, tmp_path: Path, table: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=kind,
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    beside = {"config.json": {"model_type": "llama"}}
    if kind == "bpe":
        beside["tokenizer_config.json"] = LLAMA | {"add_bos_token": True}
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    compare(tmp_path, f"tokenizer.model, {kind}", "no tokenizer.json", table)


def folder_of(make: Callable[[], Tokenizer], folder: Path, **options: Any) -> Path:
    Kind(make, **options).write(folder)
    return folder


def test_special_tokens_are_text_unless_parsed(tmp_path: Path) -> None:
    folder = folder_of(sentencepiece_like, tmp_path, config=LLAMA)
    text, _ = open_tokenizer(folder, config_of(10_000))
    parse, _ = open_tokenizer(folder, config_of(10_000), parse_special=True)
    ids = text.encode("Lily <s>red</s> ball")
    assert not {1, 2} & set(ids) and text.decode(ids) == "Lily <s>red</s> ball"
    ids = parse.encode("Lily <s>red</s> ball")
    assert {1, 2} <= set(ids) and "<s>" not in parse.decode(ids)
    assert text.prefix == parse.prefix == [1]


def test_vocabulary_that_contains_special_tokens_is_a_warning(tmp_path: Path) -> None:
    folder = folder_of(lambda: words(unk_token="<unk>"), tmp_path, config=FAST)
    tokenizer, warnings = open_tokenizer(folder, config_of(6))
    assert tokenizer.encode("word <s> nothing") == [3, 1, 0]
    assert [one for one in warnings if "contains the special tokens '</s>', '<s>': in a text" in one]


def test_affixes_are_found_without_an_a_in_the_vocabulary(tmp_path: Path) -> None:
    tokenizer, warnings = open_tokenizer(folder_of(letters, tmp_path), config_of(6, bos_token_id=0, eos_token_ids=(1,)))
    assert (tokenizer.prefix, tokenizer.suffix, warnings) == ([0], [1], [])
    assert tokenizer.encode("GATTACA") == [4, 2, 5, 5, 2, 3, 2]


@pytest.mark.parametrize(("special", "token"), [(True, "<pad>"), (False, "<ent>")])
def test_added_token_outside_the_vocabulary_is_a_warning(special: bool, token: str, tmp_path: Path) -> None:
    def made() -> Tokenizer:
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken(token, special=special)])
        return tokenizer

    folder, size = folder_of(made, tmp_path), byte_level().get_vocab_size()
    tokenizer, warnings = open_tokenizer(folder, config_of(size), parse_special=True)
    assert warnings == [
        f"{folder}: the model's vocabulary of {size} lacks the tokenizer's added token '{token}' (id {size}): a text"
        " that contains it is refused"
    ]
    assert max(tokenizer.encode("Once upon a time")) < size
    with pytest.raises(DataError, match=rf"the text 'x{token}' contains '{token}' with id {size}, outside the"):
        tokenizer.encode_batch(["Once", f"x{token}"])
    if special:
        assert max(open_tokenizer(folder, config_of(size))[0].encode(f"x{token}")) < size
    with pytest.raises(DataError, match=f"the tokenizer has {size + 1} tokens, the model's vocabulary {size - 1}:"):
        open_tokenizer(folder, config_of(size - 1))


def test_prefix_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    processor = json.loads(template().__getstate__())
    processor["special_tokens"]["<s>"]["ids"] = [99_999]
    folder = folder_of(byte_level, tmp_path, change={"post_processor": processor})
    with pytest.raises(DataError, match="puts id 99,999 before a text, outside the model's vocabulary of 400"):
        open_tokenizer(folder, config_of(400))


@pytest.mark.parametrize(
    ("config", "beside", "ids", "expected"),
    [
        (FAST, {}, {}, None),
        (FAST, {"generation_config.json": {"bos_token_id": 1, "eos_token_id": [7, 2]}}, {}, None),
        (FAST, {}, {"eos_token_ids": (5, 2)}, None),
        (
            FAST,
            {},
            {"bos_token_id": 5, "eos_token_ids": (6, 7)},
            "bos_token_id is 5 in config.json, 1 in the tokenizer; eos_token_id is 6, 7 in config.json, 2 in the",
        ),
        (FAST, {}, {"bos_token_id": None}, "bos_token_id is none in config.json, 1 in the tokenizer"),
        (
            FAST,
            {"generation_config.json": {"eos_token_id": 9}},
            {},
            "eos_token_id is 2 in config.json, 9 in generation",
        ),
        (FAST | {"bos_token": "</s>"}, {}, {}, None),  # the prefix counts, not the name
    ],
)
def test_disagreeing_files_give_one_warning(
    config: dict[str, Any], beside: dict[str, Any], ids: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    folder = folder_of(byte_level, tmp_path, config=config, beside=beside)
    _, warnings = open_tokenizer(folder, config_of(byte_level().get_vocab_size(), **ids))
    assert len(warnings) == (expected is not None)
    if expected:
        assert expected in warnings[0] and warnings[0].endswith(": config.json is followed")


def test_code_gives_a_warning_and_is_never_run(tmp_path: Path) -> None:
    code = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my.MyTokenizer", None]}}
    folder = folder_of(adding(byte_level), tmp_path, config=FAST | code)
    (folder / "my.py").write_text("raise SystemExit('code was run')")
    tokenizer, warnings = open_tokenizer(folder, config_of(10_000))
    assert [one for one in warnings if "asks for code (my.MyTokenizer), which is neither run nor copied" in one]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    assert open_tokenizer(folder, config_of(10_000)) == (
        None,
        [f"{folder}: the tokenizer is code (my.MyTokenizer), which is never run: text cannot be read"],
    )


def test_vocabulary_that_its_class_does_not_read(tmp_path: Path) -> None:
    kind = vocab_and_merges(LLAMA)
    kind.write(tmp_path)
    with pytest.raises(DataError, match=r"LlamaTokenizer has 3 tokens, vocab.json \d+: name the class that reads it"):
        open_tokenizer(tmp_path, config_of(10_000))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer, (warning,) = open_tokenizer(tmp_path, config_of(10_000))
    assert tokenizer is None and "vocab.json does not name its tokenizer class" in warning


def pipe(file: Path) -> None:
    os.mkfifo(file)


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(10 * 2**30)


REPLACED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (pipe, "is not a regular file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "links to /dev/zero, outside the folder"),
    "elsewhere": (lambda file: file.symlink_to("/etc/passwd"), "outside the folder"),
    "nowhere": (lambda file: file.symlink_to("absent"), "links to a file that does not exist"),
    "circle": (lambda file: file.symlink_to(file.name), "links to a file that does not exist"),
    "huge": (huge, "has 10,737,418,240 bytes, the limit is"),
    "pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17209920\n"),
        "is a Git-LFS pointer, not the file itself: run 'git lfs pull'",
    ),
    "page": (lambda file: file.write_text("<!DOCTYPE html><title>Sign in</title>"), "is an HTML page"),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_special_files_and_links_are_refused_before_reading(name: str, replaced: str, tmp_path: Path) -> None:
    folder = folder_of(words, tmp_path)
    (folder / name).unlink(missing_ok=True)
    make, message = REPLACED[replaced]
    make(folder / name)
    with pytest.raises(DataError, match=message) as caught:
        open_tokenizer(folder, config_of(10_000))
    assert str(folder / name) in str(caught.value)
    with pytest.raises(DataError, match=message):
        sidecar.copy_allowed(folder, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[" * 100_000,
        '{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
        lambda one: one["post_processor"]["single"][0]["SpecialToken"].update(id="nope"),
        lambda one: one["post_processor"]["special_tokens"].clear(),
        lambda one: one["model"].update(merges=[["x", "y"]]),
    ],
)
def test_broken_file_is_one_line_and_panics_are_silent(content: Any, tmp_path: Path, capfd: Any) -> None:
    folder = folder_of(byte_level, tmp_path)
    if callable(content):
        one = json.loads((folder / "tokenizer.json").read_text())
        content(one)
        content = json.dumps(one)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"the tokenizer cannot be read \(.*\): fix or delete its files"):
        open_tokenizer(folder, config_of(10_000))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaForCausalLM"}', "is not a tokenizer"),
        ("tokenizer_config.json", '{"fast_tokenizer_files": ["../tokenizer.4.0.json"]}', "names the file '../tok"),
        ("tokenizer_config.json", '{"gguf_file": "/tmp/model.gguf"}', "names the file '/tmp/model.gguf'"),
        ("tokenizer_config.json", "[]", "must be a JSON object"),
        ("tokenizer_config.json", '{"additional_special_tokens": 3}', "the tokenizer cannot be read"),
        ("tokenizer_config.json", '{"bos_token": {"content": "<x>", "no": 1}}', "the tokenizer cannot be read"),
        ("added_tokens.json", '{"<x>": "y"}', "the tokenizer cannot be read"),
        ("special_tokens_map.json", "nothing", "is not JSON"),
    ],
)
def test_broken_settings_files_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = folder_of(byte_level, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_tokenizer(folder, config_of(10_000))


def test_text_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    tokenizer, _ = open_tokenizer(folder_of(lambda: words(unk_token="[UNK]"), tmp_path), config_of(6))
    with pytest.raises(DataError, match=r"cannot encode the text \(.*Missing \[UNK\] token"):
        tokenizer.encode("something")
    with pytest.raises(DataError, match="cannot encode the text"):
        tokenizer.encode("\ud800")


def test_usual_folder_does_not_import_transformers() -> None:
    code = (
        "import sys; from tli_jax.hf import hub, checkpoint, tokenizer; folder = hub.resolve('embedded');"
        "found, _ = tokenizer.open_tokenizer(folder, checkpoint.open_checkpoint(folder).config);"
        "print(len(found.encode('a')), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


def test_digest_covers_every_file_that_changes_ids(tmp_path: Path) -> None:
    folder = folder_of(byte_level, tmp_path, config=FAST)
    found = {tokenizer_digest(folder)}
    names = ["merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model"]
    for name in names:
        (folder / name).write_text("{}")
        found.add(tokenizer_digest(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        found.add(tokenizer_digest(folder))
    (folder / "config.json").write_text('{"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}')
    found.add(tokenizer_digest(folder))
    assert len(found) == len(names) + 4
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(folder) in found


def test_files_that_transformers_reads_are_copied_and_others_listed(tmp_path: Path) -> None:
    base, grown = folder_of(byte_level, tmp_path / "base", config=FAST), tmp_path / "grown"
    grown.mkdir()
    (base / "additional_chat_templates").mkdir()
    kept = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "generation_config.json")
    left = ("my.py", "additional_chat_templates/notes.txt", "adapter_config.json", "a\x1b[31m.txt", "params.json")
    unmissed = ("README.md", ".gitattributes", "growth.json", "model.safetensors", "pytorch_model.bin")
    for name in (*kept, *left, *unmissed):
        (base / name).write_text("{}")
    for name in ("original", ".cache", "LICENSES"):
        (base / name).mkdir()
    sidecar.copy_allowed(base, grown)
    names = {file.relative_to(grown).as_posix() for file in grown.rglob("*") if file.is_file()}
    assert names == {*kept, "tokenizer.json", "tokenizer_config.json"}
    assert transformers.AutoTokenizer.from_pretrained(grown).chat_template == {"default": "{}", "tool_use": "{}"}
    assert sidecar.left_behind(base) == [
        f"{base}: not copied: LICENSES/, a\\x1b[31m.txt, adapter_config.json,"
        " additional_chat_templates/notes.txt, my.py, original/, params.json"
    ]
    assert sidecar.left_behind(grown) == sidecar.left_behind(hub.resolve("embedded")) == []
    shutil.rmtree(base / "additional_chat_templates")
    (base / "additional_chat_templates").symlink_to("/etc")
    assert "tool_use" not in str(sidecar.allowed_files(base))
