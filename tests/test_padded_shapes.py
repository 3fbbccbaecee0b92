"""The listed shapes waste little, and the programs of a second process come from the disk."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen2audio_jax import Qwen2AudioConfig, make_mesh
from qwen2audio_jax.generation.padded_shapes import (
    CAPACITIES,
    FRAMES,
    ROWS,
    TOKENS,
    padded_frames,
    padded_row_count,
    padded_tokens,
)
from qwen2audio_jax.model.lengths import token_count

CONFIG = Qwen2AudioConfig.from_name("qwen2-audio-7b")
RNG = np.random.default_rng(0)
UTTERANCES = RNG.uniform(1, 20, 2000)


@pytest.mark.parametrize("seconds", [UTTERANCES, np.full(200, 10.0), np.full(200, 30.0)], ids=["1 to 20 s", "10", "30"])
def test_one_prompt_with_a_clip_computes_little_that_it_does_not_need(seconds):
    frames = np.ceil(100 * seconds).astype(int)
    text = RNG.integers(5, 301, len(frames))
    tokens = token_count(frames) + text
    computed_frames = np.array([padded_frames(int(count), config=CONFIG.audio_config) for count in frames])
    computed_tokens = np.array([padded_tokens(int(count), config=CONFIG) for count in tokens])
    for computed, needed in ((computed_frames, frames), (computed_tokens, tokens)):
        assert (computed >= needed).all()
        assert computed.sum() / needed.sum() <= 1.12
        assert (computed / needed).max() <= 1.35
    assert (computed_frames % 2 == 0).all()
    assert (computed_frames >= np.minimum(frames + 2, 3000)).all()


def test_the_lists_are_bounded():
    for sizes in (FRAMES, TOKENS, CAPACITIES, ROWS):
        assert list(sizes) == sorted(set(sizes))
        assert len(sizes) < 50


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1), ("bfloat16", 2), ("float16", 2)])
def test_one_row_is_one_row_in_float32_alone(dtype, least):
    one, eight = make_mesh(data=1, model=1, devices=jax.devices()[:1]), make_mesh(data=8, model=1)
    assert padded_row_count(1, mesh=one, dtype=dtype) == least
    assert padded_row_count(1, mesh=eight, dtype=dtype) == 8
    assert [padded_row_count(rows, mesh=one, dtype=dtype) for rows in (3, 9, 129)] == [3, 10, 160]


@pytest.mark.parametrize("switch", ["", "off", "elsewhere"])
def test_compiled_programs_are_kept(tmp_path, switch):
    code = """
import jax
from qwen2audio_jax.checkpoint.compilation_cache import use_compilation_cache
use_compilation_cache()
jax.jit(lambda x: x + 1)(1.0)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"QWEN2AUDIO_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment["QWEN2AUDIO_COMPILATION_CACHE"] = str(tmp_path / switch) if switch == "elsewhere" else switch
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    kept = {folder.name for folder in tmp_path.iterdir() if any(folder.glob("*-cache"))}
    assert kept == {"": {"compiled"}, "off": set(), "elsewhere": {"elsewhere"}}[switch]
