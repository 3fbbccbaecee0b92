"""Eight fake devices, a compilation cache and the tiny reference models that the tests share."""

import os

# Before jax is imported: the device count is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny_processor import write_processor_files

import qwen2audio_jax

ROOT = Path(__file__).resolve().parent.parent
# In a checkout that is not installed, convert/ and configs/ stand beside the package: see pyproject.toml, package-dir.
if not any(Path(place, "convert").is_dir() for place in qwen2audio_jax.__path__):
    qwen2audio_jax.__path__.append(str(ROOT))

jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@cache
def build_reference(name: str):
    """The transformers model of a tiny configuration: float32, evaluation mode, seeded weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2AudioConfig.from_dict(copy.deepcopy(tiny.CONFIGS[name]))
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # The reference initialises with so small a spread that every next token is the same: a larger one gives
        # logits, attention and norms that differ from place to place, so that a wrong weight shows.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        model.get_input_embeddings().weight.mul_(2.0)
        model.model.audio_tower.embed_positions.weight.copy_(
            torch.randn_like(model.model.audio_tower.embed_positions.weight) * 0.3
        )
        if tiny.CONFIGS[name]["text_config"].get("tie_word_embeddings"):
            # This release of the reference reads the flag and never ties: equal values are the same model.
            model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model.float().eval()


@pytest.fixture(scope="session")
def reference():
    """`reference(name)`: the transformers model of `tiny.CONFIGS[name]`; skips where transformers is missing."""
    return build_reference


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    """`hf_checkpoint(name)`: a directory that transformers saved, with processor and generation files beside it."""

    @cache
    def build(name: str) -> Path:
        model = build_reference(name)
        folder = tmp_path_factory.mktemp(f"hf_{name}")
        model.save_pretrained(folder)
        audio = tiny.CONFIGS[name]["audio_config"]
        write_processor_files(folder, num_mel_bins=audio["num_mel_bins"], max_frames=2 * audio["max_source_positions"])
        settings = {
            "do_sample": False,
            "max_new_tokens": 16,
            "pad_token_id": tiny.END_OF_TEXT,
            "eos_token_id": [tiny.IM_END, tiny.END_OF_TEXT],
        }
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder

    return build


@pytest.fixture(scope="session")
def load(hf_checkpoint, tmp_path_factory):
    """`load(name, mesh=None)`: our model of the same weights, by way of the converter."""
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration

    places = tmp_path_factory.mktemp("converted")

    @cache
    def build(name: str, mesh=None):
        return Qwen2AudioForConditionalGeneration.from_pretrained(hf_checkpoint(name), mesh=mesh, cache_dir=places)

    return build


def relative_error(actual, expected) -> float:
    """max |a - b| / max |b|, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
