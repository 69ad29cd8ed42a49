"""Find a model: a local folder or GGUF file, the base in this package, or the Hub (never code, never pickles)."""

import atexit
import concurrent.futures
import json
import os
import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from tli_jax.errors import DataError, MissingInputError, StorageError, TliError, UnavailableError, UsageError
from tli_jax.hf.headers import INDEX, SINGLE
from tli_jax.hf.inputs import MAX_JSON, parse_json
from tli_jax.hf.sidecar import ALLOWED

EMBEDDED = "embedded"
_CONFIG_FILES = ("config.json", "generation_config.json", INDEX, "growth.json", "training.json")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[a-z0-9_][\w.-]{0,95}/[a-z0-9_][\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII | re.I)
_SHARD = re.compile(r"model[\w.-]*\.safetensors", re.ASCII)
_FIRST_READ = 65_536  # bytes; most headers are shorter, so one request is enough


def resolve(model: Path | str, revision: str | None = None, headers_only: bool = False, weights: bool = True) -> Path:
    """The local folder of a model. A hub model is downloaded to the hub's cache, to a folder named after its commit.

    Args:
        model: a folder, which is returned unchanged; a GGUF file, see ``open_gguf``; ``"embedded"`` for the small base
            in this package; or a hub id.
        revision: branch, tag or full commit hash of a hub id.
        headers_only: good for a plan, and for nothing else. Unless the weights of a hub model are cached, the result is
            a temporary folder, deleted at exit, with configuration, index and sparse safetensors files: their headers
            and sizes are real, their weights read as zeros.
        weights: download them, too. Without them, a hub model is good for its tokenizer.

    Raises:
        MissingInputError: the folder, model, revision or weights do not exist, or you have no access.
        UnavailableError: the hub does not answer, and the model is not cached.
        DataError: the weights are pickles, or the index is damaged.
        StorageError: the model cannot be stored.
        UsageError: a folder or file with a ``revision``.
    """
    model = str(model)
    if model == EMBEDDED:
        return Path(str(resources.files("tli_jax") / "assets" / "base"))
    folder = os.path.expanduser(model)  # noqa: PTH111  # Path.expanduser raises if there is no such user
    # Path.is_dir and Path.is_file raise if the name is too long.
    is_gguf = folder.lower().endswith(".gguf") and os.path.isfile(folder)  # noqa: PTH113
    if is_gguf or os.path.isdir(folder):  # noqa: PTH112
        if revision is not None:
            kind = "file" if is_gguf else "folder"
            raise UsageError(f"{model!r} is a local {kind}, which has no revision {revision!r}: leave the revision out")
        if is_gguf:
            from tli_jax.hf.gguf_file import open_gguf

            return open_gguf(Path(folder))
        return Path(folder)
    if not _HUB_ID.fullmatch(model):
        is_file = os.path.isfile(folder)  # noqa: PTH113
        what = (
            f"{model!r} is a file, but not GGUF" if is_file else f"no folder or GGUF file {model!r}, nor is it a Hub id"
        )
        raise MissingInputError(f"{what}: give a model folder, a GGUF file, or name/name of the Hub")

    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2

    try:
        return _fetch(model, revision, headers_only, weights)
    except (HTTPError, OSError, RuntimeError, UnicodeError, json.JSONDecodeError) as error:
        problem = _translate(error, model, revision)
    # Not raised in the except block: that exception, whose text may quote the token, would become its context.
    raise problem


def origin(folder: Path) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the hub's cache; None for any other folder."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # Path.absolute keeps ".."
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), folder.name


def _fetch(model: str, revision: str | None, headers_only: bool, weights: bool) -> Path:
    import huggingface_hub as hf

    if not isinstance(hf.try_to_load_from_cache(model, "config.json", revision=revision), str):
        # One request that fails fast: a download retries for half a minute if the hub does not answer.
        hf.get_hf_file_metadata(hf.hf_hub_url(model, "config.json", revision=revision))
    commit = Path(hf.hf_hub_download(model, "config.json", revision=revision)).parent.name

    def download(*patterns: str) -> Path:
        # In these patterns * matches slashes too, but ours do not mean sub-folders.
        never = ["*.py", "*.bin", "*/*/*", *(f"{pattern}/*" for pattern in ALLOWED if pattern.endswith("*"))]
        return Path(hf.snapshot_download(model, revision=commit, allow_patterns=[*patterns], ignore_patterns=never))

    # README.md is the model card, which gives the licence.
    folder = download(*_CONFIG_FILES, *(() if headers_only else (*ALLOWED, "README.md")))
    if not weights:
        return folder
    shards = _shards(folder, model)
    if not headers_only and shards:
        download(*shards)
    elif not all((folder / shard).is_file() for shard in shards):
        folder = _without_weights(folder, shards, model)
    if any((folder / shard).is_file() for shard in shards):
        return folder  # if some shards are missing, the reader lists them
    files = [file.rfilename for file in hf.HfApi().model_info(model, revision=commit, timeout=10).siblings or []]
    if pickles := sorted(file for file in files if file.endswith((".bin", ".pth", ".pt", ".ckpt"))):
        raise DataError(f"hub model {model!r} has only pickled weights ({pickles[0]}): convert them to safetensors")
    raise MissingInputError(f"hub model {model!r} has no weights: looked for {SINGLE} and the shards listed in {INDEX}")


