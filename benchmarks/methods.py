"""What every method makes of a base, before any training, as a Markdown table: sizes, promises, and what is kept of it.

    python benchmarks/methods.py                                   # the embedded base, its text and new topics
    python benchmarks/methods.py --model DIR --text FILE --other FILE --name NAME
    python benchmarks/methods.py --table NAME                      # grow nothing: the table of what is in the results

Each row is one growth by ``python -m tli_jax.upscale`` with the flags it shows, in fp32, and one run of both models on
each text. Where torch is installed transformers opens every grown folder, and the losses must agree to 1e-4. What is
found goes to benchmarks/results/methods_NAME.json.
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
from tli_jax.growth.plan import Plan
from tli_jax.hf import hub, tokens
from tli_jax.hf.checkpoint import Checkpoint, open_checkpoint
from tli_jax.hf.load import load_hf
from tli_jax.hf.save import save_hf
from tli_jax.verify import proof

RESULTS = Path(__file__).parent / "results"
TOKENS, WINDOW = 2048, 256


def methods(layers: int) -> list[str]:
    """Flags of every method, at K = 2 or its equal in size where there is one."""
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
        f"--method moe --granularity 2 --top-k 4 --upcycle {how}"
        for how in ("virtual_groups", "virtual_groups_published")
    ]
    return [*rows, "--method tli --every 2 --experts 8"]


def loss_of_transformers(folder: Path, tokens_BT: np.ndarray) -> float:
    """Mean loss of each window's tokens but the first, in fp32."""
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
    found = [proof.compare_models(base, grown, plan, tokens_BT, "", lambda: None) for tokens_BT in texts]
    row = {
        "layers": f"{plan.base_layers} → {len(plan)}",
        **{key: record["after"][key] for key in ("parameters", "active_parameters", "flops_per_token")},
        "promise": plan.guarantee,
        "difference": max(one.max_abs_logit_difference / one.max_abs_logit for one in found),
        "loss_base": [one.loss_base for one in found],
        "loss": [one.loss_grown for one in found],
        "top1": found[0].top1,
        "seconds": seconds,
    }
    if util.find_spec("torch"):
        row["loss_of_transformers"] = loss_of_transformers(folder, texts[0])
        off = abs(row["loss_of_transformers"] - row["loss"][0])
        if off > 1e-4:
            sys.exit(f"{flags}: transformers finds a loss of {row['loss_of_transformers']}, not {row['loss'][0]}")
    return row


def table(result: dict[str, Any]) -> str:
    first = next(iter(result["rows"].values()))
    base = [f"{loss:.4f}" for loss in first["loss_base"]]
    lines = [
        f"| flags | layers | parameters | of a token | FLOPs a token | promise | measured | loss (base {base[0]})"
        f" | same top-1 | another text (base {base[1]}) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for flags, row in result["rows"].items():
        measured = "equal" if row["difference"] == 0 else f"{row['difference']:.1e}"
        lines.append(
            f"| `{flags}` | {row['layers']} | {row['parameters'] / 1e6:.2f}M | {row['active_parameters'] / 1e6:.2f}M"
            f" | {row['flops_per_token'] / 1e6:.2f}M | {row['promise']} | {measured} | {row['loss'][0]:.4f}"
            f" | {100 * row['top1']:.1f} % | {row['loss'][1]:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", type=Path, help="in domain; by default the embedded text")
    parser.add_argument("--other", type=Path, help="another one; by default topics of Python's documentation")
    parser.add_argument("--name", default="embedded", help="of the file of results")
    parser.add_argument("--table", metavar="NAME", help="grow nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads((RESULTS / f"methods_{options.table}.json").read_text())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = hub.resolve(options.model)
        config, params = load_hf(source, dtype=np.float32)
        save_hf(Path(temporary) / "base", config, params, source=source)
        base = open_checkpoint(Path(temporary) / "base")
        tokenizer, _ = tokens.open_tokenizer(base.folder, base.config)
        assert tokenizer is not None, "a text needs a tokenizer"
        texts = [
            tokens.windows(tokenizer.encode(text), base.config, TOKENS, WINDOW)
            for text in (
                read_plain(options.text) if options.text else tokens.embedded_text(),
                read_plain(options.other) if options.other else "\n".join(tokens.topics()),
            )
        ]
        rows = {}
        for number, flags in enumerate(methods(config.num_hidden_layers)):
            print(flags, file=sys.stderr)
            rows[flags] = grow(base, flags, texts, Path(temporary) / str(number))
    result = {
        # Where things lie on this machine is nobody's business.
        "command": " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]),
        "rows": rows,
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.platform()},
    }
    (RESULTS / f"methods_{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
