"""The first of several processes tokenizes and hashes the text; the others wait for it and trust it. Real processes."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from tli_jax import prepare
from tli_jax.cli.frame import run_command
from tli_jax.data.embedded import embedded_text

# Opens the text of each case, one after the other, and prints what came of it.
SCRIPT = """
import json, sys
from pathlib import Path
from tli_jax.cli.train_config import TrainConfig
from tli_jax.cli.values import Source
from tli_jax.distributed import processes
from tli_jax.errors import TliError
from tli_jax.hf import hub
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.training.text import open_text

process, file, *cases = sys.argv[1:]
base = hub.resolve("embedded")
model = open_checkpoint(base).config
results = []
with processes.joined(False, process):
    tokenizer, _ = open_tokenizer(base, model)
    known = ()
    for text, cache in (case.split(":") for case in cases):
        config = TrainConfig(text=(Source(text),))
        try:
            data = open_text(config, model, base, tokenizer, 64, Path(cache), known)
            known = data.sources
            results.append([data.digest, [int(i) for i in data.training[0][0][1][0][:9]]])
        except TliError as error:
            results.append([type(error).__name__, str(error)])
Path(file).write_text(json.dumps(results))
processes.leave(0)
"""


@pytest.fixture
def pair(tmp_path):
    """Run the script in two processes, with the cases of each. Returns their results and what they print."""

    def pair(*cases):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
        started = []
        for index, words in enumerate(cases):
            call = [sys.executable, "-W", "error", "-c", SCRIPT, f"{index}/2@{address}", str(tmp_path / str(index))]
            options = {"env": os.environ | device, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*call, *words], **options))
        errors = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], errors
        return [json.loads((tmp_path / str(index)).read_text()) for index in (0, 1)], errors

    return pair


@pytest.mark.all_cores
def test_the_first_process_checks_and_the_others_trust_it(pair, tmp_path):
    text, changed = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text(embedded_text()[:20_000])
    changed.write_text("b" + text.read_text())
    call = ["--model=embedded", f"--text={text}", f"--output={tmp_path / 'prepared'}", "--workers=1"]
    assert run_command(prepare.main, call) == 0
    shutil.copytree(tmp_path / "prepared", tmp_path / "copy")
    first, second = str(tmp_path / "cache"), str(tmp_path / "other cache")
    # The text and cache of the first process, then of the second.
    cases = {
        "shared": ((text, first), (text, first)),
        "not read again": ((text, first), (changed, first)),
        "another machine": ((text, first), (text, second)),
        "another text": ((text, first), (changed, tmp_path / "third cache")),
        "prepared": ((tmp_path / "prepared", first), (tmp_path / "copy", first)),
        "missing": ((tmp_path / "none.txt", tmp_path / "empty"), (text, first)),
    }
    columns = zip(*cases.values(), strict=True)
    results, errors = pair(*([f"{path}:{cache}" for path, cache in column] for column in columns))
    found = dict(zip(cases, zip(*results, strict=True), strict=True))
    expected, _ = found["shared"]
    for name in ("shared", "not read again", "another machine", "prepared"):
        assert found[name] == (expected, expected), name
    assert found["another text"][0] == expected
    kind, message = found["another text"][1]
    assert kind == "DataError" and f"{changed}: differs from the one that the first process reads" in message
    missing, same = found["missing"]
    assert missing == same and missing[0] == "MissingInputError" and "none.txt: no such file or folder" in missing[1]
    assert [err.count("tokenize a.txt done") for err in errors] == [1, 1]  # the second, into its own cache
