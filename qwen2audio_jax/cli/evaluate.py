"""`qwen2audio evaluate`: scores of a model on synthesised speech; with a task see `evaluate_task`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from qwen2audio_jax.cli.from_options import join, load_model
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.command_line import nearest
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_processor_files

if TYPE_CHECKING:
    from qwen2audio_jax.speech.scoring import Scores

SPLITS = ("test", "unseen")
"""Voices of --fresh."""


def run(options: argparse.Namespace) -> int:
    """Evaluate on a folder of records, or on speech that is synthesised first.

    Raises:
        ValueError: the data, the model or an option cannot be used, or espeak-ng is missing.
    """
    if options.fresh is not None and options.split not in (None, *SPLITS):
        hint = nearest(options.split, SPLITS)
        raise ValueError(f"--split: {options.split!r} is not among {', '.join(SPLITS)}{hint}")
    if options.task is not None or options.output is not None:
        # Imported here: it takes what batch jobs need.
        from qwen2audio_jax.cli.evaluate_task import run_task

        return run_task(options)
    _run_digits(options)
    return 0


def _run_digits(options: argparse.Namespace) -> None:
    if options.manifest is not None or options.layout is not None:
        raise ValueError("--manifest and --layout are for a task: name it, as in evaluate transcribe --manifest FILE")
    if (options.data is None) == (options.fresh is None):
        raise ValueError("name what to evaluate on: either --data DIR or --fresh N; or a task, with --manifest FILE")
    if options.data is not None and (options.seed is not None or options.split is not None):
        raise ValueError("--seed and --split are for --fresh, which synthesises; leave them out with --data")
    join(options)
    # Imported here: the other commands do not need it.
    from qwen2audio_jax.speech.dataset import write_dataset
    from qwen2audio_jax.speech.evaluate import evaluate, read_records
    from qwen2audio_jax.speech.scoring import score

    with tempfile.TemporaryDirectory(prefix="qwen2audio-evaluate-") as scratch:
        folder = Path(options.data or Path(scratch, "data"))
        if options.fresh is not None:
            seed = 0 if options.seed is None else options.seed
            write_dataset(folder, clips=options.fresh, seed=seed, split=options.split or "test")
        read_records(folder)
        processor = Qwen2AudioProcessor.from_pretrained(
            resolve_processor_files(options.model, revision=options.revision)
        )
        model = load_model(options)
        shown = _show if sys.stderr.isatty() and not options.quiet else None
        scores = score(evaluate(model, processor, data=folder, batch=options.batch, progress=shown))
    if jax.process_index() != 0:
        return
    if options.json:
        write(json.dumps(scores.to_dict()) + "\n")
        return
    write(figures(scores))


def figures(scores: "Scores") -> str:
    """The scores as lines of name and percentage; tasks without questions are left out."""
    lines = (
        ("digit error rate", scores.digit_error_rate),
        ("strings right", scores.strings_right),
        ("digit error rate in conversations", scores.chat_digit_error_rate),
        ("sums right", scores.sums),
        ("analysis right", scores.analysis),
        ("pairs right", scores.pairs),
        ("all right", scores.overall),
        *((f"  {task} ({scores.counts[task]})", value) for task, value in scores.accuracy.items()),
    )
    return "".join(f"{name:36}{100 * value:7.2f} %\n" for name, value in lines if value is not None)


def _show(done: int, total: int) -> None:
    say(f"{done} of {total} examples")
