"""The stages as XLA compiles them for TPUs, beside exact arithmetic: FLOPs, bytes, memory and exchanges of a chip.

    python benchmarks/tpu_stages.py --topology v5e:2x4            # what is measured already is not compiled again
    python benchmarks/tpu_stages.py --topology v5e:2x4 --rows 8 --weights int8

Encode, prefill and a decode step of the 7B configuration, rows of 1024 positions with a clip of 30 s each. Needs
`libtpu` (x86 Linux) and no TPU; only one process may use it at a time, and a case takes a minute or two. Writes
results/tpu_stages.json and .md. These are properties of programs: nothing here is a time on a TPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Before jax is imported: the host computes on the CPU, and libtpu is not to ask the network which machine it is on.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.plan.inference import plan_inference
from qwen2audio_jax.plan.report import report
from qwen2audio_jax.plan.request import make_request
from qwen2audio_jax.plan.topology import parse_topology

RESULTS = Path(__file__).resolve().parent / "results" / "tpu_stages.json"
HEAD = (
    *("machine", "weights", "stage", "GFLOP: XLA", "exact", "ratio", "GB: XLA", "weights and cache", "ratio"),
    *("peak, GiB", "temporaries, GiB", "exchanges"),
)
NOTE = """\
XLA counts the operands and the result of every operation, activations and copies included; the exact numbers are the
products alone (a multiplication and its addition are two), and each weight and the whole cache read once. A custom
kernel, the flash attention over prompts and clips, has no FLOPs in XLA's count. The peak is with all weights and the
whole cache, which every program has beside it.
"""


def stage_rows(name: str, plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of one case."""
    shapes = plan["shapes"]
    titles = {
        "encode": f"encode {shapes['clips']} x {shapes['frames']} frames",
        "prefill": f"prefill {shapes['rows']} x {shapes['tokens']} tokens",
        "decode": f"decode {shapes['rows']} rows of {shapes['capacity']}",
    }
    lines = []
    for stage, one in plan["stages"].items():
        exchanges = (f"{e['count']} {kind}, {e['bytes'] / 2**20:.2f} MiB" for kind, e in one["collectives"].items())
        pairs = [(one["compiler_flops_per_chip"], one["flops_per_chip"])]
        pairs.append((one["compiler_bytes_per_chip"], one["bytes_per_chip"]))
        counts = [text for a, b in pairs for text in (f"{a / 1e9:.2f}", f"{b / 1e9:.2f}", f"{a / b:.2f}")]
        memory = (f"{one[f'{what}_bytes_per_chip'] / 2**30:.2f}" for what in ("peak", "temporary"))
        lines.append((plan["topology"], name, titles[stage], *counts, *memory, "; ".join(exchanges) or "none"))
    return lines


def table(plans: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [row for case in plans.values() for row in stage_rows(case["plan"]["weights"], case["plan"])]
    versions = {f"{name} {v}" for case in plans.values() for name, v in case["plan"]["versions"].items()}
    commands = "".join(f"- `{command}`\n" for command in dict.fromkeys(case["command"] for case in plans.values()))
    text = "".join("| " + " | ".join(row) + " |\n" for row in rows).replace(" --- ", "---")
    return f"Compiled with {', '.join(sorted(versions))}, by\n\n{commands}\n{NOTE}\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen2-audio-7b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 1, 64])
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    command = " ".join(["python", "benchmarks/tpu_stages.py", *sys.argv[1:]])
    for rows in arguments.rows:
        for weights in arguments.weights:
            case = f"{arguments.config} on {arguments.topology}, {rows} rows, {weights}"
            if case in known:
                continue
            request = make_request(
                Qwen2AudioConfig.from_name(arguments.config),
                topology=parse_topology(arguments.topology),
                batch=rows,
                prompt_tokens=780,
                max_new_tokens=244,
                weights=weights,
            )
            plan = plan_inference(request, search=False, say=lambda line: print(line, file=sys.stderr, flush=True))
            if not plan.fits:
                raise ValueError(f"{case}: does not fit: {plan.refusal}")
            known[case] = {"command": command, "plan": report(plan, name=arguments.config)}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(known, indent=1) + "\n")
            arguments.output.with_suffix(".md").write_text(table(known))


if __name__ == "__main__":
    main()
