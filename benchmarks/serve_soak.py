"""A soak of the server: clients that ask the embedded model without a pause, its memory, and whether all is answered.

    python benchmarks/serve_soak.py --minutes 10 --output benchmarks/results/serve.md

Needs the extra `serve` and httpx. Every answer is compared with the one that the same question got alone; each client
also leaves some answers in their middle. The memory is that of the server's process and its workers, once a second.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from serve_clients import ask, part_of, serving

from qwen2audio_jax.embedded import examples

QUESTIONS = ("Which digits are spoken?", "How many digits are spoken?", "Is the voice high or low?", None)
TOKENS = 24
LEFT = 20
"""One answer in so many is left after its first piece."""


@dataclass
class Tally:
    """What the clients have seen."""

    first: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def resident(pid: int) -> int:
    """Bytes in memory of a process and its descendants."""
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                sizes[int(folder.name)] = int((folder / "statm").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
    family, left = 0, [pid]
    while left:
        each = left.pop()
        family += sizes.get(each, 0)
        left += [child for child, parent in parents.items() if parent == each]
    return family * os.sysconf("SC_PAGE_SIZE")


def contents() -> list[list[dict[str, Any]]]:
    """Every example clip with every question, and without one."""
    return [
        [part_of(path.read_bytes()), *([{"type": "text", "text": text}] if text else [])]
        for path, text in itertools.product(examples(), QUESTIONS)
    ]


def leave(client: httpx.Client, url: str, content: list[dict[str, Any]]) -> None:
    """Ask, and go after the first piece."""
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 400, "min_tokens": 400}
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        next(response.iter_lines())


def run_client(url: str, seed: int, until: float, wanted: list[str], tally: Tally) -> None:
    """Ask until the time is over."""
    draw, asked = random.Random(seed), contents()
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < until:
            index = draw.randrange(len(asked))
            try:
                if not draw.randrange(LEFT):
                    leave(client, url, asked[index])
                    tally.counts["left"] += 1
                    continue
                heard = ask(client, url, asked[index], max_tokens=TOKENS)
            except (httpx.HTTPError, ValueError) as error:
                tally.counts["lost"] += 1
                tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            tally.first.append(heard.first)
            tally.counts["answered"] += 1
            tally.counts["wrong"] += heard.text != wanted[index]


def soak(*, seconds: float, clients: int, slots: int, warmup: int) -> dict[str, Any]:
    """The figures of a soak, after programs for prompts of `warmup` tokens are compiled."""
    command = ["-m", "qwen2audio_jax", "serve", "--slots", str(slots), "--positions", "512"]
    command += ["--warmup", str(warmup)]
    with serving(command) as (url, pid), httpx.Client(timeout=60) as client:
        wanted = [ask(client, url, content, max_tokens=TOKENS).text for content in contents()]
        began = time.monotonic()
        tallies = [Tally() for _ in range(clients)]
        threads = [
            threading.Thread(target=run_client, args=(url, seed, began + seconds, wanted, tally))
            for seed, tally in enumerate(tallies)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < began + seconds:
            time.sleep(1.0)
            memory.append(resident(pid))
        for thread in threads:
            thread.join()
        time.sleep(1.0)
        lines = client.get(f"{url}/metrics").text.splitlines()
        left = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    first = sorted(itertools.chain.from_iterable(tally.first for tally in tallies))
    counts = sum((tally.counts for tally in tallies), Counter())
    settled = memory[len(memory) // 10 :]
    return {
        **{name: counts[name] for name in ("answered", "left", "lost", "wrong")},
        "errors": dict(sum((tally.errors for tally in tallies), Counter())),
        "slots in use at the end": int(left["qwen2audio_slots_in_use"]),
        "seconds to the first token": {
            name: round(first[min(int(len(first) * share), len(first) - 1)], 4)
            for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("most", 1.0))
        },
        "answers a second": round(counts["answered"] / seconds, 1),
        "MiB at every tenth": " ".join(f"{memory[len(memory) * tenth // 10] / 2**20:.0f}" for tenth in range(10)),
        "MiB after the first tenth": round(settled[0] / 2**20, 1),
        "MiB at the end": round(settled[-1] / 2**20, 1),
        "most above the first tenth, %": round(100 * (max(settled) / settled[0] - 1), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=256, help="tokens of prompts (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a report in Markdown")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("clients", "slots", "warmup")}
    found = soak(seconds=60 * arguments.minutes, **settings)
    print(json.dumps(found, indent=1))
    if arguments.output:
        first = found["seconds to the first token"]
        lines = [
            "# A soak of the server",
            "",
            f"`python {shlex.join(sys.argv)}`, {date.today()}, {os.cpu_count()} cores, the embedded model with "
            f"{arguments.slots} slots, {arguments.clients} clients that ask without a pause for {arguments.minutes:g} "
            "minutes; the clients share the cores with the server.",
            "",
            "|  |  |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in found.items() if not isinstance(value, dict)),
            *(f"| seconds to the first token, {name} | {value} |" for name, value in first.items()),
        ]
        arguments.output.write_text("\n".join(lines) + "\n")
    if found["lost"] or found["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
