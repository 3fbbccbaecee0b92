"""Plans of the published model on common machines by `qwen2audio plan`: the source of the tables in docs/machines.md.

    python benchmarks/plan_machines.py measure [NAME ...]     # plans those named, else those without a record
    python benchmarks/plan_machines.py page                   # puts the tables of the records into docs/machines.md

Each record is a command and the JSON that it printed, a line of benchmarks/plan.jsonl. TPUs are planned for by
compiling with libtpu (x86-64 Linux, no TPU), which takes minutes a machine; GPUs by arithmetic.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "plan.jsonl"
PAGE = RECORDS.parent.parent / "docs" / "machines.md"
GIB = 1 << 30

ROWS_OF_1024 = "--prompt-tokens 512 --max-new-tokens 512 --clips 1000000 --mean-seconds 10"
INT8 = "--weights int8 --cache int8"

MACHINES = {
    "v5e:1x1, int8": f"--topology v5e:1x1 --batch 16 {ROWS_OF_1024} {INT8}",
    "v5e:2x2": f"--topology v5e:2x2 --batch 64 {ROWS_OF_1024}",
    "v5e:2x4": f"--topology v5e:2x4 --batch 128 {ROWS_OF_1024}",
    "v6e:2x4": f"--topology v6e:2x4 --batch 256 {ROWS_OF_1024}",
    "v5p:2x2x1": f"--topology v5p:2x2x1 --batch 512 {ROWS_OF_1024}",
    "l4x1, int8": f"--topology l4x1 --batch 16 {ROWS_OF_1024} {INT8}",
    "l4x4": f"--topology l4x4 --batch 64 {ROWS_OF_1024}",
    "a100-40gbx1": f"--topology a100-40gbx1 --batch 16 {ROWS_OF_1024}",
    "a100x1": f"--topology a100x1 --batch 64 {ROWS_OF_1024}",
    "h100x1": f"--topology h100x1 --batch 64 {ROWS_OF_1024}",
    "h100x1, int8": f"--topology h100x1 --batch 128 {ROWS_OF_1024} {INT8}",
    "h200x1": f"--topology h200x1 --batch 128 {ROWS_OF_1024}",
    "h100x8": f"--topology h100x8 --mesh 8xh100 --batch 512 {ROWS_OF_1024}",
    "h200x8": f"--topology h200x8 --mesh 8x1 --batch 1024 {ROWS_OF_1024}",
}
"""The table of machines, in its order."""

ONE_PROMPT = {
    "v5e:2x4, one prompt": "--topology v5e:2x4 --batch 1 --prompt-tokens 780 --max-new-tokens 244 --no-search",
}
"""A prompt of 780 tokens, 750 of them a clip of 30 s."""

TRAINING = {
    "v5e:2x2, LoRA": "--topology v5e:2x2 --train lora --batch 8",
    "v5e:2x4, LoRA": "--topology v5e:2x4 --train lora --batch 8",
    "v5p:2x2x2, full": "--topology v5p:2x2x2 --train full --batch 8",
}
"""Steps of rows of 1024 tokens, each with a clip of 30 s."""

COMMANDS = MACHINES | ONE_PROMPT | TRAINING


def records() -> dict[str, dict]:
    """The recorded output of `qwen2audio plan`, by name."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def measure(names: list[str]) -> None:
    """Plan, and keep what is printed."""
    for name in names or [name for name in COMMANDS if name not in records()]:
        command = f"plan {COMMANDS[name]} --json"
        print(f"qwen2audio {command}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "qwen2audio_jax", *command.split()], stdout=subprocess.PIPE, text=True, check=True
        )
        plan = json.loads(done.stdout.splitlines()[-1])
        known = records() | {name: {"name": name, "command": f"qwen2audio {command}", "plan": plan}}
        RECORDS.write_text("".join(json.dumps(known[name]) + "\n" for name in COMMANDS if name in known))


def gib(size: int | None) -> str:
    """Bytes in GiB."""
    return "?" if size is None else f"{size / GIB:.1f}"


def how(plan: dict) -> str:
    """Of a plan: by what."""
    return "compiled" if plan["by"] == "compiling" else "arithmetic"


def dtypes(plan: dict) -> str:
    """Of weights and cache."""
    short = {"bfloat16": "bf16"}
    return ", ".join(short.get(plan[what], plan[what]) for what in ("weights", "cache"))


