"""Tokens in the environment and local paths appear in no output."""

import pytest

TOKEN = "hf_" + "S3cret" * 5
NAMES = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"]


@pytest.mark.parametrize("debug", [[], pytest.param(["--debug"], marks=pytest.mark.long)], ids=["", "debug"])
def test_tokens_appear_in_no_file_and_no_message(start, tmp_path, tli, debug):
    secrets = dict.fromkeys(NAMES, TOKEN)
    results = [
        tli("upscale", "--model", start / "base", "--every", 2, "--output", tmp_path / "grown", *debug, **secrets),
        tli("report", tmp_path / "grown", **secrets),
        tli("upscale", "--model", "nobody/nothing", "--output", tmp_path / "none", **secrets),
    ]
    assert [code for code, _, _ in results][:2] == [0, 0] and results[2][0] in (66, 69)
    call = ["train", "--model", tmp_path / "grown", "--text", start / "ids.npy", "--run", tmp_path / "run"]
    call += ["--steps", 2, "--batch-size", 2, "--sequence-length", 16, "--dtypes", "compute=float32"]
    results.append(tli(*call, "--export", tmp_path / "out", *debug, **secrets))
    assert results[-1][0] == 0
    assert TOKEN not in str(results)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "growth.json", "config.yaml", "run.json", "metrics.jsonl"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_model_cards_contain_no_local_paths(start, done):
    for folder in (start / "grown", done / "out"):
        for card in folder.glob("*.md"):
            text = card.read_text()
            assert str(start) not in text and str(done) not in text and "/tmp" not in text
    assert (done / "out" / "README.md").is_file()
