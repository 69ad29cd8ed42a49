"""Grow one base in several ways, train each alike on new text, and put the held-out losses side by side.

Each way is `METHOD[:INIT]` of `tli_jax.upscale`, or `base` for the model as it is; each is trained twice, whole and
with its injected layers alone. Runs go on where they stopped.

    python benchmarks/quality.py --model DIR --text FILE --work DIR --name NAME
"""

import argparse
import contextlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from tli_jax import command, train, upscale
from tli_jax.report.run import draw_curves, read_run, validation


def grow(args: argparse.Namespace, way: str) -> Path:
    """The model of a way, grown unless it is there."""
    method, _, init = way.partition(":")
    folder = args.work / way.replace(":", "-")
    if way != "base" and not folder.is_dir():
        flags = ["--model", args.model, "--output", str(folder), "--method", method]
        flags += ["--every", str(args.every)] if method == "tli" else ["--drop", str(args.drop)] if args.drop else []
        flags += ["--init", init] if init else []
        log = args.work / f"{folder.name}.txt"
        args.work.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            failed = command.run(upscale.main, flags)
        if failed:
            sys.exit(1)
    return Path(args.model) if way == "base" else folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--validation-text")
    parser.add_argument("--separator", help="between documents of the text")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the result in benchmarks/results")
    parser.add_argument("--ways", default="base,tli:identity,tli:copy,tli:half,dus")
    parser.add_argument("--only", default="all,injected")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--drop", type=int)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found, runs = {}, {}
    for only in args.only.split(","):
        for way in args.ways.split(","):
            if way == "base" and only == "injected":
                continue  # nothing is injected in it
            name = f"{way.replace(':', '-')}-{only}"
            flags = ["--model", str(grow(args, way)), "--text", args.text, "--run", str(args.work / f"run-{name}")]
            flags += ["--only", only, "--steps", str(args.steps), "--batch-size", str(args.batch_size)]
            flags += ["--sequence-length", str(args.sequence_length), "--learning-rate", str(args.learning_rate)]
            flags += ["--seed", str(args.seed), "--dtypes", "compute=float32", "--remat", "none"]
            flags += ["--validation-text", args.validation_text] if args.validation_text else []
            flags += ["--separator", args.separator] if args.separator else []
            flags += ["--warmup", "20", "--validate-every", "100", "--save-every", "200", "--validation-batches", "64"]
            if command.run(train.main, flags):
                sys.exit(1)
            runs[name] = read_run(args.work / f"run-{name}")
            points = validation(runs[name])
            found[name] = {"before": points[0][1], "after": points[-1][1], "curve": points}
            seconds = sum(line["tokens"] / line["step"] / line["tokens_per_second"] for line in runs[name])
            found[name]["seconds"] = round(seconds)
    print("| | initial | all layers train | injected alone |\n|---|---|---|---|")
    for way in args.ways.split(","):
        names = [f"{way.replace(':', '-')}-{only}" for only in ("all", "injected")]
        after = [f"{found[name]['after']:.4f}" if name in found else "–" for name in names]
        before = next(found[name]["before"] for name in names if name in found)
        print(f"| {way.replace(':', ' ')} | {before:.4f} | {' | '.join(after)} |")
    facts = {"python": platform.python_version(), "jax": metadata.version("jax"), "cores": os.cpu_count()}
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("work", "model", "text")}
    settings |= {key: Path(value).name for key, value in (("model", args.model), ("text", args.text))}
    if args.validation_text:
        settings["validation_text"] = Path(args.validation_text).name
    result = {"machine": facts, "settings": settings, "runs": found}
    file = Path(__file__).parent / "results" / f"{args.name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_curves(runs, args.work / "curves.png")


if __name__ == "__main__":
    main()