def machine_row(plan: dict) -> tuple[str, ...]:
    """One machine; rates are those of the batch that was planned for."""
    over, rates, job = plan["next_batch"], plan["roofline"], plan["job"]
    speech = plan["transcription"]
    failed = "-" if over is None else f"{over['rows']}: {over['stage']}, {gib(over['needed'])}"
    return (
        f"{plan['topology']} ({how(plan)})",
        f"{plan['mesh']['data']} x {plan['mesh']['model']}",
        dtypes(plan),
        f"{plan['batch']}" if plan["fits"] else f"{plan['batch']}: no",
        gib(plan["weights_bytes_per_chip"]),
        gib(plan["cache_bytes_per_chip"]),
        gib(plan["temporary_bytes_per_chip"]),
        f"{gib(plan['peak_bytes_per_chip'])} of {gib(plan['limit_bytes_per_chip'])}",
        str(plan["largest_batch"]),
        failed,
        f"{rates['tokens_per_second']:.0f}" if rates else "-",
        f"{rates['clips_per_second']:.1f}" if rates else "-",
        f"{job['chip_hours_at_least']:.0f}" if job else "-",
        f"{speech['times_real_time_at_most']:.0f}" if speech else "-",
    )


MACHINE_HEAD = (
    *("machine", "data x model", "weights, cache", "rows", "weights", "cache", "temporaries", "peak", "most rows"),
    *("next size fails in, needs", "tokens/s", "clips/s", "chip-hours", "x real time"),
)
STAGE_HEAD = ("machine", "stage", "temporaries", "peak", "exchanges", "GFLOP a chip", "GB read a chip", "at best")
TRAINING_HEAD = ("machine", "trains", "rows", "data x model", "state", "frozen weights", "temporaries", "peak", "fits")


def stage_rows(plan: dict) -> list[tuple[str, ...]]:
    """The stages of a plan."""
    shapes = plan["shapes"]
    names = {
        "encode": f"encode, {shapes['clips']} clips of {shapes['frames']} frames",
        "prefill": f"prefill, {shapes['rows']} x {shapes['tokens']} tokens",
        "decode": f"a decode step, {shapes['rows']} rows of {shapes['capacity']}",
    }
    return [
        (
            plan["topology"],
            names[name],
            f"{stage['temporary_bytes_per_chip'] / GIB:.2f}",
            f"{stage['peak_bytes_per_chip'] / GIB:.2f}",
            ", ".join(f"{one['count']} {kind}, {one['bytes'] / 2**20:.1f} MiB" for kind, one in exchanges.items())
            or "none",
            f"{stage['flops_per_chip'] / 1e9:.0f}",
            f"{stage['bytes_per_chip'] / 1e9:.1f}",
            f"{1e3 * stage['least_seconds']:.1f} ms",
        )
        for name, stage in plan["stages"].items()
        for exchanges in [stage["collectives"]]
    ]


def training_row(plan: dict) -> tuple[str, ...]:
    """A training step."""
    return (
        plan["topology"],
        plan["trains"],
        f"{plan['rows']} of {plan['tokens']}",
        f"{plan['mesh']['data']} x {plan['mesh']['model']}",
        *(gib(plan[f"{what}_bytes_per_chip"]) for what in ("state", "frozen", "temporary")),
        f"{gib(plan['peak_bytes_per_chip'])} of {gib(plan['limit_bytes_per_chip'])}",
        "yes" if plan["fits"] else "no",
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in lines)


def tables() -> tuple[str, str, str]:
    """Those in docs/machines.md."""
    known = {name: record["plan"] for name, record in records().items()}
    stages = [row for name in (*ONE_PROMPT, "v5e:2x4") if name in known for row in stage_rows(known[name])]
    return (
        table(MACHINE_HEAD, [machine_row(known[name]) for name in MACHINES if name in known]),
        table(STAGE_HEAD, stages),
        table(TRAINING_HEAD, [training_row(known[name]) for name in TRAINING if name in known]),
    )


def with_tables(text: str) -> str:
    """The page with these tables instead of those that it has under the same heads."""
    for new in tables():
        head = new.splitlines()[0]
        text, found = re.subn(rf"^{re.escape(head)}\n(\|.*\n)*", lambda match, new=new: new, text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"docs/machines.md has {found} tables under {head!r}, and should have one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "page"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(COMMANDS))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(COMMANDS):
        parser.error(f"no plan is named {', '.join(map(repr, unknown))}; there are: {'; '.join(COMMANDS)}")
    if arguments.what == "measure":
        measure(arguments.names)
    else:
        PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
