"""The commands and Python snippets of the documentation run as written, links lead somewhere, and tables are current.

Blocks of shell commands and of Python run in order, page by page, in one folder per page. Numbers that make a command
slow, such as ``--steps 2000``, are reduced (``SMALL``). ``<!-- not run: REASON -->`` above a block skips it.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Pages whose commands run in `make test`; those of the others run in `make test-long`.
QUICK = ("README.md", "docs/api.md")
# Largest numbers of options that decide how long a command takes.
SMALL = {"steps": 4, "warmup": 1, "seeds": 1, "batch-size": 2, "sequence-length": 64, "limit": 4, "tokens": 64}
SHELL = ("bash", "sh", "console")
# The first words of commands in blocks without a language.
COMMAND = re.compile(r"^(\$ )?(tli-jax |python -m tli_jax|python benchmarks/|make |pip |launch/)", re.MULTILINE)


class Block(NamedTuple):
    page: str
    line: int  # of the first line of code, from 1
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str) -> Iterator[Block]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line.startswith("```"):
            code = "\n".join(lines[start + 1 : number])
            language = lines[start][3:].strip() or ("bash" if COMMAND.search(code) else "")
            not_run = re.fullmatch(r"<!-- not run: (.*) -->", lines[start - 1])
            yield Block(page, start + 2, language, code, not_run[1] if not_run else None)
            start = None


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def to_script(block: Block) -> str:
    """The commands of a block, with small numbers, as a script that reports the line of a failing command."""
    lines = block.code.splitlines()
    if block.language == "console":  # empty lines in place of output keep the line numbers
        lines = [line[2:] if line.startswith("$ ") else "" for line in lines]
    small = [
        re.sub(r"--(?:\w+\.)?([\w-]+) (\d+)\b", lambda m: m[0][: m.start(2) - m.start()] + _reduce(m[1], m[2]), line)
        for line in lines
    ]
    trap = f"trap 'echo \"{block.page}:$((LINENO + {block.line - 2})): $BASH_COMMAND\" >&2' ERR"
    return "\n".join([f"set -euo pipefail; {trap}", *small])


def to_program(blocks: Iterable[Block]) -> list[str]:
    """Consecutive snippets as one program, because imports are slow. Each has globals of its own."""
    # Empty lines in front give tracebacks the line numbers of the page.
    codes = [(block.page, "\n" * (block.line - 1) + block.code) for block in blocks]
    run = f"for page, code in {codes!r}: exec(compile(code, page, 'exec'), {{'__name__': '__main__'}})"
    return [sys.executable, "-W", "error", "-c", run]


def _reduce(option: str, value: str) -> str:
    return str(min(int(value), SMALL.get(option, int(value))))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.not_run], ids=str)
def test_block_that_is_not_run(block):
    pytest.skip(f"{block}: {block.not_run}")


@pytest.fixture
def environment(compiled):
    """This interpreter's programs come first on PATH; one device, and the programs that other tests compiled."""
    programs = Path(sys.executable).parent
    path = f"{programs}:{os.environ['PATH']}"
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
    blocks = [block for block in BLOCKS if block.page == page and not block.not_run]
    blocks = [block for block in blocks if block.language in (*SHELL, "python")]
    for is_python, group in itertools.groupby(blocks, lambda block: block.language == "python"):
        consecutive = list(group)
        for call in [to_program(consecutive)] if is_python else [["bash", "-c", to_script(b)] for b in consecutive]:
            done = subprocess.run(
                call, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
            )
            if done.returncode:
                pytest.fail(f"{page}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", False)


def write_inputs(folder: Path) -> None:
    """Small files under the names that the pages use for a reader's own, and the folders of the repository."""
    for name in ("configs", "benchmarks", "launch"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("DIR", "DIR_OR_HUB_ID"):
        (folder / name).symlink_to(ROOT / "tli_jax" / "assets" / "base")
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


@pytest.mark.parametrize(
    ("page", "tables"), [("scaling.md", 2), ("methods.md", 2), ("results.md", 4), ("toy_results.md", 6)]
)
def test_tables_match_the_stored_results(page, tables):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"<!-- made by python (benchmarks/[^\n]+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(found) == tables
    for call, inside in found:
        call = [sys.executable, *call.split()]
        printed = subprocess.run(call, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        assert inside == printed and printed.count("\n") > 5, f"{page}: rerun {' '.join(call[1:])}"


@pytest.mark.long
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the text is part of Python, the losses are 3.11.7's")
@pytest.mark.parametrize(("only", "row"), [("injected", "injected layers"), ("all", "all layers")])
def test_losses_of_the_demo(tmp_path, only, row):
    """Of README and configuration, with the flags of XLA that users have."""
    flags = [f"--output={tmp_path}/grown", f"--train.run={tmp_path}/run", f"--train.export={tmp_path}/out"]
    call = [sys.executable, "-m", "tli_jax.upscale", "--config=configs/demo_train.yaml", f"--train.only={only}", *flags]
    subprocess.run(call, check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, timeout=1200)
    found = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))["losses"]
    before, after = (f"{found[key]:.3f}" for key in ("validation_before", "validation_after"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| base, 12 layers | {before} |" in readme and f"| grown, 18 layers, untrained | {before} |" in readme
    assert re.search(rf"\| grown, {row} trained .*\| {after} \|", readme)
    assert f"{before} → {after}" in (ROOT / "configs" / "demo_train.yaml").read_text(encoding="utf-8")
    if only == "injected":
        assert f"from {before} to {after} nats per token" in readme


def test_memory_in_the_configurations_is_that_of_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, set[str]] = {}
    for row in stored.values():
        config = re.search(r"configs/\S+", row["command"])[0]
        found.setdefault(config, set()).update(f"{row['step'][key] / 2**30:.1f}" for key in ("peak", "limit"))
    for config, peaks in found.items():
        head = (ROOT / config).read_text(encoding="utf-8").partition("Hardware:")[2].partition("Peak memory")[0]
        assert (claims := re.findall(r"\b\d+\.\d\b", head)) and peaks.issuperset(claims), f"{config}: {claims} {peaks}"
