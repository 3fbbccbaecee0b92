"""`qwen2audio train`: a training run from a configuration file."""

import argparse
import json
from contextlib import nullcontext

from qwen2audio_jax.cli.output import say, write


def run(options: argparse.Namespace) -> None:
    """Train, or resume a run, from a configuration.

    Raises:
        ValueError: the configuration, the data or the contents of the output folder cannot be used.
    """
    from qwen2audio_jax.train.settings_file import parse_overrides, read_settings

    if options.convert_records is not None:
        _convert(options)
        return
    if options.config is None:
        raise ValueError(
            "name a training configuration, a TOML file, as in qwen2audio train lora.toml; docs/fine-tuning.md shows "
            "one"
        )
    overrides = parse_overrides(options.set)
    if options.output is not None:
        if "output" in overrides:
            raise ValueError("the output folder is given twice, by --output and by --set output; leave out one")
        # As a TOML string: a folder may be named like a number.
        overrides["output"] = json.dumps(options.output, ensure_ascii=False)
    # Imported in two steps, so that errors in a configuration are reported at once.
    from qwen2audio_jax.train.extra import require_extras

    settings = read_settings(options.config, overrides=overrides)
    require_extras()
    from qwen2audio_jax.cli.from_options import join

    join(options)
    from qwen2audio_jax.train.loop import train
    from qwen2audio_jax.train.progress import training_progress

    with nullcontext() if options.quiet else training_progress(settings.steps) as progress:
        state = train(settings, progress=progress)
    if options.json:
        done = int(state.step) >= settings.steps
        stands = {"state": "finished" if done else "stopped", "step": int(state.step), "steps": settings.steps}
        write(json.dumps({**stands, "output": settings.output}) + "\n")
    if options.quiet:
        return
    if int(state.step) < settings.steps:
        say(f"stopped after step {int(state.step)} of {settings.steps}; the same command goes on from there")
    else:
        say(f"trained; the model is in {settings.output}/model")


def _convert(options: argparse.Namespace) -> None:
    from qwen2audio_jax.train.convert_records import convert_records

    if options.config is not None:
        raise ValueError("--convert-records trains nothing: leave out the configuration")
    source, destination = options.convert_records
    count = convert_records(source, destination)
    if options.json:
        write(json.dumps({"records": count, "output": destination}) + "\n")
    elif not options.quiet:
        say(f"{destination}: {count} records")
