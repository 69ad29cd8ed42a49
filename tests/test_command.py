"""Output is safe to print, and every kind of system error has its exit code."""

import contextlib
import errno
import io
import json
import os
import pty
import sys
from pathlib import Path

import pytest
import rich.table

from tli_jax.cli.console import console, finite, logging_to, print_json, say, to_json, warn
from tli_jax.cli.frame import run_command
from tli_jax.cli.progress import progress

# Markup, an emoji code, an escape sequence, a bell, a C1 control, a right-to-left override, an undecodable byte.
NAME = "[red]a[/b] :smile: \x1b]0;t\a\x9b31m\u202e\udcff$x_y$"
SHOWN = r"[red]a[/b] :smile: \x1b]0;t\x07\x9b31m\u202e\udcff$x_y$"


def print_everything() -> None:
    """Print a name everywhere a name can appear."""
    screen = console()
    table = rich.table.Table(NAME, title=NAME, caption=NAME)
    table.add_row(NAME)
    screen.print(table)
    screen.print(NAME)
    screen.print(NAME, style="bold")
    screen.rule(NAME)
    say(NAME)
    warn(NAME)
    with progress(NAME, 1, "steps") as advance:
        advance(1, NAME)


def test_output_is_escaped(capsys):
    print_everything()
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 7 and err.count(SHOWN) == 3
    assert all(line.isprintable() for line in (out + err).splitlines())


def test_log_is_escaped(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as log, logging_to(log):
        print_everything()
    assert (tmp_path / "log").read_text(encoding="utf-8").count(SHOWN) == 10


def test_terminal_shows_names_escaped(monkeypatch):
    """Only our own colours and the progress bar may send escape sequences to a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        print_everything()
    shown = b""
    with contextlib.suppress(OSError):  # reading from a terminal whose writer has closed it raises EIO
        while chunk := os.read(ours, 65_536):
            shown += chunk
    os.close(ours)
    assert b"\x1b[" in shown and shown.count(SHOWN.encode()) >= 10
    for raw in (b"\x1b]", b"\a", "\x9b".encode(), "\u202e".encode(), b"\xff"):
        assert raw not in shown


def test_line_breaks_cannot_forge_lines(capsys):
    warn("a\nerror: b")
    say("a\r\nerror: b")
    assert capsys.readouterr().err.splitlines() == ["warning: a error: b", "a error: b"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_on_any_stdout(encoding):
    content = {NAME: ["é→\U0001f600\u2028", 1.5]}
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(stdout):
        print_json(content)
        stdout.flush()
    text = stdout.buffer.getvalue().decode(encoding)
    assert json.loads(text) == content
    assert all(line.isprintable() for line in text.split("\n"))
    assert ("é→" in text) == (encoding == "utf-8")


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": float("nan")})
    content = {"a": [float("nan"), (float("inf"), 1)], "b": {"c": -float("inf")}, "d": "nan", "e": True}
    assert finite(content) == {"a": [None, [None, 1]], "b": {"c": None}, "d": "nan", "e": True}


def run(work) -> int:
    return run_command(lambda arguments: work(), [])


def test_output_in_a_narrow_encoding(monkeypatch):
    """An encoding without an arrow must not end a growth after hours."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(lambda: console().print("4 → 6")) == 0
    stdout.flush()
    assert b"4 -> 6" in stdout.buffer.getvalue()


@pytest.mark.parametrize("folder", ["loop", "n" * 300, "file/inside", "nowhere"])
def test_nonexistent_paths(tmp_path, capsys, folder):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert run((tmp_path / folder / "config.json").read_bytes) == 66
    assert folder in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_storage_errors(number, capsys):
    def work():
        raise OSError(number, os.strerror(number), "weights")

    assert run(work) == 74
    assert capsys.readouterr().err == f"error: weights: {os.strerror(number)}\n"


def test_an_invalid_argument_is_escaped(capsys):
    from tli_jax.report import main

    assert run_command(main, ["x", "--\x1b]0;t\a"]) == 2
    assert r"--\x1b]0;t\x07" in capsys.readouterr().err


def test_null_byte_in_a_path(tmp_path, capsys):
    assert run(lambda: Path("a\0b").read_bytes()) == 2
    assert "null byte" in capsys.readouterr().err
