"""Multiple-choice tasks are read, and lines that are not questions are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tli_jax.errors import DataError, MissingInputError, UsageError
from tli_jax.evaluation.tasks import Question, Task, open_tasks

OWN = {"context": "One, two,", "choices": ["three", "one"], "answer": 0, "source": "ignored"}


def write(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return file


def test_own_format(tmp_path) -> None:
    (task,) = open_tasks([str(write(tmp_path / "counting.jsonl", OWN, OWN))])
    assert task.name == "counting" and task.examples == ()
    assert task.questions == (Question("One, two,", ("three", "one"), 0),) * 2


def test_windows_newlines_and_byte_order_mark(tmp_path) -> None:
    rows = json.dumps(OWN).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows + b"\r\n\r\n" + rows)
    (tmp_path / "b.jsonl").write_bytes(rows + b"\n" + rows)
    marked, plain = open_tasks([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert marked.questions == plain.questions


@pytest.mark.parametrize(
    ("row", "context", "choices"),
    [
        ({"paragraph": "P.", "question": "Q?", "label": 1}, "P. 질문: Q? 답변: ", ("아니오", "예")),
        (
            {"premise": "P.", "question": "원인", "alternative_1": "A", "alternative_2": "B", "label": 1},
            "P.  왜냐하면",
            ("A", "B"),
        ),
        (
            {"premise": "P.", "question": "결과", "alternative_1": "A", "alternative_2": "B", "label": 1},
            "P.  그래서",
            ("A", "B"),
        ),
        (
            {"word": "w", "context_1": "[w] a", "context_2": "b [w]", "label": 1},
            "문장1: [w] a 문장2: b [w] 두 문장에서 w가 같은 뜻으로 쓰였나?",
            ("아니오", "예"),
        ),
        (
            {"context": "C.", "ending_1": "A", "ending_2": "B", "ending_3": "D", "ending_4": "E", "label": 1},
            "문장: C.",
            ("A", "B", "D", "E"),
        ),
        ({"sentence": "S", "label": 1}, "문장: S 긍부정:", ("부정", "긍정")),
    ],
)
def test_kobest_prompts(tmp_path, row, context, choices) -> None:
    (task,) = open_tasks([str(write(tmp_path / "one" / "test.jsonl", row).parent)])
    assert task.name == "one" and task.questions == (Question(context, choices, 1),)


def test_folder_of_folders(tmp_path) -> None:
    for name in ("b", "a"):
        write(tmp_path / name / "test.jsonl", OWN)
        write(tmp_path / name / "train.jsonl", OWN, OWN)
    write(tmp_path / "no_task" / "other.jsonl", OWN)
    found = open_tasks([str(tmp_path)])
    assert [task.name for task in found] == ["a", "b"] and len(found[0].examples) == 2


def test_examples_precede_the_question() -> None:
    solved = tuple(Question(f"{n} is", ("even", "odd"), n % 2) for n in range(9))
    task = Task("parity", (Question("10 is", ("even", "odd"), 0), Question("11 is", ("even", "odd"), 1)), solved)
    assert task.prompt(0, 0, seed=0) == "10 is"
    *shown, last = task.prompt(0, 3, seed=0).split("\n\n")
    assert last == "10 is" and len(set(shown)) == 3
    assert all(int(line.split()[0]) % 2 == (line.split()[2] == "odd") for line in shown)
    assert task.prompt(0, 3, seed=0) == task.prompt(0, 3, seed=0)
    samples = {task.prompt(number, 3, seed).rsplit("\n\n", 1)[0] for number in (0, 1) for seed in range(3)}
    assert len(samples) > 3  # each question and seed has its own
    with pytest.raises(UsageError, match="has 9 examples"):
        task.prompt(0, 10, seed=0)


def test_embedded_task() -> None:
    (task,) = open_tasks(["embedded"])
    assert task.name == "next_line" and len(task.questions) == 200
    assert task.digest == open_tasks(["embedded"])[0].digest
    counts = [sum(question.answer == n for question in task.questions) for n in range(4)]
    assert min(counts) > 25  # 50 expected: the answer's position is random
    for question in task.questions:
        assert len(set(question.choices)) == 4 and question.context.count("\n") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "line 1: is not a question"),
        ("{", "line 1: is not a question"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "choices must be a list of two or more texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2, must be an integer from 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "1"}', "answer is '1', must be an integer from 0 to 1"),
        ('{"sentence": "a", "label": 2}', "label is 2, must be an integer from 0 to 1"),
        ('{"text": "a"}', "has keys text, must have those of one of: context, choices, answer;"),
        ("", "contains no questions"),
        ('{"context": "a", "choices": ["b", "b"], "answer": 0}', "two choices are the same"),
        ('{"context": "a", "choices": ["b", " "], "answer": 0}', "a choice is empty"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 0, "answer": 1}', "a key appears twice"),
        ('{"context": "a", "choices": ["b", "\\ud800"], "answer": 0}', "choices[1] contains a lone surrogate"),
        ('{"context": "a", "choices": ["b", 1], "answer": 0}', "choices[1] is not text"),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "context is not text"),
        ('{"context": "a", "choices": "bc", "answer": 0}', "choices must be a list of two or more texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer is True, must be an integer from 0 to 1"),
        ('{"sentence": ["a"], "label": 0}', "sentence is not text"),
        (
            '{"premise": "p", "question": "why", "alternative_1": "a", "alternative_2": "b", "label": 0}',
            "question must be 원인 or 결과",
        ),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("<!doctype html>\n", "is an HTML page"),
        ("\udcff", "line 1: is not a question"),
    ],
)
def test_invalid_questions_are_refused(tmp_path, text, message) -> None:
    file = tmp_path / "task.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="task") as caught:
        open_tasks([str(file)])
    assert message in str(caught.value)


def test_missing_paths_and_duplicate_names_are_refused(tmp_path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        open_tasks([str(tmp_path / "nowhere")])
    files = [str(write(tmp_path / name / "task.jsonl", OWN)) for name in ("a", "b")]
    with pytest.raises(UsageError, match="two are named task"):
        open_tasks(files)
