"""The listed shapes waste little, and the programs of a second process come from the disk."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from processes import ROOT

from qwen2audio_jax import Qwen2AudioConfig, make_mesh
from qwen2audio_jax.generation.padded_shapes import (
    CAPACITIES,
    FRAMES,
    GROUPS,
    ROWS,
    TOKENS,
    clip_groups,
    padded_row_count,
    prompt_groups,
)
from qwen2audio_jax.model.cache_pieces import PIECE
from qwen2audio_jax.model.lengths import token_count

CONFIG = Qwen2AudioConfig.from_name("qwen2-audio-7b")
DISTRIBUTIONS = {
    "utterances": lambda rng, count: rng.uniform(1, 20, count),
    "10 s": lambda rng, count: np.full(count, 10.0),
    "30 s": lambda rng, count: np.full(count, 30.0),
}


class Chip(types.SimpleNamespace):
    """A mesh of one device of a platform that is not here."""

    shape = types.MappingProxyType({"data": 1, "model": 1})
    size = 1
    __hash__ = object.__hash__

    def __init__(self, platform):
        super().__init__(devices=np.array([[types.SimpleNamespace(platform=platform)]]))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_little_is_computed_that_is_not_needed(name, batch, platform):
    """Of requests with a clip and 5 to 300 text tokens a row: frames encoded, and positions prefilled."""
    rng, mesh = np.random.default_rng(0), Chip(platform)
    sums = np.zeros((2, 2))
    for _ in range(2000 // batch // batch):
        frames = np.ceil(100 * DISTRIBUTIONS[name](rng, batch)).astype(int)
        tokens = token_count(frames) + rng.integers(5, 301, batch)
        clips = clip_groups(frames.tolist(), config=CONFIG.audio_config, mesh=mesh)
        rows = prompt_groups(tokens.tolist(), config=CONFIG, mesh=mesh)
        computed = np.array([sum(group.count * group.width for group in groups) for groups in (clips, rows)])
        needed = np.array([frames.sum(), tokens.sum()])
        assert (computed >= needed).all()
        assert (computed / needed).max() <= 1.35
        sums += computed, needed
        for group in clips:
            assert group.width % 2 == 0
            assert group.width >= min(max(frames[list(group.members)]) + 2, 3000)
    assert (sums[0] / sums[1]).max() <= 1.12


def test_the_lists_are_bounded():
    for sizes in (FRAMES, TOKENS, CAPACITIES, ROWS, GROUPS):
        assert list(sizes) == sorted(set(sizes))
        assert len(sizes) < 50
    assert not any(size % PIECE for size in CAPACITIES)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1), ("bfloat16", 2), ("float16", 2)])
def test_one_row_is_one_row_in_float32_alone(dtype, least):
    one, eight = make_mesh(data=1, model=1, devices=jax.devices()[:1]), make_mesh(data=8, model=1)
    assert padded_row_count(1, mesh=one, dtype=dtype) == least
    assert padded_row_count(1, mesh=eight, dtype=dtype) == 8
    assert [padded_row_count(rows, mesh=one, dtype=dtype) for rows in (3, 9, 129)] == [3, 10, 160]


@pytest.mark.parametrize("switch", ["", "off", "False", "0", "elsewhere"])
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
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=120)
    kept = {folder.name for folder in tmp_path.iterdir() if any(folder.glob("*-cache"))}
    assert kept == {"": {"compiled"}, "elsewhere": {"elsewhere"}}.get(switch, set())
