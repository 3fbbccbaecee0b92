"""Build of the embedded model from scratch: its files, its data, two training runs, its scores.

Finished parts are kept, and an interrupted training run is resumed: the same call completes an earlier one.
"""

import json
from collections.abc import Callable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.speech import dataset
from qwen2audio_jax.speech.evaluate import evaluate
from qwen2audio_jax.speech.model_files import write_model_files
from qwen2audio_jax.speech.scoring import score
from qwen2audio_jax.train.export import exported_folder
from qwen2audio_jax.train.loop import train
from qwen2audio_jax.train.model_card import describe_result
from qwen2audio_jax.train.progress import training_progress
from qwen2audio_jax.train.settings import TrainSettings
from qwen2audio_jax.train.settings_file import read_settings

TRAIN_EXAMPLES = 80_000
TEST_EXAMPLES = 1_500
SEEDS = {"train": 1, "test": 2, "unseen": 2}
"""Seed of each split's examples; splits have separate random streams, so equal seeds draw different examples."""

SHOWN = ("digit_error_rate", "strings_right", "sums", "analysis", "pairs")
"""The scores on the model card."""

TITLE = "Spoken digits: the model that comes with qwen2audio-jax"
DESCRIPTION = """\
A small model of Qwen2-Audio's architecture, trained from freshly drawn weights on speech synthesised with espeak-ng. It
transcribes strings of one to eight English digits, adds two spoken ones, and answers a few questions about one clip or
two: how many digits, a high voice or a low one, speech, a tone or noise. It is for trying the software out and for
testing it; it understands nothing else, and no recording of a human voice was among what it learned from."""


def build(out: str | PathLike[str], *, overrides: Mapping[str, str], say: Callable[[str], None]) -> Path:
    """Make the embedded model in the folder `out`, and return the model's own folder in it.

    Args:
        out: gets `model` (all files but weights), a folder for each split of the data, and the two runs.
        overrides: settings of both training runs that replace those of `configs/speech*.toml`.
        say: called with progress messages.

    Raises:
        ValueError: espeak-ng or the extra `train` is missing, a clip is in both training and test data, or the folder
            holds something else.
    """
    out = Path(out).absolute()
    if not (out / "model" / "config.json").exists():
        say("writing tokenizer and configuration")
        write_model_files(out / "model")
    for split, seed in SEEDS.items():
        if not (out / split / "records.jsonl").exists():
            say(f"synthesising {split} examples")
            clips = TRAIN_EXAMPLES if split == "train" else TEST_EXAMPLES
            dataset.write_dataset(out / split, clips=clips, seed=seed, split=split)
    for split in ("test", "unseen"):
        if shared := dataset.clips_in_both(out / "train", out / split):
            raise ValueError(
                f"{len(shared)} clips are in both {out / 'train'} and {out / split}: {', '.join(shared[:3])}"
            )
    for name, start, result in (("speech-short", out / "model", "short"), ("speech", out / "short" / "model", "run")):
        settings = _settings(name, start, out, result, overrides)
        if not (exported_folder(settings) / "config.json").exists():
            say(f"training by configs/{name}.toml")
            with training_progress(settings.steps) as progress:
                train(settings, progress=progress)
    folder = out / "run" / "model"
    say("asking the questions of the test data")
    describe_result(folder, scores=scores(folder, out), title=TITLE, description=DESCRIPTION)
    return folder


def scores(folder: str | PathLike[str], data: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """A model's scores for its card: on the test data in both dtypes, and on voices unseen in training.

    Args:
        folder: the model.
        data: the output folder of `build`: its folders `test` and `unseen` are read.
    """
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    result = {}
    for title, split, dtype in (
        ("held-out clips, voices as in training", "test", "float32"),
        ("the same in bfloat16", "test", "bfloat16"),
        ("voices never trained on", "unseen", "float32"),
    ):
        model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        figures = score(evaluate(model, processor, data=Path(data) / split)).to_dict()
        result[title] = {name: round(figures[name], 4) for name in SHOWN if figures[name] is not None}
    return result


def _settings(name: str, start: Path, out: Path, result: str, overrides: Mapping[str, str]) -> TrainSettings:
    places = {
        "model": json.dumps(str(start)),
        "output": json.dumps(str(out / result)),
        "data.train": json.dumps([str(out / "train" / "records.jsonl")]),
    }
    if name == "speech":
        places["data.evaluate"] = json.dumps([str(out / "test" / "records.jsonl")])
    path = resources.files("qwen2audio_jax.configs") / f"{name}.toml"
    return read_settings(str(path), overrides={**overrides, **places})
