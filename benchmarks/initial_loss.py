"""What every method costs before any training: the loss of the grown model, as a Markdown table.

    python benchmarks/initial_loss.py [--model embedded] [--text FILE]

Each row is one run of ``python -m tli_jax.upscale`` with the flags it shows, and says what the proof of that run found.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from tli_jax import command, upscale
from tli_jax.checkpoint import hub
from tli_jax.checkpoint.hf import open_checkpoint


def methods(layers: int) -> list[str]:
    """Flags of every method, at K = 2 or its equal in size where there is one."""
    tli = ["identity", "copy", "scaled --scale 0.3", "half", "average", "average_identity", "noise", "random"]
    rows = [f"--method tli --every 2 --init {init}" for init in tli]
    rows += [f"--method dus --drop {layers // 4}", "--method average --every 2", "--method slayer"]
    rows += [f"--method llama_pro --groups {layers // 2}"] if layers % 2 == 0 else ["--method llama_pro --groups 1"]
    return [*rows, "--method interpose", "--method stack --times 2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", help="instead of the embedded text")
    args = parser.parse_args()
    layers = open_checkpoint(hub.resolve(args.model)).config.num_hidden_layers
    text = ["--text", args.text] if args.text else []
    print("| flags | layers | promise | loss of base | loss of grown | Δ | KL | same top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    for flags in methods(layers):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "grown"
            common = ["--model", args.model, "--output", str(output), "--json"]
            # What the command prints is in growth.json; the table is alone on stdout.
            with contextlib.redirect_stdout(io.StringIO()):
                code = command.run(upscale.main, [*common, *flags.split(), *text])
            if code:
                raise SystemExit(code)
            record = json.loads((output / "growth.json").read_text(encoding="utf-8"))
        proof = record["proof"]
        print(
            f"| `{flags}` | {layers} → {len(record['rows'])} | {record['exactness']} | {proof['loss_base']:.4f}"
            f" | {proof['loss_grown']:.4f} | {proof['loss_grown'] - proof['loss_base']:+.4f}"
            f" | {proof['kl']:.4f} | {100 * proof['top1']:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
