"""`qwen2audio doctor`: diagnosis of the machine, or of a checkpoint."""

import argparse
import json
from dataclasses import asdict

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio.load import load_audio
from qwen2audio_jax.cli.from_options import join
from qwen2audio_jax.cli.machine import look
from qwen2audio_jax.cli.machine_checks import CHECKS
from qwen2audio_jax.cli.output import one_line, say, write
from qwen2audio_jax.cli.status import status
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.default_options import default_generation
from qwen2audio_jax.parallel.roll_call import PeersMissing
from qwen2audio_jax.processing.end_of_turn import missing_stop
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_checkpoint

PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
PUBLISHED = "Glass is breaking."
"""The answer in the base model's documentation for its clip of breaking glass (glass-breaking-151256.mp3)."""


def examine(options: argparse.Namespace) -> int:
    """Print a line for each check, and its problems; returns 1 if there are any.

    Raises:
        ValueError: there is no checkpoint, or an option is for one and none is named.
    """
    if options.smoke:
        return _smoke(options)
    if options.model is not None:
        return _examine_checkpoint(options)
    if options.glass_clip is not None or options.revision is not None:
        raise ValueError("--glass-clip and --revision are for a checkpoint: name it with --model")
    return _examine_machine(options)


def _examine_machine(options: argparse.Namespace) -> int:
    missing = None
    try:
        join(options)
    except PeersMissing as error:
        missing = one_line(error)
    machine = look(peers_missing=missing)
    checked = [check(machine) for check in CHECKS]
    wrong = any(one.problems for one in checked)
    if options.json:
        write(json.dumps({"ok": not wrong, **asdict(machine), "checks": [asdict(one) for one in checked]}) + "\n")
        return int(wrong)
    for one in checked:
        _show(f"{one.name}: {one.found}", one.problems)
    return int(wrong)


def _smoke(options: argparse.Namespace) -> int:
    from qwen2audio_jax.cli.smoke import smoke

    if options.model is not None:
        raise ValueError("--smoke runs the embedded model: leave out --model")
    with status("computing each stage, and the same on the CPU", quiet=options.quiet):
        device, stages = smoke()
    wrong = any(stage.problems for stage in stages)
    if options.json:
        write(json.dumps({"ok": not wrong, "device": device, "stages": [asdict(stage) for stage in stages]}) + "\n")
        return int(wrong)
    write(f"        on {device}: difference from the CPU, what rounding may make of it, time\n")
    for stage in stages:
        figures = f"{stage.error:8.1e} of {stage.bar:.0e} {stage.milliseconds:10.3f} ms"
        _show(f"{stage.name:10} {stage.dtype:9} {stage.attention:7} {figures}", stage.problems)
    return int(wrong)


def _show(line: str, problems: list[str]) -> None:
    write(f"{'PROBLEM' if problems else 'ok     '} {line}\n")
    for problem in problems:
        write(f"        {problem}\n")


def _examine_checkpoint(options: argparse.Namespace) -> int:
    from qwen2audio_jax.checkpoint.check import Finding, check
    from qwen2audio_jax.checkpoint.progress import progress_bar

    clip = None if options.glass_clip is None else load_audio(options.glass_clip)
    path = resolve_checkpoint(options.model, revision=options.revision, cache_dir=options.cache_dir)
    with progress_bar("reading", quiet=options.quiet) as progress:
        findings = check(path, on_progress=progress)
    try:
        processor = Qwen2AudioProcessor.from_pretrained(path)
        findings.append(Finding("tokenizer, chat template and preprocessor: they load", []))
    except ValueError as error:
        findings.append(Finding("tokenizer, chat template and preprocessor", [" ".join(str(error).split())]))
    warnings: list[str] = []
    try:
        stops = default_generation(path, config=Qwen2AudioConfig.from_pretrained(path)).eos_token_id
        # No fault of a file, and yet a surprise.
        warnings += filter(None, [missing_stop(path, stops=stops)])
    except ValueError as error:
        findings.append(Finding("generation settings", [one_line(error)]))
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
    wrong = any(finding.problems for finding in findings)
    if options.json:
        checks = [asdict(finding) for finding in findings]
        write(json.dumps({"ok": not wrong, "checks": checks, "warnings": warnings}) + "\n")
        return int(wrong)
    for finding in findings:
        _show(finding.checked, finding.problems)
    for warning in warnings:
        write(f"warning {warning}\n")
    return int(wrong)
