"""Multiple-choice tasks out of JSONL files: one format of our own, and the five of KoBEST (arXiv 2204.04541).

KoBEST's prompts are those of lm-evaluation-harness, so that figures can be held against others'.
"""

import codecs
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic.dataclasses import dataclass

from tli_jax.data.embedded import held_out_modules
from tli_jax.data.formats import HEAD, recognise
from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.hf.hub import EMBEDDED

_LARGEST = 2**27  # bytes; all questions of MMLU take 10 MB
# Of the task that the package makes for itself.
_QUESTIONS, _LINES_BEFORE, _CHOICES = 200, 4, 4


class Question(NamedTuple):
    """What stands in front, and what may follow it, after a space; ``answer`` counts the choices from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and solved ones (``examples``) to show in front of them."""

    name: str
    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over all that is asked, and what is right."""
        return hashlib.sha256(json.dumps([self.questions, self.examples]).encode()).hexdigest()

    def prompt(self, number: int, shots: int, seed: int) -> str:
        """The context of a question, after solved examples drawn for it, blank lines between.

        Raises:
            UsageError: there are fewer examples.
        """
        context = self.questions[number].context
        if not shots:
            return context
        if len(self.examples) < shots:
            raise UsageError(f"shots is {shots}: {self.name} has {len(self.examples)} examples in its train.jsonl")
        drawn = random.Random(f"{seed} {number}").sample(self.examples, shots)
        return "\n\n".join([*(f"{one.context} {one.choices[one.answer]}" for one in drawn), context])


def open_tasks(paths: Sequence[str]) -> list[Task]:
    """Read tasks.

    Args:
        paths: each a JSONL file; a folder with ``test.jsonl`` in it, whose name is the task's; a folder of such
            folders; or the word ``embedded``, see ``make_embedded``. Examples are in ``train.jsonl`` beside it.

    Raises:
        MissingInputError: nothing is there.
        DataError: a line is no question; names it.
        UsageError: two are called the same.
    """
    found = [task for path in paths for task in _open(path)]
    names = [task.name for task in found]
    if twins := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"tasks: two are called {', '.join(sorted(twins))}: rename a file or folder")
    return found


def _open(path: str) -> Iterator[Task]:
    place = Path(path)
    if path == EMBEDDED and not place.exists():
        yield make_embedded()
    elif place.is_file():
        yield _read_task(place.stem, place)
    elif (place / "test.jsonl").is_file():
        yield _read_task(place.name, place / "test.jsonl")
    elif files := sorted(place.glob("*/test.jsonl")):
        yield from (_read_task(file.parent.name, file) for file in files)
    else:
        raise MissingInputError(f"tasks: {path}: is no JSONL file, and no folder with test.jsonl in it or below it")


def _read_task(name: str, file: Path) -> Task:
    train = file.with_name("train.jsonl")
    has_examples = train.is_file() and train != file
    # A name that is not UTF-8 is shown with escapes.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Task(name, _read(file), _read(train) if has_examples else ())


def _read(file: Path) -> tuple[Question, ...]:
    found = []
    if (size := file.stat().st_size) > _LARGEST:
        raise DataError(f"{file}: has {size:,} bytes, more than the {_LARGEST:,} that questions may have: split it")
    with file.open("rb") as lines:
        if what := recognise(lines.read(HEAD)):
            raise DataError(f"{file}: is {what}: give JSON lines")
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                kind = _kind(json.loads(line, object_pairs_hook=_refuse_twice))
                found.append(_check(pydantic.TypeAdapter(kind).validate_json(line).ask()))
            except (ValueError, RecursionError) as error:
                why = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
                what = f"{'.'.join(map(str, why['loc']))}: {why['msg']}" if why else str(error)
                raise DataError(f"{file}: line {number}: is not a question ({what}): fix it") from None
    if not found:
        raise DataError(f"{file}: has no questions in it")
    return tuple(found)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("has a key twice")
    return row


def _check(question: Question) -> Question:
    """Refuse choices among which none can be told right."""
    if any(not choice.strip() for choice in question.choices):
        raise ValueError("a choice is empty")
    if len(set(question.choices)) < len(question.choices):
        raise ValueError("two choices are the same")
    return question


def _kind(row: object) -> type["_Row"]:
    """By the keys that a row has."""
    keys = row.keys() if isinstance(row, dict) else ()
    for kind in _KINDS:
        if all(field.name in keys for field in dataclasses.fields(kind)):
            return kind
    known = "; ".join(", ".join(field.name for field in dataclasses.fields(kind)) for kind in _KINDS)
    raise ValueError(f"has keys {', '.join(map(str, keys)) or 'none'}; known are {known}")


_STRICT = pydantic.ConfigDict(extra="ignore", strict=True)


@dataclass(frozen=True, config=_STRICT)
class _MultipleChoice:
    context: str
    choices: Annotated[list[str], pydantic.Field(min_length=2)]
    answer: Annotated[int, pydantic.Field(ge=0)]

    def ask(self) -> Question:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, choices count from 0 to {len(self.choices) - 1}")
        return Question(self.context, tuple(self.choices), self.answer)


@dataclass(frozen=True, config=_STRICT)
class _BoolQ:
    paragraph: str
    question: str
    label: Literal[0, 1]

    def ask(self) -> Question:
        return Question(f"{self.paragraph} 질문: {self.question} 답변: ", ("아니오", "예"), self.label)


@dataclass(frozen=True, config=_STRICT)
class _Copa:
    premise: str
    question: Literal["원인", "결과"]
    alternative_1: str
    alternative_2: str
    label: Literal[0, 1]

    def ask(self) -> Question:
        connector = {"원인": " 왜냐하면", "결과": " 그래서"}[self.question]
        return Question(f"{self.premise} {connector}", (self.alternative_1, self.alternative_2), self.label)


@dataclass(frozen=True, config=_STRICT)
class _WiC:
    word: str
    context_1: str
    context_2: str
    label: Literal[0, 1]

    def ask(self) -> Question:
        question = f"두 문장에서 {self.word}가 같은 뜻으로 쓰였나?"
        return Question(f"문장1: {self.context_1} 문장2: {self.context_2} {question}", ("아니오", "예"), self.label)


@dataclass(frozen=True, config=_STRICT)
class _HellaSwag:
    context: str
    ending_1: str
    ending_2: str
    ending_3: str
    ending_4: str
    label: Literal[0, 1, 2, 3]

    def ask(self) -> Question:
        endings = (self.ending_1, self.ending_2, self.ending_3, self.ending_4)
        return Question(f"문장: {self.context}", endings, self.label)


@dataclass(frozen=True, config=_STRICT)
class _SentiNeg:
    sentence: str
    label: Literal[0, 1]

    def ask(self) -> Question:
        return Question(f"문장: {self.sentence} 긍부정:", ("부정", "긍정"), self.label)


_Row = _MultipleChoice | _BoolQ | _Copa | _WiC | _HellaSwag | _SentiNeg
_KINDS: tuple[type[_Row], ...] = (_MultipleChoice, _BoolQ, _Copa, _WiC, _HellaSwag, _SentiNeg)


def make_embedded() -> Task:
    """Which line comes next, in modules held out of the embedded base's training: the true one, or one of three others
    of the same module; 200 questions, spread over the modules. Another Python's library gives other questions."""
    draw, found = random.Random(0), []
    for text in held_out_modules():
        lines = text.splitlines()
        # Within a block, so that a space stands in front of the line.
        inside = [i for i, line in enumerate(lines) if i >= _LINES_BEFORE and line.startswith(" ") and line.strip()]
        for i in inside:
            others = sorted({lines[j].strip() for j in inside} - {lines[i].strip()})
            if len(others) >= _CHOICES - 1:
                found.append((lines, i, others))
    questions = []
    for lines, i, others in draw.sample(found, _QUESTIONS):
        line = lines[i].strip()
        choices = draw.sample([line, *draw.sample(others, _CHOICES - 1)], _CHOICES)
        indent = lines[i][: len(lines[i]) - len(lines[i].lstrip()) - 1]
        context = "\n".join([*lines[i - _LINES_BEFORE : i], indent])
        questions.append(Question(context, tuple(choices), choices.index(line)))
    return Task("next_line", tuple(questions))
