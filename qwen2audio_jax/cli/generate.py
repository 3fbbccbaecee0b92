"""`qwen2audio generate`: one prompt, one answer."""

import argparse
import json
import sys
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio.load import LoadedClip
from qwen2audio_jax.cli.from_options import clip_source, join, load_model, prepare
from qwen2audio_jax.cli.options import clip_options
from qwen2audio_jax.cli.output import say, write, write_answer
from qwen2audio_jax.cli.profile import check_profile_folder, profiled
from qwen2audio_jax.processing.output import ProcessorOutput
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor


def generate(options: argparse.Namespace) -> int:
    """Answer the prompt in the options, and return the exit code.

    Raises:
        ValueError: an input or option cannot be used.
    """
    if options.each:
        from qwen2audio_jax.cli.each import run_each  # one prompt alone needs no engine

        return run_each(options)
    prompt = _prompt(options)
    check_profile_folder(options.profile)
    processor, arguments = prepare(options)
    clips = [_clip(path, options=options, processor=processor) for path in options.audio]
    for path, clip in zip(options.audio, clips, strict=True):
        if clip.missing is not None:
            say(f"{path} is heard in part: {clip.missing}")
    inputs = _inputs(prompt, [clip.samples for clip in clips], options=options, processor=processor)
    join(options)
    model = load_model(options)
    truncated = [number for number, clip in enumerate(clips) if clip.missing is not None]
    with profiled(options.profile):
        _answer(inputs, arguments, model=model, processor=processor, options=options, truncated=truncated)
    return 0


def _answer(
    inputs: ProcessorOutput,
    arguments: dict[str, Any],
    *,
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    options: argparse.Namespace,
    truncated: list[int],
) -> None:
    alone = jax.process_count() == 1
    if alone and not options.json and arguments["num_return_sequences"] == 1:
        write_answer(model.stream(**inputs, **arguments), written=[])
        return
    width = inputs.input_ids.shape[1]
    result = model.generate(**inputs, **arguments, return_dict_in_generate=True)
    if jax.process_index() != 0:
        return  # all processes compute the same answer, and the first one prints it
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
                **({"truncated_clips": truncated} if truncated else {}),
            }
            text = json.dumps(answer)
        write(text + "\n")


def _prompt(options: argparse.Namespace) -> str:
    if options.audio.count("-") + (options.prompt == "-") > 1:
        raise ValueError("standard input can be read once: give - for the prompt or for one --audio, files else")
    prompt = options.prompt or ""
    if prompt == "-":
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    if options.raw and options.system is not None:
        raise ValueError("--system is for the chat template, which --raw leaves out: give one of them")
    if not prompt and (options.raw or not options.audio):
        raise ValueError("there is no prompt" + ("" if options.raw else ": give a text, --audio FILE, or both"))
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


def _clip(path: str, *, options: argparse.Namespace, processor: Qwen2AudioProcessor) -> LoadedClip:
    source = clip_source(path, stdin=options.prompt != "-")
    try:
        return processor.feature_extractor.load_clip(source, **clip_options(options))
    finally:
        if not isinstance(source, str) and source is not sys.stdin.buffer:
            source.close()
