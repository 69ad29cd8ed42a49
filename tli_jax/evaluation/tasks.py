"""Multiple-choice tasks from JSONL files: one format of our own, and the five of KoBEST (arXiv 2204.04541).

KoBEST's prompts are those of lm-evaluation-harness, so results are comparable with published ones.
"""

import codecs
import dataclasses
import hashlib
import json
import random
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tli_jax.data.embedded import held_out_modules
from tli_jax.data.formats import HEAD, recognize
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.hf.hub import EMBEDDED

_MAX_BYTES = 2**27  # all questions of MMLU take 10 MB

# KoBEST's rows by their keys: the context, and the choices in the order of the label.
_KOBEST = {
    ("paragraph", "question", "label"): ("{paragraph} 질문: {question} 답변: ", ("아니오", "예")),
    ("premise", "question", "alternative_1", "alternative_2", "label"): (
        "{premise} {connector}",
        ("{alternative_1}", "{alternative_2}"),
    ),
    ("word", "context_1", "context_2", "label"): (
        "문장1: {context_1} 문장2: {context_2} 두 문장에서 {word}가 같은 뜻으로 쓰였나?",
        ("아니오", "예"),
    ),
    ("context", "ending_1", "ending_2", "ending_3", "ending_4", "label"): (
        "문장: {context}",
        ("{ending_1}", "{ending_2}", "{ending_3}", "{ending_4}"),
    ),
    ("sentence", "label"): ("문장: {sentence} 긍부정:", ("부정", "긍정")),
}
_COPA_CONNECTORS = {"원인": " 왜냐하면", "결과": " 그래서"}
_OWN_KEYS = ("context", "choices", "answer")

# The task made of Python's standard library.
_QUESTIONS, _CONTEXT_LINES, _CHOICES = 200, 4, 4


