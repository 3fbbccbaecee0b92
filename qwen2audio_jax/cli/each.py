"""`qwen2audio generate --each`: the same prompt for every one of several files, through the engine."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.cli.clips import clip_source, tell_cut
from qwen2audio_jax.cli.commands import in_options
from qwen2audio_jax.cli.from_options import join, load_model, prepare, tell_model
from qwen2audio_jax.cli.options import clip_options
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.cli.profile import check_profile_folder, profiled
from qwen2audio_jax.cli.stats import Stats, in_words
from qwen2audio_jax.engine import Engine, Request
from qwen2audio_jax.engine.request import Answer, RequestError
from qwen2audio_jax.limits import LIMITS

WORKERS = 2
"""Processes that load clips, where there are many."""
FEW = 4
"""Files that are loaded in threads, as starting a process takes longer."""


def run_each(options: argparse.Namespace) -> int:
    """Answer the prompt for each file, in their order; 1 if any has no answer.

    Raises:
        ValueError: an input or option cannot be used.
    """
    if options.audio:
        raise ValueError("--each asks about every file by itself, --audio about all at once: give one of them")
    if "-" in options.each:
        raise ValueError("--each takes files: give --audio - for a clip on standard input")
    files = [_file(name) for name in options.each]
    if options.raw and "<|AUDIO|>" not in (options.prompt or ""):
        raise ValueError("with --raw write <|audio_bos|><|AUDIO|><|audio_eos|> into the prompt, where the clip belongs")
    check_profile_folder(options.profile)
    processor, arguments = prepare(options)
    if arguments.pop("num_return_sequences") != 1:
        raise ValueError("--each gives one answer a file: leave out --num-return-sequences")
    seed, _ = arguments.pop("seed"), arguments.pop("tokenizer")
    for name, file in zip(options.each, files, strict=True):
        tell_cut(file, name, options=options, extractor=processor.feature_extractor)
    join(options)
    if jax.process_count() > 1:
        raise ValueError("--each runs in one process: see `qwen2audio batch --shard`")
    stats = Stats()
    with stats.stage("load"):
        model = load_model(options)
    tell_model(options)
    requests = [
        Request(
            id=name,
            prompt=options.prompt or None,
            system=options.system,
            clips=(file,),
            options=arguments,
            seed=None if seed is None else seed + index,
        )
        for index, (name, file) in enumerate(zip(options.each, files, strict=True))
    ]
    hearing: dict[str, Any] = {**clip_options(options), "allow_special": options.allow_special}
    failures = tokens = 0
    workers = WORKERS * (len(files) > FEW)
    with (
        profiled(options.profile),
        stats.stage("answer"),
        Engine(model, processor, workers=workers, **hearing) as engine,
    ):
        for request, outcome in zip(requests, engine.answers(requests), strict=True):
            stats.token()
            failures += isinstance(outcome, RequestError)
            tokens += 0 if isinstance(outcome, RequestError) else len(outcome.token_ids)
            for line in _lines(request.id, outcome, options=options):
                write(line + "\n")
    if options.stats:
        say(in_words(stats.figures(tokens=tokens, audio_seconds=0)))
    return 1 if failures else 0


def _file(name: str) -> str | bytes:
    source = clip_source(name)
    if isinstance(source, str):
        return source
    with source:  # what a shell puts in the place of a file: other processes cannot open it
        return source.read(LIMITS.file_bytes + 1)


def _lines(name: str, outcome: Answer | RequestError, *, options: argparse.Namespace) -> Iterator[str]:
    if isinstance(outcome, RequestError):
        if options.json:
            yield json.dumps({"audio": name, "error": {"kind": outcome.kind, "message": str(outcome)}})
        else:
            say(f"{name}: {in_options(outcome, 'generate')}")
        return
    if not options.quiet:
        for missing in outcome.truncated_clips:
            say(f"{name} is heard in part: {missing.partition(': ')[2]}")
        if not outcome.text.strip():
            say(f"{name}: the answer is empty")
    if not options.json:
        yield f"{name}: {outcome.text}"
        return
    answer: dict[str, Any] = {
        "audio": name,
        "text": outcome.text,
        "ids": outcome.token_ids.tolist(),
        "finish_reason": outcome.finish_reason,
        "tokens": len(outcome.token_ids),
        "mean_log_prob": float(np.mean(outcome.log_probs)),
        "prompt_tokens": outcome.prompt_tokens,
        **({"truncated_clips": [0]} if outcome.truncated_clips else {}),
    }
    yield json.dumps(answer)
