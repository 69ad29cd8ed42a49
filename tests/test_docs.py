"""The examples in the documentation, run as somebody would who pastes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    (page, number)
    for page in ("README.md", "docs/api.md", "docs/methods.md")
    for number in range(len(re.findall(r"^```python$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)))
]


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_example_runs(page, number, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[number]
    subprocess.run([sys.executable, "-W", "error", "-c", example], check=True, cwd=tmp_path, env=dict(os.environ))


@pytest.mark.parametrize(("page", "tables"), [("scaling.md", 1), ("methods.md", 2), ("results.md", 6)])
def test_tables_are_those_of_the_results(page, tables):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"<!-- made by python (benchmarks/[^\n]+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(found) == tables
    for call, inside in found:
        call = [sys.executable, *call.split()]
        made = subprocess.run(call, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        assert inside == made and made.count("\n") > 10
