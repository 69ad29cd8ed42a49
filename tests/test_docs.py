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
    for page in ("README.md", "docs/api.md")
    for number in range(len(re.findall(r"^```python$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)))
]


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_example_runs(page, number, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[number]
    subprocess.run([sys.executable, "-W", "error", "-c", example], check=True, cwd=tmp_path, env=dict(os.environ))


def test_the_table_of_what_fits_is_the_one_of_the_results():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    inside = re.search(r"<!-- made by python (benchmarks/scaling.py --table) -->\n(.*)<!-- end -->", text, re.DOTALL)
    assert inside is not None
    call = [sys.executable, *inside[1].split()]
    made = subprocess.run(call, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    assert inside[2] == made and made.count("\n") > 10
