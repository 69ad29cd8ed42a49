"""The table of faults in docs/reliability.md: every fault has a row, and the tests it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|((?:[^|\n]*\|){4})$", PAGE, re.MULTILINE)


def test_every_fault_has_a_row():
    assert [int(number) for number, _ in ROWS] == list(range(1, 38))


@pytest.mark.parametrize(("number", "row"), ROWS, ids=[number for number, _ in ROWS])
def test_named_tests_exist(number, row):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
    assert named
    for file, name in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}"


def test_tables_match_the_stored_results():
    found = re.findall(r"<!-- made by python (benchmarks/[^\n]+) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert len(found) == 2
    for call, inside in found:
        made = subprocess.run([sys.executable, *call.split()], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert inside == made.stdout