class Question(NamedTuple):
    """A context, the choices that may follow it after a space, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and solved ones (``examples``) for few-shot prompts."""

    name: str
    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over questions, answers and examples."""
        return hashlib.sha256(json.dumps([self.questions, self.examples]).encode()).hexdigest()

    def prompt(self, number: int, shots: int, seed: int) -> str:
        """The context of a question, after solved examples sampled for it, separated by blank lines.

        Raises:
            UsageError: there are fewer examples.
        """
        context = self.questions[number].context
        if not shots:
            return context
        if len(self.examples) < shots:
            raise UsageError(f"shots is {shots}: {self.name} has {len(self.examples)} examples in its train.jsonl")
        sample = random.Random(f"{seed} {number}").sample(self.examples, shots)
        return "\n\n".join([*(f"{shown.context} {shown.choices[shown.answer]}" for shown in sample), context])


def open_tasks(paths: Sequence[str]) -> list[Task]:
    """Read tasks.

    Args:
        paths: each is a JSONL file, a folder with ``test.jsonl``, a folder of such folders, or the word ``embedded``
            (see ``make_embedded``). A task is named after its file or folder. Examples are in ``train.jsonl``.

    Raises:
        MissingInputError: a path does not exist.
        DataError: a line is not a question.
        UsageError: two tasks have the same name.
    """
    tasks = [task for path in paths for task in _open(path)]
    names = [task.name for task in tasks]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"tasks: two are named {', '.join(sorted(duplicates))}: rename a file or folder")
    return tasks


def _open(text: str) -> Iterator[Task]:
    path = Path(text)
    if text == EMBEDDED and not path.exists():
        yield make_embedded()
    elif path.is_file():
        yield _read_task(path.stem, path)
    elif (path / "test.jsonl").is_file():
        yield _read_task(path.name, path / "test.jsonl")
    elif files := sorted(path.glob("*/test.jsonl")):
        yield from (_read_task(file.parent.name, file) for file in files)
    else:
        raise MissingInputError(f"tasks: {text}: not a JSONL file, nor a folder that contains test.jsonl files")


def _read_task(name: str, file: Path) -> Task:
    train = file.with_name("train.jsonl")
    has_examples = train.is_file() and train != file
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # JSON must be able to hold it
    return Task(name, _read_questions(file), _read_questions(train) if has_examples else ())


def _read_questions(file: Path) -> tuple[Question, ...]:
    questions = []
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise DataError(f"{file}: has {size:,} bytes, more than the {_MAX_BYTES:,} allowed for questions: split it")
    with file.open("rb") as lines:
        if content := recognize(lines.read(HEAD)):
            raise DataError(f"{file}: is {content}: give JSON lines")
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                questions.append(_parse(json.loads(line.decode(), object_pairs_hook=_unique)))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}: line {number}: is not a question ({error}): fix it") from None
    if not questions:
        raise DataError(f"{file}: contains no questions: choose another file")
    return tuple(questions)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key appears twice")
    return row


def _parse(row: Any) -> Question:
    """Raises ValueError: the row is not a question, or no choice can be told right."""
    keys = tuple(row) if isinstance(row, dict) else ()
    known = next((names for names in (_OWN_KEYS, *_KOBEST) if set(names) <= set(keys)), None)
    if known is None:
        formats = "; ".join(", ".join(names) for names in (_OWN_KEYS, *_KOBEST))
        raise ValueError(f"has keys {', '.join(keys) or 'none'}, must have those of one of: {formats}")
    answer_key = known[-1]
    texts = {name: row[name] for name in known if name not in ("choices", answer_key)}
    if known is _OWN_KEYS:
        if not isinstance(row["choices"], list) or len(row["choices"]) < 2:
            raise ValueError("choices must be a list of two or more texts")
        _check_texts(texts | {f"choices[{i}]": choice for i, choice in enumerate(row["choices"])})
        context, choices = row["context"], tuple(row["choices"])
    else:
        _check_texts(texts)
        if "premise" in texts:
            if texts["question"] not in _COPA_CONNECTORS:
                raise ValueError(f"question must be {' or '.join(_COPA_CONNECTORS)}")
            texts["connector"] = _COPA_CONNECTORS[texts["question"]]
        context, *choices = (template.format(**texts) for template in (_KOBEST[known][0], *_KOBEST[known][1]))
    answer = row[answer_key]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{answer_key} is {reprlib.repr(answer)}, must be an integer from 0 to {len(choices) - 1}")
    if any(not choice.strip() for choice in choices):
        raise ValueError("a choice is empty")
    if len(set(choices)) < len(choices):
        raise ValueError("two choices are the same")
    return Question(context, tuple(choices), answer)


def _check_texts(texts: dict[str, Any]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} contains a lone surrogate") from None


def make_embedded() -> Task:
    """Make the task ``next_line``: which of four lines of a module comes next?

    Its 200 questions are spread over the standard-library modules that were held out of the embedded base's training.
    Each offers the true line and three others of the same module. Another version of Python gives other questions.
    """
    rng, candidates = random.Random(0), []
    for text in held_out_modules():
        lines = text.splitlines()
        # Indented lines only, because a space precedes every choice.
        indented = [i for i, line in enumerate(lines) if i >= _CONTEXT_LINES and line.startswith(" ") and line.strip()]
        for i in indented:
            others = sorted({lines[j].strip() for j in indented} - {lines[i].strip()})
            if len(others) >= _CHOICES - 1:
                candidates.append((lines, i, others))
    questions = []
    for lines, i, others in rng.sample(candidates, _QUESTIONS):
        line = lines[i].strip()
        choices = rng.sample([line, *rng.sample(others, _CHOICES - 1)], _CHOICES)
        indent = lines[i][: len(lines[i]) - len(lines[i].lstrip()) - 1]
        context = "\n".join([*lines[i - _CONTEXT_LINES : i], indent])
        questions.append(Question(context, tuple(choices), choices.index(line)))
    return Task("next_line", tuple(questions))
