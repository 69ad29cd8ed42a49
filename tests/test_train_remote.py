"""Runs in object storage, on a local server with the part of Google's JSON API that gcsfs and TensorStore use.

Unlike gcp-storage-emulator 2026.7 it has generations of objects, without which TensorStore does not write.
"""

import contextlib
import http.server
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import pytest

from tli_jax.distributed import processes
from tli_jax.hf.checkpoint import open_checkpoint
from tli_jax.hf.tensors import read_tensor

STEPS = 20
# The command, killed after some step. How much of the last checkpoint is stored is not known.
KILLED = """
import os, signal, sys
from tli_jax import train
from tli_jax.cli.frame import run_command
from tli_jax.distributed import processes
from tli_jax.training.metrics import Metrics

write = Metrics.write

def until(self, values):
    write(self, values)
    if values["step"] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

Metrics.write = until
processes.leave(run_command(train.main, sys.argv[2:]))
"""
WITHOUT_GCSFS = """
import sys
sys.modules["gcsfs"] = None
from tli_jax import train
from tli_jax.cli.frame import run_command
sys.exit(run_command(train.main, sys.argv[1:]))
"""

needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")


class Handler(http.server.BaseHTTPRequestHandler):
    """One bucket, ``bucket``: name → generation and content. Answers unknown requests with 501."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: dict[str, tuple[int, bytes]]
    generations: "itertools.count[int]"
    lock: threading.Lock

    def handle_any(self):
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = re.fullmatch(
            r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/([^/]+))?(?:/moveTo/o/([^/]+))?", address.path
        )
        with self.lock:
            if path is None:
                return self.answer(501)
            if path[2] != "bucket":
                return self.answer(404)
            name = unquote(path[4]) if path[4] else query.get("name")
            if self.command == "POST" and path[1] == "/upload":
                if query["uploadType"] == "resumable" and "part" not in query:
                    location = f"http://{self.headers['Host']}{self.path}&part=1"
                    return self.answer(200, extra={"Location": location})
                if self.headers.get("Content-Range", "").endswith("/*"):  # a multi-part upload
                    return self.answer(501)
                return self.put(name, body) if self.matches(name, query) else self.answer(412)
            if name is None:
                return self.answer(200, self.listing(query) if path[3] else {"name": "bucket"})
            if name not in self.objects:
                return self.answer(404)
            if not self.matches(name, query):
                return self.answer(304 if self.command == "GET" and "ifGenerationNotMatch" in query else 412)
            if self.command == "DELETE":
                del self.objects[name]
                return self.answer(204)
            if self.command == "POST" and path[5]:
                return self.put(unquote(path[5]), self.objects.pop(name)[1])
            if self.command == "POST":
                return self.answer(501)
            generation, content = self.objects[name]
            if query.get("alt") != "media":
                return self.answer(200, self.about(name))
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
                extra = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
                return self.answer(206, content[start : end + 1], generation, extra)
            return self.answer(200, content, generation)

    do_GET = do_POST = do_DELETE = handle_any

    def matches(self, name, query):
        generation = str(self.objects.get(name, (0,))[0])
        return query.get("ifGenerationMatch", generation) == generation != query.get("ifGenerationNotMatch")

    def put(self, name, content):
        self.objects[name] = next(self.generations), content
        self.answer(200, self.about(name))

    def about(self, name):
        generation, content = self.objects[name]
        return {"name": name, "bucket": "bucket", "generation": str(generation), "size": str(len(content))}

    def listing(self, query):
        """All objects in one page."""
        prefix, delimiter, start = (query.get(key, "") for key in ("prefix", "delimiter", "startOffset"))
        items, folders = [], set()
        for name in sorted(name for name in self.objects if name.startswith(prefix) and name >= start):
            if delimiter and delimiter in name[len(prefix) :]:
                folders.add(prefix + name[len(prefix) :].split(delimiter)[0] + delimiter)
            else:
                items.append(self.about(name))
        return {"items": items, "prefixes": sorted(folders)}

    def answer(self, code, content=b"", generation=None, extra=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = dict(extra or {}) | ({"x-goog-generation": str(generation)} if generation else {})
        if code not in (204, 304):
            headers["Content-Length"] = str(len(data))
        with contextlib.suppress(ConnectionError):  # the client is gone
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data if "Content-Length" in headers else b"")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def storage(compiled):
    """Environment of processes that use the bucket; and its objects."""
    objects = {}
    facts = {"objects": objects, "generations": itertools.count(1), "lock": threading.Lock()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bucket", (Handler,), facts))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    google = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "FSSPEC_GCS_TOKEN": "anon"}
    # No questions to Google about the kind of bucket or of machine.
    google |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GCE_METADATA_ROOT": "127.0.0.1:1", "NO_GCE_CHECK": "true"}
    yield compiled | google, objects
    server.shutdown()
    thread.join()
    server.server_close()


def under(objects, name):
    return {key.removeprefix(f"{name}/"): value[1] for key, value in objects.items() if key.startswith(f"{name}/")}


def command(environment, *arguments, code=0, script=("-m", "tli_jax.train")):
    """Run a command and return its output."""
    device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        env=os.environ | device | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == (code > 0), done.stderr
    return done.stdout + done.stderr


def options(start, model, steps=STEPS):
    return (
        *("--model", model, "--text", start / "ids.npy", "--steps", steps, "--save-every", 5, "--keep", 1),
        *("--batch-size", 8, "--sequence-length", 16, "--dtypes", "compute=float32", "--only", "injected"),
    )


def losses(lines):
    parsed = [json.loads(line) for line in lines.splitlines()]
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in parsed]


def digests(meta):
    return {name: array["digest"] for name, array in json.loads(meta)["content"]["arrays"].items()}


def tensors(folder):
    return {name: read_tensor(tensor).tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


@needs_gcsfs
@pytest.mark.long
def test_resumes_on_another_machine_bit_for_bit(storage, start, tmp_path):
    environment, objects = storage
    model = shutil.copytree(start / "grown", tmp_path / "model")
    (model / "LICENSE").write_text("a licence")
    template = Path("additional_chat_templates", "tools.jinja")
    (model / template).parent.mkdir()
    (model / template).write_text("a template")
    here, there = ({**environment, "XDG_CACHE_HOME": tmp_path / name} for name in ("here", "there"))
    run = "gs://bucket/some/run"
    command(here, *options(start, model), "--run", tmp_path / "run", "--export", tmp_path / "straight")

    # Step 10 may be incomplete. Step 5 is complete, else step 10 would not have been started.
    command(here, 13, *options(start, model), "--run", run, code=-signal.SIGKILL, script=("-c", KILLED))
    uploaded = under(objects, "some/run")
    assert [step for step, *_ in losses(uploaded["metrics.jsonl"])] == list(range(1, 11))
    assert {"config.yaml", "run.json", "growth.json", "model/config.json", "model/LICENSE"} <= uploaded.keys()

    shutil.rmtree(model)
    output = command(there, "--run", run, "--export", tmp_path / "out")
    assert f"run {run}: object storage has no lock" in output
    done = under(objects, "some/run")
    assert losses(done["metrics.jsonl"]) == losses((tmp_path / "run" / "metrics.jsonl").read_text())
    meta = f"checkpoints/{STEPS}/meta/meta.json"
    assert digests(done[meta]) == digests((tmp_path / "run" / meta).read_text())
    assert {name.split("/")[1] for name in done if name.startswith("checkpoints/")} == {str(STEPS), "frozen"}
    assert tensors(tmp_path / "out") == tensors(tmp_path / "straight")
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"
    assert (tmp_path / "out" / template).read_text() == "a template"

    assert "run" in command(here, run, script=("-m", "tli_jax.report"))
    command(here, *options(start, run, steps=2), "--run", "gs://bucket/next")
    assert len(losses(under(objects, "next")["metrics.jsonl"])) == 2
    # A new run of the same name uses nothing from the local copy of the old one.
    for name in [name for name in objects if name.startswith("some/run/")]:
        del objects[name]
    command(there, *options(start, start / "base", steps=2)[:-2], "--only", "all", "--run", run)
    again = under(objects, "some/run")
    assert "growth.json" not in again and "model/LICENSE" not in again
    command(here, "--run", run, "--steps", 3)
    assert len(losses(under(objects, "some/run")["metrics.jsonl"])) == 3


def machines(environment, folder, names, *arguments, script=("-m", "tli_jax.train")):
    """Run a command as one process on each machine, with one device each. Return exit codes and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    device = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    started = []
    for index, name in enumerate(names):
        own = {"XDG_CACHE_HOME": str(folder / name), "JAX_ENABLE_COMPILATION_CACHE": "false"}
        with (folder / f"{name}.err").open("w") as errors:
            started.append(
                subprocess.Popen(
                    [sys.executable, *script, *map(str, arguments), "--process", f"{index}/{len(names)}@{address}"],
                    env=os.environ | environment | device | own,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    texts = [(folder / f"{name}.err").read_text() for name in names]
    assert not any("Traceback" in text for text in texts), texts
    return codes, [[line for line in text.splitlines() if line.startswith("error:")] for text in texts]


@needs_gcsfs
def test_a_supervised_process_opens_object_storage(storage, start, tmp_path):
    """The supervisor forks, after which clients of object storage that exist already do not work."""
    environment, objects = storage
    flags = (*options(start, start / "grown", steps=1), "--validation-fraction", 0, "--run", "gs://bucket/one")
    assert machines(environment, tmp_path, ("a",), *flags) == ([0], [[]])
    assert len(losses(under(objects, "one")["metrics.jsonl"])) == 1


@needs_gcsfs
@pytest.mark.long
def test_several_machines_train_and_others_resume(storage, start, tmp_path):
    """Two machines, of which one is killed; four others, told to stop; then two. None sees the files of another."""
    environment, objects = storage
    run, flags = "gs://bucket/several", options(start, start / "grown")
    killed = machines(environment, tmp_path, ("a", "b"), 13, *flags, "--run", run, script=("-c", KILLED))
    assert killed == ([137, 69], [["error: the process was killed by SIGKILL"], [f"error: {processes.LOST}"]])
    assert [step for step, *_ in losses(under(objects, "several")["metrics.jsonl"])] == list(range(1, 11))
    stopped = ("-c", KILLED.replace("SIGKILL", "SIGTERM"))
    codes, errors = machines(environment, tmp_path, ("c", "d", "e", "f"), 12, "--run", run, script=stopped)
    assert codes == [75] * 4 and len({error for (error,) in errors}) == 1, errors
    assert machines(environment, tmp_path, ("g", "h"), "--run", run) == ([0, 0], [[], []])
    command({**environment, "XDG_CACHE_HOME": tmp_path / "i"}, *flags, "--run", tmp_path / "run")
    together, alone = (
        np.array(losses(lines))[:, :2].astype(float)
        for lines in (under(objects, "several")["metrics.jsonl"], (tmp_path / "run" / "metrics.jsonl").read_text())
    )
    np.testing.assert_allclose(together, alone, rtol=2e-4)


@needs_gcsfs
def test_unusable_buckets_are_refused(storage, start, tmp_path):
    environment, objects = storage
    environment = {**environment, "XDG_CACHE_HOME": tmp_path}
    flags = options(start, start / "grown")
    output = command(environment, *flags, "--run", "gs://no-bucket/run", code=69)
    assert "run gs://no-bucket/run: object storage refuses access or does not answer" in output
    objects["mine/letter.txt"] = 1, b"Dear"
    assert "is not a run and not empty (letter.txt)" in command(
        environment, *flags, "--run", "gs://bucket/mine", code=73
    )


def test_refused_without_a_request(start, tmp_path):
    flags = options(start, start / "grown")
    assert "only Google Cloud Storage" in command({}, *flags, "--run", "s3://bucket/run", code=2)
    export = ("--run", tmp_path / "run", "--export", "gs://bucket/out")
    assert "must be a local folder" in command({}, *flags, *export, code=2)
    output = command(
        {"XDG_CACHE_HOME": tmp_path}, *flags, "--run", "gs://bucket/run", code=2, script=("-c", WITHOUT_GCSFS)
    )
    assert "run gs://bucket/run: object storage needs gcsfs: pip install gcsfs" in output
