"""Throughput of the engine and the server, in pairs: requests at once beside one after the other, and transformers.

    python benchmarks/serve_throughput.py --output benchmarks/results/serve_throughput

Needs the extras `serve` and `test`, httpx and fastapi, and for the mid-size configuration about 12 GB of memory. Every
round of a case runs both sides, one after the other, on clips of noise that neither has heard before; its line in
OUTPUT.jsonl is written when it ends, and rounds that are in that file already are not run again. OUTPUT.md gives the
medians of the ratios. The cases:

    engine-32     the embedded model in the engine, clips of 2 s as it was trained on, 32 new tokens: N requests at
                  once, and one after the other
    engine-128    the same with 128 new tokens
    http-32       the mid-size model through HTTP, clips of 5 s, 32 new tokens: the same
    http-256      the same with 256 new tokens
    transformers  8 clients, 32 new tokens: this server, and FastAPI around transformers' `generate`
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from serve_clients import noise, part_of, serving, whole
from side_by_side import machine

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.embedded import model_folder
from qwen2audio_jax.engine import Engine, Request

SECONDS = 5.0
SPOKEN_SECONDS = 2.0
"""About as long as the examples of the embedded model."""
CLIENTS = 8
CASES = ("engine-32", "engine-128", "http-32", "http-256", "transformers")
GOALS = {"engine-32": 3.0, "engine-128": 3.0, "http-32": 1.7, "http-256": 2.5, "transformers": 2.0}
TEXT = {"type": "text", "text": "What is heard?"}
EMBEDDED = "embedded"

Side = Callable[[list[int]], list[str]]
"""Answers to questions on the clips of some seeds."""
Pair = tuple[tuple[str, Side], tuple[str, Side]]


def write_model(folder: Path, name: str) -> None:
    """A checkpoint of random weights, with the embedded model's tokenizer, filled up so that every token has a text."""
    import torch
    import transformers

    small = json.loads((model_folder() / "config.json").read_text())
    facts = {**Qwen2AudioConfig.from_name(name).to_dict(), "audio_token_index": small["audio_token_index"]}
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig.from_dict(facts)
    transformers.Qwen2AudioForConditionalGeneration(config).eval().save_pretrained(folder)
    for file in model_folder().iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "preprocessor")):
            shutil.copy(file, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # Added tokens that the vocabulary lacks are given the ids behind it when the file is loaded.
    vocabulary |= {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    rest = set(range(config.text_config.vocab_size)) - set(vocabulary.values())
    vocabulary |= {f"\u0120w{number}": number for number in sorted(rest)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def through_http(url: str, tokens: int, *, clients: int) -> Side:
    def run(seeds: list[int]) -> list[str]:
        def one(seed: int) -> str:
            content = [part_of(noise(seed, SECONDS)), TEXT]
            return whole(url, content, max_tokens=tokens, min_tokens=tokens)

        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(one, seeds))

    return run


@contextmanager
def engine_pair(requests: int, tokens: int) -> Iterator[Pair]:
    model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    with Engine(model, processor, slots=requests, queue=requests, positions=512) as engine:

        def begin(seed: int) -> Any:
            return engine.submit(Request(prompt=TEXT["text"], clips=(noise(seed, SPOKEN_SECONDS),), options=options))

        def at_once(seeds: list[int]) -> list[str]:
            return [handle.result().text for handle in [begin(seed) for seed in seeds]]

        def in_turn(seeds: list[int]) -> list[str]:
            return [begin(seed).result().text for seed in seeds]

        yield ("at once", at_once), ("in turn", in_turn)


def ours(folder: str, slots: int) -> list[str]:
    model = [] if folder == EMBEDDED else ["--model", folder]
    return ["-m", "qwen2audio_jax", "serve", *model, "--slots", str(slots), "--positions", "512", "--warmup", "0"]


@contextmanager
def http_pair(folder: str, requests: int, tokens: int) -> Iterator[Pair]:
    with serving(ours(folder, requests)) as (url, _):
        at_once, in_turn = (through_http(url, tokens, clients=clients) for clients in (requests, 1))
        yield ("at once", at_once), ("in turn", in_turn)


@contextmanager
def transformers_pair(folder: str) -> Iterator[Pair]:
    theirs = ["benchmarks/serve_transformers.py", "--model", str(model_folder()) if folder == EMBEDDED else folder]
    with serving(ours(folder, CLIENTS)) as (url, _), serving(theirs) as (their_url, _):
        sides = [through_http(each, 32, clients=CLIENTS) for each in (url, their_url)]
        yield ("ours", sides[0]), ("transformers", sides[1])


def run_case(case: str, pair: Pair, requests: int, rounds: range, write: Callable[[dict[str, Any]], None]) -> None:
    """Rounds of a case; the first run of both sides compiles and is not counted."""
    seeds = count(1_000_000 * CASES.index(case) + 10_000 * rounds.start)
    for number in range(rounds.start - 1, rounds.stop):
        own = [next(seeds) for _ in range(requests)]
        seconds, answers = {}, {}
        # A side must not profit from what the other has left in a cache: where both are one server, clips differ.
        for side, run in pair if number % 2 else reversed(pair):
            shift = 0 if case == "transformers" else 5_000_000 * (side == "in turn")
            began = time.perf_counter()
            answers[side] = run([seed + shift for seed in own])
            seconds[side] = round(time.perf_counter() - began, 3)
        if number >= rounds.start:
            found = {"case": case, "round": number, "seconds": seconds}
            if case == "transformers":
                same = zip(*answers.values(), strict=True)
                found["equal answers"] = f"{sum(a == b for a, b in same)} of {requests}"
            write(found)


def table(lines: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    facts = machine()
    rows = []
    for case in CASES:
        own = [line["seconds"] for line in lines if line["case"] == case]
        if own:
            fast, slow = sorted(own[0])
            ratio = statistics.median(each[slow] / each[fast] for each in own)
            seconds = [statistics.median(each[side] for each in own) for side in (fast, slow)]
            rows.append(
                f"| {case} | {fast} | {seconds[0]:.2f} | {slow} | {seconds[1]:.2f} | {ratio:.2f} | {GOALS[case]} "
                f"| {len(own)} |"
            )
    return "\n".join(
        [
            f"`python {shlex.join(sys.argv)}`, {facts['date']}, {facts['cores']} cores of {facts['processor']}; "
            f"{arguments.requests} requests a round; engine: the embedded model, clips of {SPOKEN_SECONDS:g} s, the "
            f"others: {arguments.model} in float32, clips of {SECONDS:g} s; medians",
            "",
            "| case | | s | | s | ratio | wanted | rounds |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mid-size", help="configuration, or 'embedded' (default %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.jsonl and OUTPUT.md")
    arguments = parser.parse_args()
    record = arguments.output.with_suffix(".jsonl")
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def write(line: dict[str, Any]) -> None:
        lines.append(line)
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = EMBEDDED if arguments.model == EMBEDDED else f"{temporary}/model"
        os.environ.setdefault("QWEN2AUDIO_CACHE", f"{temporary}/cache")
        for case in arguments.case or CASES:
            begun = 1 + max((line["round"] for line in lines if line["case"] == case), default=0)
            if begun > arguments.rounds:
                continue
            if not case.startswith("engine") and folder != EMBEDDED and not Path(folder).exists():
                write_model(Path(folder), arguments.model)
            pairs = {
                "engine-32": lambda: engine_pair(arguments.requests, 32),
                "engine-128": lambda: engine_pair(arguments.requests, 128),
                "http-32": lambda: http_pair(folder, arguments.requests, 32),
                "http-256": lambda: http_pair(folder, arguments.requests, 256),
                "transformers": lambda: transformers_pair(folder),
            }
            with pairs[case]() as pair:
                run_case(case, pair, arguments.requests, range(begun, arguments.rounds + 1), write)
    text = table(lines, arguments)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
