"""`qwen2audio train`: a training run from a configuration file."""

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext

from qwen2audio_jax.cli.output import say


def run(options: argparse.Namespace) -> None:
    """Train, or continue a run, as the configuration says.

    Raises:
        ValueError: the configuration, the data or what the output folder holds cannot be used.
    """
    overrides = parse_overrides(options.set)
    if options.output is not None:
        if "output" in overrides:
            raise ValueError("the output folder is given twice, by --output and by --set output; leave out one")
        # As TOML writes a text: a folder may be named like a number.
        overrides["output"] = json.dumps(options.output, ensure_ascii=False)
    # Imported in these two steps: what is wrong with a configuration is said at once.
    from qwen2audio_jax.train.extra import require_extras
    from qwen2audio_jax.train.settings import read_settings

    settings = read_settings(options.config, overrides=overrides)
    require_extras()
    from qwen2audio_jax.train.loop import train
    from qwen2audio_jax.train.progress import training_progress

    with nullcontext() if options.quiet else training_progress(settings.steps) as progress:
        state = train(settings, progress=progress)
    if options.quiet:
        return
    if int(state.step) < settings.steps:
        say(f"stopped after step {int(state.step)} of {settings.steps}; the same command goes on from there")
    else:
        say(f"trained; the model is in {settings.output}/model")


def parse_overrides(items: Sequence[str]) -> dict[str, str]:
    """What --set says, by the setting's dotted name; the values are read where the settings are.

    Raises:
        ValueError: an item has no form NAME=VALUE, or a name comes twice.
    """
    overrides: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"--set {item!r} is no NAME=VALUE; write it as in --set data.rows=16")
        if name in overrides:
            raise ValueError(f"--set {name} is given twice, {overrides[name]!r} and {value!r}; leave out one")
        overrides[name] = value.strip()
    return overrides
