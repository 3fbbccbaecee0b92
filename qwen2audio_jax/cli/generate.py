"""`qwen2audio generate`: one prompt, one answer."""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.clips import load_clip
from qwen2audio_jax.cli.from_options import join, load_model, prepare, tell_model
from qwen2audio_jax.cli.output import note, read_pieces, say, write
from qwen2audio_jax.cli.profile import check_profile_folder, profiled
from qwen2audio_jax.cli.stats import Stats, in_words
from qwen2audio_jax.cli.status import status
from qwen2audio_jax.generation.sampling_params import check_seed
from qwen2audio_jax.processing.output import ProcessorOutput
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor


@dataclass(frozen=True)
class _Question:
    """The inputs of the model, the arguments of `generate` beside them, and what the answer's object says of clips."""

    inputs: ProcessorOutput
    arguments: dict[str, Any]
    audio_seconds: float
    truncated: list[int]


def generate(options: argparse.Namespace) -> int:
    """Answer the prompt in the options, and return the exit code.

    Raises:
        ValueError: an input or option cannot be used.
    """
    if options.seed is not None:
        check_seed(options.seed)  # before anything that takes time
    if options.each:
        from qwen2audio_jax.cli.each import run_each  # one prompt alone needs no engine

        return run_each(options)
    prompt = _prompt(options)
    check_profile_folder(options.profile)
    processor, arguments = prepare(options)
    extractor = processor.feature_extractor
    stdin = options.prompt != "-"
    clips = [load_clip(path, options=options, extractor=extractor, stdin=stdin) for path in options.audio]
    samples = [clip.samples for clip in clips]
    inputs = _inputs(prompt, samples, options=options, processor=processor)
    truncated = [number for number, clip in enumerate(clips) if clip.missing is not None]
    question = _Question(inputs, arguments, sum(map(len, samples)) / extractor.sampling_rate, truncated)
    join(options)
    stats = Stats()
    with stats.stage("load"):
        model = load_model(options)
    with profiled(options.profile):
        _answer(question, model=model, processor=processor, options=options, stats=stats)
    return 0


def _answer(
    question: _Question,
    *,
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    options: argparse.Namespace,
    stats: Stats,
) -> None:
    inputs, arguments = question.inputs, question.arguments
    if jax.process_count() == 1 and not options.json and arguments["num_return_sequences"] == 1:
        written: list[str] = []
        with stats.stage("answer"):
            pieces = model.stream(**inputs, **arguments)  # which checks; after this nothing is refused
            tell_model(options)
            reason = read_pieces(pieces, written=written, stats=stats, quiet=options.quiet)
        if not options.quiet:
            note("".join(written), reason=reason)
        if options.stats:
            say(in_words(stats.figures(tokens=getattr(reason, "tokens", 0), audio_seconds=question.audio_seconds)))
        return
    width = inputs.input_ids.shape[1]
    with (
        stats.stage("answer"),
        status("answering; for a new shape the programs are compiled first", quiet=options.quiet),
    ):
        result = model.generate(
            **inputs, **arguments, return_dict_in_generate=True, streamer=stats if options.stats else None
        )
    if jax.process_index() != 0:
        return  # all processes compute the same answer, and the first one prints it
    tell_model(options)
    figures = stats.figures(tokens=int(result.lengths.sum()), audio_seconds=question.audio_seconds)
    for row, length in enumerate(result.lengths):
        ids = result.sequences[row, width : width + length]
        text = processor.decode(ids, skip_special_tokens=True)
        if options.json:
            answer = {
                "text": text,
                "ids": ids.tolist(),
                "finish_reason": result.finish_reasons[row],
                "tokens": int(length),
                "mean_log_prob": float(np.mean(result.log_probs[row, :length])),
                "prompt_tokens": width,
                **({"truncated_clips": question.truncated} if question.truncated else {}),
                **({"stats": figures} if options.stats else {}),
            }
            write(json.dumps(answer) + "\n")
        else:
            write(text + "\n")
        if not options.quiet and not text.strip():
            note(text, reason="eos")
    if options.stats and not options.json:
        say(in_words(figures))


def _prompt(options: argparse.Namespace) -> str:
    """The prompt, from standard input for -."""
    if options.prompt != "-":
        return options.prompt or ""
    data = sys.stdin.buffer.read()
    try:
        prompt = data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    if not prompt and (options.raw or not options.audio):
        raise ValueError("there is no prompt on standard input: write one into the pipe")
    return prompt


def _inputs(
    prompt: str, clips: list[np.ndarray], *, options: argparse.Namespace, processor: Qwen2AudioProcessor
) -> ProcessorOutput:
    if options.raw:
        token = processor.audio_token
        if clips and token not in prompt:
            raise ValueError(
                f"the prompt has no {token}, so {len(clips)} clip{'s' * (len(clips) > 1)} would not be heard: with "
                f"--raw write <|audio_bos|>{token}<|audio_eos|> into it for each clip"
            )
        return processor(text=prompt, audio=clips or None)
    content = [{"type": "audio", "audio": clip} for clip in clips]
    content += [{"type": "text", "text": prompt}] if prompt else []
    messages = [{"role": "user", "content": content}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, allow_special=options.allow_special
    )
