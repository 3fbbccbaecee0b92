"""Throughput of the engine beside loops of `generate` at a batch of 8: transformers' and our own, in alternation.

    python benchmarks/engine_throughput.py --output benchmarks/results/engine_throughput

Needs the extra `test` and, for the mid-size configuration, about 12 GB of memory. All compute the same random weights
on the same requests: 48 clips of random lengths, each with a number of new tokens of its own; the loops take them in
their order and run every batch until its longest answer is whole. All greedy tokens are compared. A round runs all
three, or from `--their-rounds` on the first two; the table gives the medians of their seconds, and the engine's own
figures.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from side_by_side import inputs_of, machine, prepare

from qwen2audio_jax import Qwen2AudioProcessor
from qwen2audio_jax.engine import Engine, Request

BATCH = 8
WORKLOADS = {"1 to 10 s, 1 to 64 tokens": (10.0, 64), "1 to 3 s, 1 to 16 tokens": (3.0, 16)}
GREEDY = {"do_sample": False, "pad_token_id": 0}

Requests = list[tuple[float, int]]


def draw(count: int, *, seconds: float, tokens: int) -> Requests:
    """(seconds, new tokens) of requests."""
    rng = np.random.default_rng(0)
    return [(float(rng.uniform(1, seconds)), int(rng.integers(1, tokens + 1))) for _ in range(count)]


def batches(config: Any, requests: Requests) -> list[tuple[dict[str, np.ndarray], int]]:
    """Inputs of each batch, and its most new tokens."""
    parts = [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]
    return [
        (inputs_of(config, tuple(length for length, _ in part), 20), max(tokens for _, tokens in part))
        for part in parts
    ]


def their_loop(theirs: Any, parts: list[tuple[dict[str, np.ndarray], int]]) -> list[np.ndarray]:
    """New tokens of every batch by transformers."""
    found = []
    with torch.inference_mode():
        for inputs, tokens in parts:
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            made = theirs.generate(**tensors, max_new_tokens=tokens, eos_token_id=None, **GREEDY)
            found += list(made[:, inputs["input_ids"].shape[1] :].numpy())
    return found


def our_loop(ours: Any, parts: list[tuple[dict[str, np.ndarray], int]]) -> list[np.ndarray]:
    """New tokens of every batch by our `generate`."""
    found = []
    for inputs, tokens in parts:
        made = ours.generate(**inputs, max_new_tokens=tokens, eos_token_id=[], **GREEDY)
        found += list(made[:, inputs["input_ids"].shape[1] :])
    return found


def by_engine(engine: Engine, requests: list[Request]) -> list[np.ndarray]:
    """New tokens of every request by the engine."""
    handles = [engine.submit(request) for request in requests]
    return [handle.result().token_ids for handle in handles]


def as_requests(parts: list[tuple[dict[str, np.ndarray], int]], drawn: Requests) -> list[Request]:
    """The rows of the batches, each with its own number of new tokens."""
    rows = []
    for inputs, _ in parts:
        for row in range(len(inputs["input_ids"])):
            own = {name: array[row : row + 1] for name, array in inputs.items()}
            options = {**GREEDY, "eos_token_id": [], "max_new_tokens": drawn[len(rows)][1]}
            rows.append(Request(inputs=own, options=options))
    return rows


def measure(theirs: Any, ours: Any, processor: Qwen2AudioProcessor, name: str, arguments: Any) -> dict[str, Any]:
    """One workload's medians."""
    seconds, tokens = WORKLOADS[name]
    drawn = draw(arguments.requests, seconds=seconds, tokens=tokens)
    parts = batches(ours.config, drawn)
    requests = as_requests(parts, drawn)
    loops = {"ours": partial(our_loop, ours, parts), "theirs": partial(their_loop, theirs, parts)}
    their_rounds = arguments.rounds if arguments.their_rounds is None else arguments.their_rounds
    times: dict[str, list[float]] = {"engine": [], **{whose: [] for whose in loops}}
    figures = []
    by_engine_once = partial(run_engine, ours, processor, requests, figures)
    by_engine_once()  # all compile before the first round
    our_loop(ours, parts)
    for number in range(arguments.rounds):
        answers = {}
        for whose, run in {"engine": by_engine_once, **loops}.items():
            if whose == "theirs" and number >= their_rounds:
                continue
            began = time.perf_counter()
            answers[whose] = run()
            times[whose].append(time.perf_counter() - began)
            print(f"{name}: {whose} {times[whose][-1]:.1f} s", file=sys.stderr, flush=True)
        for row, (_, count) in enumerate(drawn):
            for whose in answers:
                np.testing.assert_array_equal(answers["engine"][row], answers[whose][row][:count])
    medians = {whose: round(statistics.median(found), 2) if found else None for whose, found in times.items()}
    return {
        "seconds": medians,
        **{f"{whose} / engine": medians[whose] and round(medians[whose] / medians["engine"], 2) for whose in loops},
        "rounds": times,
        "engine": {key: figures[-1][key] for key in ("occupancy", "enqueued_share", "steps", "tokens")},
    }


def run_engine(ours: Any, processor: Qwen2AudioProcessor, requests: list[Request], figures: list[Any]) -> Any:
    """All requests through a new engine."""
    with Engine(ours, processor, slots=BATCH, queue=len(requests)) as engine:
        answers = by_engine(engine, requests)
        figures.append(engine.stats())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mid-size", help="configuration of random weights (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--their-rounds", type=int, help="rounds with transformers (default: all)")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = prepare(arguments.model, arguments.dtype, Path(folder))
        processor = Qwen2AudioProcessor.from_pretrained()
        found = {
            name: measure(theirs, ours, processor, name, arguments) for name in arguments.workload or list(WORKLOADS)
        }
    command = "python " + shlex.join(sys.argv)
    facts = machine()
    report = {"machine": facts, "model": arguments.model, "dtype": arguments.dtype, "command": command}
    report["workloads"] = found
    lines = [
        f"`{command}`, {facts['date']}, {facts['cores']} cores of {facts['processor']}, {arguments.model} in "
        f"{arguments.dtype}, medians of {arguments.rounds} rounds",
        "",
        "| 48 requests | transformers, s | generate, s | engine, s | transformers / engine | generate / engine |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {each['seconds']['theirs'] or '-'} | {each['seconds']['ours']} | {each['seconds']['engine']} "
            f"| {each['theirs / engine'] or '-'} | {each['ours / engine']} |"
            for name, each in found.items()
        ),
    ]
    print(json.dumps(report, indent=1))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
