"""The commands and Python snippets of the documentation run as written, links lead somewhere, and tables are current.

Blocks tagged ``bash``, ``sh``, ``console`` and ``python`` run in order, page by page, in one folder per page. An HTML
comment directly above a block changes that:

- ``<!-- not run: REASON -->`` skips the block;
- ``<!-- test flags of train: --steps 4 -->`` appends flags to ``tli-jax train`` in the block, to make it small.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Pages whose commands run in `make test`; those of the others run in `make test-long`.
QUICK = ("README.md", "docs/api.md", "docs/methods.md")
COMMAND = r"(?:tli-jax |python -m tli_jax\.)"
BASH = ("bash", "sh", "console")


class Block(NamedTuple):
    page: str
    line: int  # of the first line of code, from 1
    language: str
    code: str
    not_run: str | None
    flags: dict[str, str]  # of sub-commands

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str) -> Iterator[Block]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line.startswith("```"):
            above = start
            while above and re.fullmatch(r"<!-- .* -->", lines[above - 1]):
                above -= 1
            comments = "\n".join(lines[above:start])
            not_run = re.search(r"<!-- not run: (.*) -->", comments)
            flags = dict(re.findall(r"<!-- test flags of (\w+): (.*) -->", comments))
            code = "\n".join(lines[start + 1 : number])
            yield Block(page, start + 2, lines[start][3:].strip(), code, not_run[1] if not_run else None, flags)
            start = None


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def to_script(block: Block) -> str:
    """The commands of a block, with its test flags, as a script that reports the line of a failing command."""
    lines = block.code.splitlines()
    if block.language == "console":  # output is kept as empty lines, so that line numbers stay right
        lines = [line[2:] if line.startswith("$ ") else "" for line in lines]
    command = None
    for number, line in enumerate(lines):
        found = re.match(rf"{COMMAND}(\w+)", line)
        command = found[1] if found else command
        if command in block.flags and not line.endswith("\\"):
            words, comment = re.fullmatch(r"(.*?)(\s+#.*|\s*)", line).groups()
            lines[number] = f"{words} {block.flags[command]}{comment}"
        command = command if line.endswith("\\") else None
    trap = f"trap 'echo \"{block.page}:$((LINENO + {block.line - 2})): $BASH_COMMAND\" >&2' ERR"
    return "\n".join([f"set -euo pipefail; {trap}", *lines])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.not_run], ids=str)
def test_block_that_is_not_run(block):
    pytest.skip(f"{block}: {block.not_run}")


def test_every_command_is_in_a_block_that_runs_or_says_why_not():
    commands = rf"^(\$ )?({COMMAND}|make |pip |launch/|python benchmarks/)"
    untagged = [
        str(block)
        for block in BLOCKS
        if block.language not in BASH and not block.not_run and re.search(commands, block.code, re.MULTILINE)
    ]
    assert not untagged, f"tag these blocks as bash, or put <!-- not run: REASON --> above: {', '.join(untagged)}"


@pytest.fixture
def environment(tmp_path, compiled):
    """This interpreter's programs come first on PATH; one device, and the programs that other tests compiled."""
    programs = Path(sys.executable).parent
    if not (programs / "tli-jax").exists():  # the environment is older than the command
        shim = tmp_path / "bin" / "tli-jax"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tli_jax "$@"\n')
        shim.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{programs}:{os.environ['PATH']}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return os.environ | compiled | {"PATH": path, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""}


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.long) for page in PAGES]
)
def test_commands_and_snippets_run(page, tmp_path, environment):
    folder = tmp_path / "folder"
    folder.mkdir()
    if page != "README.md":  # whose steps start in an empty folder
        write_inputs(folder)
    for block in BLOCKS:
        if block.page != page or block.not_run:
            continue
        if block.language in BASH:
            call = ["bash", "-c", to_script(block)]
        elif block.language == "python":
            # Empty lines in front give tracebacks the line numbers of the page.
            call = [sys.executable, "-W", "error", "-c", "\n" * (block.line - 1) + block.code]
        else:
            continue
        done = subprocess.run(
            call, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
        )
        if done.returncode:
            pytest.fail(f"{block}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", False)


def write_inputs(folder: Path) -> None:
    """Small files under the names that the pages use for a reader's own, and the folders of the repository."""
    for name in ("configs", "benchmarks", "launch"):
        (folder / name).symlink_to(ROOT / name)
    rows = [f'{{"text": "def f{i}(x):\\n    return x + {i}\\n# Once upon a time {i}"}}\n' for i in range(400)]
    for name in ("corpus", "new", "old", "held_out"):
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "other.txt").write_text("import os\n" * 400)
    question = '{"context": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}\n'
    (folder / "questions.jsonl").write_text(question * 4)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md", "launch/README.md"])
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if ":" in path:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert heading in anchors, f"{page}: {target}"


@pytest.mark.parametrize(("page", "tables"), [("scaling.md", 1), ("methods.md", 2), ("results.md", 6)])
def test_tables_match_the_stored_results(page, tables):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"<!-- made by python (benchmarks/[^\n]+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(found) == tables
    for call, inside in found:
        call = [sys.executable, *call.split()]
        printed = subprocess.run(call, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        assert inside == printed and printed.count("\n") > 10, f"{page}: rerun {' '.join(call[1:])}"
