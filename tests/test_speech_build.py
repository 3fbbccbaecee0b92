"""Build of the embedded model from scratch, at a hundredth of a percent of its size."""

import json

import pytest

from qwen2audio_jax.speech import build as build_module
from qwen2audio_jax.speech import espeak
from qwen2audio_jax.speech.build import build

SMALL = {"steps": "2", "data.rows": "1", "data.frames": "[1100]", "data.max_tokens": "384", "data.max_clips": "2"}


@pytest.fixture
def few_examples(monkeypatch):
    try:
        espeak.version()
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(build_module, "TRAIN_EXAMPLES", 24)
    monkeypatch.setattr(build_module, "TEST_EXAMPLES", 4)


@pytest.mark.slow(seconds=45)
def test_data_two_runs_scores_and_card(few_examples, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    said = []
    folder = build(tmp_path / "speech", overrides=SMALL, say=said.append)
    assert len(said) == 7
    assert folder == tmp_path / "speech" / "run" / "model"
    card = (folder / "README.md").read_text()
    assert "espeak-ng" in card
    assert "voices never trained on" in card
    record = json.loads((folder / "training.json").read_text())
    assert set(record["scores"]) >= {"the same in bfloat16", "voices never trained on"}
    # What is there stays: the second call asks the questions again and nothing else.
    weights = (folder / "model.safetensors").stat()
    said.clear()
    assert build(tmp_path / "speech", overrides=SMALL, say=said.append) == folder
    assert len(said) == 1
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
