"""``resolve`` against a local HTTP server that speaks the part of the hub's protocol that huggingface_hub uses.

Each test starts one fresh process, because huggingface_hub reads its environment when it is imported.
"""

import contextlib
import dataclasses
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from tli_jax.errors import MissingInputError, UsageError
from tli_jax.hf.hub import resolve

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisMustNeverBeSeen"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(count: int, metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file of ``count`` MB."""
    return save({f"t{i}": np.full((512, 512), i + 1, np.float32) for i in range(count)}, metadata)


LONG = {"note": "x" * 100_000}  # makes a header that is longer than the first read
SHARDED: dict[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    INDEX: json.dumps({"weight_map": {"t0": SHARDS[0], "u0": SHARDS[1]}}).encode(),
    SHARDS[0]: tensors(3),
    SHARDS[1]: tensors(2, LONG),
    "model.safetensors": b"the same weights once more",
    "model.fp16.safetensors": b"and in half precision",
    "consolidated.safetensors": b"and in the layout of the authors",
    "tokenizer.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "additional_chat_templates/more/deep.jinja": b"transformers does not look here",
    "additional_chat_templates/tool.py": b"raise SystemExit('a template was run')",
    "LICENSE.txt": b"be nice",
    "USE_POLICY.md": b"be very nice",
    "README.md": b"# A model",
    "modeling_llama.py": b"raise SystemExit('remote code was run')",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.00.pth": b"another pickle",
    "original/config.json": b"{}",
    "model-parts/model.safetensors": b"not at the top level",
    "NOTICE.py": b"raise SystemExit('a notice was run')",
    "LICENSES/other.txt": b"not at the top level either",
    "llama.gguf": b"GGUF",
}
SINGLE = {"config.json": b"{}", "model.safetensors": tensors(1), "growth.json": b"{}", "vocab.json": b"{}"}
REPOS: dict[str, dict[str, bytes]] = {
    "org/sharded": SHARDED,
    "org/single": SINGLE,
    "org/gated": SINGLE,
    "org/private": SINGLE,
    "org/pickle": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
    "org/gguf": {"llama.gguf": b"GGUF"},
    "org/empty": {"config.json": b"{}"},
    "org/bad-index": {"config.json": b"{}", INDEX: b"[]"},
    "org/no-map": {"config.json": b"{}", INDEX: b"{}"},
    "org/gap": {name: data for name, data in SHARDED.items() if name != SHARDS[1]},
    "org/no-ranges": {"config.json": b"{}", "model.safetensors": bytes(2**25)},
    "org/page": {"config.json": b"{}", "model.safetensors": b"<!DOCTYPE html><title>Sign in</title>"},
    "org/void": {"config.json": b"{}", "model.safetensors": b""},
}
# The server's answer to any request for these repositories: (status, X-Error-Code).
FAILING = {"org/forbidden": (403, ""), "org/broken": (500, ""), "org/bad-token": (401, "")}


@dataclasses.dataclass
class Hub:
    endpoint: str
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (method, path without query)
    sent: int = 0  # bytes of bodies
    authorized: set[str] = dataclasses.field(default_factory=set)  # paths requested with a token

    def requested(self) -> set[str]:
        """The names of all files that were requested."""
        found = (re.search(r"(?:resolve/[^/]+|cdn/org/[^/]+)/(.+)", path) for _, path in self.requests)
        return {match.group(1) for match in found if match}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # the client closed the connection
                self.wfile.write(body)
                self.hub.sent += len(body)

    def fail(self, status: int, code: str) -> None:
        # The message repeats the token, to find out whether the client prints it.
        echo = f"you sent {self.headers.get('Authorization')}"
        extra = {"X_Error_Code": code} if code else {}
        self.answer(status, json.dumps({"error": echo}).encode(), X_Error_Message=echo, **extra)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append((self.command, path))
        if "Authorization" in self.headers:
            self.hub.authorized.add(path)
        match = re.fullmatch(
            r"/(?:api/models/(?P<a>org/[^/]+)/(?:revision|tree)/(?P<r>[^/]+)"
            r"|(?P<b>org/[^/]+)/resolve/(?P<s>[^/]+)/(?P<f>.+)"
            r"|cdn/(?P<c>org/[^/]+)/(?P<g>.+))",
            path,
        )
        if not match:
            return self.fail(404, "EntryNotFound")
        repo = match["a"] or match["b"] or match["c"]
        if repo in FAILING:
            return self.fail(*FAILING[repo])
        if repo not in REPOS:
            return self.fail(401, "RepoNotFound")
        if (match["r"] or match["s"] or "main") not in ("main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        files = REPOS[repo]
        if "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if match["r"]:
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if repo == "org/gated":
            return self.fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
        if repo == "org/private" and not match["c"] and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "RepoNotFound")
        name = match["f"] or match["g"]
        if name not in files:
            return self.fail(404, "EntryNotFound")
        return self.serve(repo, name, files[name], from_cdn=bool(match["c"]))

    do_HEAD = do_GET

    def serve(self, repo: str, name: str, data: bytes, from_cdn: bool) -> None:
        etag = f'"{repo.replace("/", "-")}-{name.replace("/", "-")}"'
        if name.endswith(".safetensors") and not from_cdn:
            # Large files are on another origin, as on the real hub: another host name.
            to = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{name}"
            return self.answer(302, ETag=etag, X_Linked_ETag=etag, X_Linked_Size=str(len(data)), Location=to)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or repo == "org/no-ranges":
            return self.answer(200, data, ETag=etag)
        part = data[int(wanted[1]) : int(wanted[2] or len(data)) + 1]
        where = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        return self.answer(206, part, ETag=etag, Content_Range=where)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


