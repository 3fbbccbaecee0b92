"""Training configurations: what is read, and what is refused."""

import numpy as np
import pytest

from qwen2audio_jax.train.optimizer import learning_rate
from qwen2audio_jax.train.settings import OptimizerSettings, TrainSettings
from qwen2audio_jax.train.settings_file import read_settings

SMALLEST = """
model = "model"
output = "run"
steps = 10
[data]
train = ["a.jsonl"]
"""


@pytest.fixture
def write(tmp_path):
    def build(text: str):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return build


def test_defaults_and_paths_beside_the_file(write, tmp_path):
    (tmp_path / "model").mkdir()
    settings = read_settings(write(SMALLEST))
    assert settings.model == str(tmp_path / "model")
    assert settings.output == str(tmp_path / "run")
    assert settings.data.train == (str(tmp_path / "a.jsonl"),)
    assert settings.lora is None
    assert settings.machine.dtype == "bfloat16"


def test_a_model_that_is_no_folder_is_a_hub_id(write):
    assert read_settings(write(SMALLEST)).model == "model"


def test_every_table_is_read(write):
    text = (
        SMALLEST + "rows = 16\n[lora]\nrank = 4\ntargets = ['q_proj']\n[optimizer]\nname = 'lion'\nlearning_rate = 1\n"
    )
    text += "betas = [0.8, 0.9]\n[augment]\ngain_db = [-3, 3]\n[machine]\nmodel = 2\n[objective]\nkind = 'dpo'\n"
    settings = read_settings(write(text))
    assert (settings.data.rows, settings.lora.rank, settings.lora.targets) == (16, 4, ("q_proj",))
    assert isinstance(settings.optimizer.learning_rate, float)
    assert settings.augment.gain_db == (-3.0, 3.0)
    assert (settings.machine.model, settings.objective.kind) == (2, "dpo")


def test_overrides(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = {"steps": "5", "data.rows": "4", "output": "elsewhere", "optimizer.name": "sgd", "lora.rank": "2"}
    settings = read_settings(write(SMALLEST), overrides=overrides)
    assert (settings.steps, settings.data.rows, settings.optimizer.name, settings.lora.rank) == (5, 4, "sgd", 2)
    assert settings.output == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = [", "is no TOML"),
        ("steps = 1", r"the table \[data\] is missing"),
        (SMALLEST.replace("steps = 10\n", ""), "steps is missing"),
        (SMALLEST.replace("steps = 10", "steps = 0"), "steps = 0, but it must be above 0"),
        (SMALLEST.replace("steps = 10", "steps = 'ten'"), "steps = 'ten', but a whole number is needed"),
        (SMALLEST.replace("steps = 10", "steps = true"), "a whole number is needed"),
        (SMALLEST + "row = 3", r"\[data\]: no setting 'row'; there are train, evaluate"),
        (SMALLEST + "rows = 6\n[machine]\naccumulation = 4", "rows = 6 does not divide"),
        (SMALLEST + "frames = [100, 201]", "they must be even"),
        (
            SMALLEST + "[optimizer]\nname = 'adamax'",
            "one of 'adamw', 'adam', 'lion', 'muon', 'adafactor', 'sgd' is needed",
        ),
        (SMALLEST + "[optimizer]\nlearning_rate = nan", "a finite number is needed"),
        (SMALLEST + "[optimizer]\nbetas = [0.9]", "a list of 2 is needed"),
        (SMALLEST + "[optimizer]\nbetas = [0.9, 1.0]", "below 1"),
        (SMALLEST + "[objective]\nlabel_smoothing = 0.5", "below 0.5"),
        (SMALLEST + "[augment]\ngain_db = [3, -3]", "the least comes first"),
        (SMALLEST + "[augment]\nnoise_probability = 2", "from 0 to 1"),
        (SMALLEST + "[lora]\nrank = 0", "lora.rank = 0"),
        (SMALLEST.replace('["a.jsonl"]', "[]"), "data.train names no file"),
        ("lora = 3\n" + SMALLEST, r"\[lora\]: a table of settings is needed"),
        ("optimiser = {}\n" + SMALLEST, "no setting 'optimiser'"),
        ("steps = " + "[" * 100_000, "is no TOML"),
        ("steps = " + "9" * 5000, "is no TOML"),
        (SMALLEST.replace('"model"', f'"{"a" * 300}"'), "is no path"),
        (SMALLEST.replace('"run"', r'"\u0000"'), "is no path"),
        (SMALLEST + f"[optimizer]\nlearning_rate = {10**400}", "a finite number is needed"),
    ],
)
def test_refused_by_name(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_settings(write(text))


def test_an_override_in_what_is_no_table(write):
    with pytest.raises(ValueError, match="model is 'model', which has no setting 'x'"):
        read_settings(write(SMALLEST), overrides={"model.x": "3"})


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="no training configuration at"):
        read_settings(tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", ["speech-short", "speech", "train-lora"])
def test_the_packages_configurations_are_readable(name):
    from qwen2audio_jax import configs

    settings = read_settings(f"{next(iter(configs.__path__))}/{name}.toml")
    assert isinstance(settings, TrainSettings)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=2, final_share=0.1, decay_share=0.4)
    rate = learning_rate(settings, steps=10)
    np.testing.assert_allclose([rate(step) / 2.0 for step in range(10)], expected, atol=1e-6)