def _shards(folder: Path, model: str) -> list[str]:
    """The safetensors files to download: those that the index lists, if there is one."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    weight_map = parse_json((folder / INDEX).read_bytes(), f"hub model {model!r}: {INDEX}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise DataError(f"hub model {model!r}: {INDEX}: weight_map must map tensor names to file names")
    return sorted({name for name in weight_map.values() if isinstance(name, str) and _SHARD.fullmatch(name)})


def _without_weights(folder: Path, shards: list[str], model: str) -> Path:
    """A temporary copy of a folder with sparse shards; shards that the hub does not have are left out.

    ``HfApi.get_safetensors_metadata`` does not do here. It downloads the complete file if a server ignores ranges, it
    fails on a shard that is missing or not safetensors, and it parses headers leniently. Local and remote headers must
    go through the same strict reader, which needs their bytes.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    root = Path(tempfile.mkdtemp(prefix="tli_jax-headers-only-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    copy = Path(shutil.copytree(folder, root / folder.name, ignore=lambda _, names: set(names) - set(_CONFIG_FILES)))

    def read(shard: str, url: str, start: int, stop: int) -> bytes:
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        # Streamed: a server that ignores ranges answers 200 and sends the complete file.
        with http_stream_backoff("GET", url, headers=headers, timeout=10, max_retries=2) as response:
            hf_raise_for_status(response)
            data = response.read() if response.status_code == 206 else b""
        if len(data) != stop - start:
            raise UnavailableError(f"the hub does not serve parts of {shard} of {model!r}: download the model first")
        return data

    def write(shard: str) -> None:
        url = hf_hub_url(model, shard, revision=folder.name)
        try:
            size = get_hf_file_metadata(url).size or 0
        except EntryNotFoundError:
            return
        data = read(shard, url, 0, min(size, _FIRST_READ)) if size else b""
        end = 8 + int.from_bytes(data[:8], "little")
        if len(data) < end <= min(size, MAX_JSON):
            data += read(shard, url, len(data), end)
        (copy / shard).write_bytes(data[:end])  # of a file of another format, enough for the reader to name it
        os.truncate(copy / shard, size)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # a model of 400B parameters has 200 shards
        list(pool.map(write, shards))
    return copy


def _translate(error: Exception, model: str, revision: str | None) -> TliError:
    """Our error for an exception of huggingface_hub, without any of its text, which may quote the token."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    log_in = "log in ('hf auth login', or set HF_TOKEN)"
    if isinstance(cause, errors.GatedRepoError):
        return MissingInputError(f"hub model {model!r} is gated: accept its licence on its hub page, and {log_in}")
    if isinstance(cause, errors.RepositoryNotFoundError) or status in (401, 403):
        return MissingInputError(f"no folder {model!r} and no hub model that you can read: check the name, or {log_in}")
    if isinstance(cause, errors.RevisionNotFoundError):
        return MissingInputError(f"hub model {model!r} has no revision {revision!r}: give a branch, tag or full commit")
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        return MissingInputError(f"hub model {model!r} has no config.json: only Llama and Mixtral folders can be read")
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
        return StorageError(f"cannot store {model!r} ({os.strerror(cause.errno)}): set HF_HOME, TMPDIR to a free disk")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return UnavailableError(f"no folder {model!r}, not in the hub cache, and HF_HUB_OFFLINE is set: go online")
    reason = f"answers HTTP {status}" if status else f"cannot be reached ({type(cause).__name__})"
    return UnavailableError(f"no folder {model!r}, and the hub {reason}: check the connection, or give a folder")