# Runs resolve on each call in argv[1], and prints the result or the error and its traceback.
CLIENT = """
import json, os, sys, traceback
from pathlib import Path
from tli_jax.hf.hub import resolve
from tli_jax.errors import TliError
results = []
for call in json.loads(sys.argv[1]):
    try:
        folder = resolve(*call)
        paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        files = {name: [p.stat().st_size, p.stat().st_blocks * 512] for name, p in paths.items()}
        heads, weights = {}, False
        for p in folder.glob("*.safetensors"):
            with open(p, "rb") as file:
                start = file.read(8)
                heads[p.name] = (start + file.read(min(int.from_bytes(start, "little"), 200_000))).hex()
                weights |= any(file.read(2**20))
        results.append({"folder": str(folder), "files": files, "heads": heads, "weights": weights, "error": None})
    except TliError as error:
        results.append({"folder": None, "code": error.exit_code, "error": str(error), "trace": traceback.format_exc()})
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")]
print(json.dumps(results))
"""


def run(endpoint: str, home: Path, *calls: tuple, **env: str) -> list[dict]:
    """The results of ``resolve(*call)`` in one new process that has a token and uses ``endpoint`` as the hub."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    clean |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TMPDIR": str(home.parent)} | env
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CLIENT, json.dumps(calls)],
        cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert env.get("HF_TOKEN", TOKEN) not in done.stdout + done.stderr
    results = json.loads(done.stdout)
    for result in results:
        if result["error"]:
            assert "\n" not in result["error"]
            assert result["trace"].count("Traceback") == 1  # our error has no context of another library
    return results


def test_folder_is_returned_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    assert resolve(str(tmp_path / "org"), headers_only=True) == tmp_path / "org"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    with pytest.raises(UsageError, match=r"'org/name' is a local folder"):
        resolve("org/name", "main")


@pytest.mark.parametrize(
    "model",
    ["./org/name", "../name", "/org/name", "~/name", "a/b/c", "name", "", "org/", "/name", "org/na me", "org\\name",
     "org/..", "-org/name", "org/a--b", "org/name.git", "org/name.", "org/.name", "org/n\u00e4me", "org/name\n",
     "org/na\0me", "x" * 97 + "/name", "x" * 5000],
)  # fmt: skip
def test_invalid_hub_ids_never_reach_the_hub(model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    with pytest.raises(MissingInputError, match=r"^no folder or GGUF file .*, nor is it a Hub id: give a") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_only_the_files_of_a_checkpoint_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    sharded, single, again = run(hub.endpoint, tmp_path, ("org/sharded", "main"), ("org/single",), ("org/single",))
    needed = {"config.json", INDEX, *SHARDS, "tokenizer.json", "LICENSE.txt", "USE_POLICY.md", "README.md"}
    needed |= {"additional_chat_templates/tool_use.jinja"}
    assert Path(sharded["folder"]).name == COMMIT
    assert set(sharded["files"]) == needed
    assert set(single["files"]) == set(SINGLE)
    assert single == again
    assert hub.requested() == needed | set(SINGLE)
    for name in needed:
        assert (Path(sharded["folder"]) / name).read_bytes() == SHARDED[name]
    # The token is sent to the hub only.
    assert any("/resolve/" in path for path in hub.authorized)
    assert not any("/cdn/" in path for path in hub.authorized)

    # Cached models need no hub; models that are not cached are reported as missing.
    hub.requests.clear()
    calls = (("org/sharded",), ("org/single", None, True), ("org/single", COMMIT), ("org/empty",))
    cached = run(hub.endpoint, tmp_path, *calls, HF_HUB_OFFLINE="1")
    assert [result["folder"] for result in cached] == [sharded["folder"], single["folder"], single["folder"], None]
    assert cached[3]["code"] == 69 and "HF_HUB_OFFLINE is set" in cached[3]["error"]
    assert hub.requests == []


def test_headers_only_reads_headers_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    calls = [(model, None, True) for model in ("org/sharded", "org/gap", "org/page", "org/void")]
    sharded, gap, page, void = run(hub.endpoint, tmp_path / "home", *calls)
    assert hub.requested() == {"config.json", INDEX, *SHARDS, "model.safetensors"}
    # Of 5 MB: two first reads, the long header, and small files. The second model has only the first shard.
    assert hub.sent < 3 * 65_536 + 120_000 + 20_000
    assert not any("/cdn/" in path for path in hub.authorized)

    assert set(sharded["files"]) == {"config.json", INDEX, *SHARDS}
    for name in SHARDS:
        size, on_disk = sharded["files"][name]
        head = bytes.fromhex(sharded["heads"][name])
        assert size == len(SHARDED[name])
        assert on_disk <= 128 * 1024
        assert SHARDED[name].startswith(head)
        assert len(head) == 8 + int.from_bytes(head[:8], "little")
    assert not sharded["weights"]
    assert not Path(sharded["folder"]).exists()  # the process has ended
    # The reader reports missing shards and files of another format.
    assert set(gap["files"]) == {"config.json", INDEX, SHARDS[0]}
    assert page["files"]["model.safetensors"][0] == len(REPOS["org/page"]["model.safetensors"])
    assert bytes.fromhex(page["heads"]["model.safetensors"]) == REPOS["org/page"]["model.safetensors"]
    assert void["files"]["model.safetensors"][0] == 0


def test_the_tokenizer_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    (result,) = run(hub.endpoint, tmp_path / "home", ("org/sharded", None, False, False))
    assert {"config.json", "tokenizer.json"} <= set(result["files"]) and not result["heads"]
    assert not hub.requested() & {*SHARDS, "model.safetensors"}


def test_sparse_shard_is_read_like_a_real_one(tmp_path: Path, hub: Hub) -> None:
    (result,) = run(hub.endpoint, tmp_path / "home", ("org/private", "main", True))
    size, _ = result["files"]["model.safetensors"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes.fromhex(result["heads"]["model.safetensors"]))
    os.truncate(path, size)
    with safe_open(path, "numpy") as sparse:
        assert sparse.get_slice("t0").get_shape() == [512, 512]


ERRORS = {
    ("org/nowhere",): (66, "no folder 'org/nowhere' and no hub model that you can read: check the name, or log in"),
    ("org/gated",): (66, "hub model 'org/gated' is gated: accept its licence on its hub page, and log in"),
    ("org/gated", None, True): (66, "hub model 'org/gated' is gated"),
    ("org/single", "v9"): (66, "hub model 'org/single' has no revision 'v9': give a branch"),
    ("org/single", "refs/../../x"): (66, "hub model 'org/single' has no revision"),
    ("org/gguf",): (66, "hub model 'org/gguf' has no config.json"),
    ("org/empty",): (66, "hub model 'org/empty' has no weights: looked for model.safetensors"),
    ("org/empty", None, True): (66, "hub model 'org/empty' has no weights"),
    ("org/pickle",): (65, "hub model 'org/pickle' has only pickled weights (pytorch_model.bin): convert"),
    ("org/pickle", None, True): (65, "hub model 'org/pickle' has only pickled weights"),
    ("org/bad-index",): (65, "hub model 'org/bad-index': model.safetensors.index.json: is list, must be a JSON object"),
    ("org/no-map",): (65, "hub model 'org/no-map': model.safetensors.index.json: weight_map must map"),
    ("org/no-ranges", None, True): (69, "the hub does not serve parts of model.safetensors of 'org/no-ranges'"),
    ("org/forbidden",): (66, "no folder 'org/forbidden' and no hub model that you can read"),
    ("org/bad-token",): (66, "no folder 'org/bad-token' and no hub model that you can read"),
    ("org/broken",): (69, "no folder 'org/broken', and the hub answers HTTP 500"),
}


def test_errors_are_one_line_of_ours_without_the_token(hub: Hub, tmp_path: Path) -> None:
    for (code, text), result in zip(ERRORS.values(), run(hub.endpoint, tmp_path, *ERRORS), strict=True):
        assert result["error"] is not None and result["error"].startswith(text)
        assert result["code"] == code
    assert not {"pytorch_model.bin", "llama.gguf"} & hub.requested()
    assert hub.sent < 100_000  # almost nothing of the 32 MB that the server sends instead of a range


@pytest.mark.parametrize("token", ["hf_secret\x0bcontrol", "hf_s\u00e9cret"])
def test_token_that_is_not_a_valid_header_is_not_quoted(token: str, hub: Hub, tmp_path: Path) -> None:
    (result,) = run(hub.endpoint, tmp_path, ("org/single",), HF_TOKEN=token)
    assert result["code"] == 69
    assert "secret" not in result["trace"] and "cret" not in result["trace"]


def test_no_hub(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: it refuses connections, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        (result,) = run(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, ("org/single",))
    assert result["code"] == 69
    assert result["error"].startswith("no folder 'org/single', and the hub cannot be reached (ConnectError): check")


def test_hub_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (result,) = run(endpoint, tmp_path, ("org/single",), HF_HUB_ETAG_TIMEOUT="1")
    assert result["code"] == 69 and "cannot be reached (ReadTimeout)" in result["error"]


def test_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where a folder has to be")
    (result,) = run(hub.endpoint, tmp_path / "home", ("org/single",))
    assert result["code"] == 74 and result["error"].startswith("cannot store 'org/single' (")
