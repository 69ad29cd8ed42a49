"""Measures what each growth method does to a base before any training, as a Markdown table.

    python benchmarks/methods.py                                   # the embedded base on its text and on new topics
    python benchmarks/methods.py --model DIR --text FILE --other FILE --name NAME
    python benchmarks/methods.py --table NAME                      # only print the table of stored results

Each row is one growth by ``python -m tli_jax.upscale`` with the flags shown, in fp32, and one run of both models on
each text. If torch is installed, transformers opens every grown folder, and its loss must agree to 1e-4. Results are
written to benchmarks/results/methods_NAME.json.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from tli_jax import upscale
from tli_jax.cli.frame import run_command
from tli_jax.data.documents import read_plain
from tli_jax.data.embedded import embedded_text, topics
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.load import load_hf
from tli_jax.hf.save import save_hf
from tli_jax.hf.tokenizer import open_tokenizer
from tli_jax.verify import proof

RESULTS = Path(__file__).parent / "results"
TOKENS, WINDOW = 2048, 256


def methods(layers: int) -> list[str]:
    """The flags of every method, at K = 2 or the size closest to it."""
    inits = [
        "identity",
        "next_identity",
        "copy",
        "scaled --scale 0.3",
        "half",
        "average",
        "average_identity",
        "noise",
        "random",
    ]
    rows = [f"--method tli --every 2 --init {init}" for init in inits]
    rows += [f"--method dus --drop {layers // 4}", "--method average --every 2", "--method slayer"]
    rows += [f"--method llama_pro --groups {layers // 2 if layers % 2 == 0 else 1}"]
    rows += ["--method opt_deus", "--method lesa", "--method midas", "--method lidas", "--method adept"]
    rows += ["--method interpose", "--method stack --times 2", f"--method custom --layers '0-{layers - 1},0*0.5'"]
    rows += ["--method moe", "--method moe --upcycle noise", "--method moe --upcycle drop"]
    rows += [
        f"--method moe --granularity 2 --top-k 4 --upcycle {upcycle}"
        for upcycle in ("virtual_groups", "virtual_groups_published")
    ]
    return [*rows, "--method tli --every 2 --experts 8"]


def transformers_loss(folder: Path, tokens_BT: np.ndarray) -> float:
    """Mean loss in fp32 over all tokens but the first of each window."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    ids = torch.tensor(tokens_BT, dtype=torch.long)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def grow(base: Checkpoint, flags: str, texts: list[np.ndarray], folder: Path) -> dict[str, Any]:
    common = ["--model", str(base.folder), "--output", str(folder), "--json", "--no-proof"]
    started, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run_command(upscale.main, [*common, *shlex.split(flags)])
    if code:
        sys.exit(code)
    seconds = time.perf_counter() - started
    record = json.loads(printed.getvalue())
    grown, plan = open_checkpoint(folder), Plan.from_json(record["plan"])
    proofs = [proof.prove(base, grown, plan, tokens_BT, "", lambda: None) for tokens_BT in texts]
    row = {
        "layers": f"{plan.base_layers} → {len(plan)}",
        **{key: record["after"][key] for key in ("parameters", "active_parameters", "flops_per_token")},
        "guarantee": plan.guarantee,
        "difference": max(p.max_abs_logit_difference / p.max_abs_logit for p in proofs),
        "loss_base": [p.loss_base for p in proofs],
        "loss": [p.loss_grown for p in proofs],
        "top1": proofs[0].top1,
        "seconds": seconds,
    }
    if util.find_spec("torch"):
        row["transformers_loss"] = transformers_loss(folder, texts[0])
        if abs(row["transformers_loss"] - row["loss"][0]) > 1e-4:
            sys.exit(f"{flags}: the loss is {row['loss'][0]}, but {row['transformers_loss']} in transformers")
    return row


def table(result: dict[str, Any]) -> str:
    first = next(iter(result["rows"].values()))
    base = [f"{loss:.4f}" for loss in first["loss_base"]]
    lines = [
        f"| flags | layers | parameters | active | FLOPs per token | guarantee | max Δlogit | loss (base {base[0]})"
        f" | same top-1 | second text (base {base[1]}) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for flags, row in result["rows"].items():
        difference = "equal" if row["difference"] == 0 else f"{row['difference']:.1e}"
        lines.append(
            f"| `{flags}` | {row['layers']} | {row['parameters'] / 1e6:.2f}M | {row['active_parameters'] / 1e6:.2f}M"
            f" | {row['flops_per_token'] / 1e6:.2f}M | {row['guarantee']} | {difference} | {row['loss'][0]:.4f}"
            f" | {100 * row['top1']:.1f} % | {row['loss'][1]:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", type=Path, help="by default the embedded text")
    parser.add_argument("--other", type=Path, help="a second text; by default topics of Python's documentation")
    parser.add_argument("--name", default="embedded", help="of the results file")
    parser.add_argument("--table", metavar="NAME", help="only print the stored table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads((RESULTS / f"methods_{options.table}.json").read_text())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = hub.resolve(options.model)
        config, params = load_hf(source, dtype=np.float32)
        save_hf(Path(temporary) / "base", config, params, source=source)
        base = open_checkpoint(Path(temporary) / "base")
        tokenizer, _ = open_tokenizer(base.folder, base.config)
        assert tokenizer is not None, "a text needs a tokenizer"
        texts = [
            tokens.windows(tokenizer.encode(text), base.config, TOKENS, WINDOW)
            for text in (
                read_plain(options.text) if options.text else embedded_text(),
                read_plain(options.other) if options.other else "\n".join(topics()),
            )
        ]
        rows = {}
        for number, flags in enumerate(methods(config.num_hidden_layers)):
            print(flags, file=sys.stderr)
            rows[flags] = grow(base, flags, texts, Path(temporary) / str(number))
    result = {
        # Without the directories of this machine.
        "command": " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]),
        "rows": rows,
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.platform()},
    }
    (RESULTS / f"methods_{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
