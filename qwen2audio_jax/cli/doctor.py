"""`qwen2audio doctor`: whether a checkpoint is what it should be, and hears what the documentation says."""

import argparse

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio.load import load_audio
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_checkpoint

PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
PUBLISHED = "Glass is breaking."
"""What the base model's documentation says of its clip of breaking glass (glass-breaking-151256.mp3)."""


def examine(options: argparse.Namespace) -> int:
    """Print a line for each check, and its problems; 1 if there is one.

    Raises:
        ValueError: there is no checkpoint.
    """
    from qwen2audio_jax.convert.check import Finding, check
    from qwen2audio_jax.convert.progress import progress_bar

    clip = None if options.glass_clip is None else load_audio(options.glass_clip)
    path = resolve_checkpoint(options.model, revision=options.revision, cache_dir=options.cache_dir)
    with progress_bar("reading", quiet=options.quiet) as progress:
        findings = check(path, on_progress=progress)
    try:
        processor = Qwen2AudioProcessor.from_pretrained(path)
        findings.append(Finding("tokenizer, chat template and preprocessor: they load", []))
    except ValueError as error:
        findings.append(Finding("tokenizer, chat template and preprocessor", [" ".join(str(error).split())]))
    broken = any(finding.problems for finding in findings)
    if clip is not None and broken:
        say("the clip is not tried: mend the rest first")
    elif clip is not None:
        model = Qwen2AudioForConditionalGeneration.from_pretrained(path)
        inputs = processor(text=PROMPT, audio=clip)
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs.input_ids.shape[1] :]
        answer = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        problem = [] if answer == PUBLISHED else [f"it says {answer!r}; the published base model: {PUBLISHED!r}"]
        findings.append(Finding("clip of breaking glass", problem))
    for finding in findings:
        write(f"{'PROBLEM' if finding.problems else 'ok     '} {finding.checked}\n")
        for problem in finding.problems:
            write(f"        {problem}\n")
    return 1 if any(finding.problems for finding in findings) else 0
