"""Logits that are not numbers end a generation with an error that names the dtype and what to load instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from prompts import random_inputs

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.decoding import _fault
from qwen2audio_jax.model.qwen2_audio import init_params


class Words:
    """As much of a tokenizer as streaming needs."""

    def decode(self, ids, *, skip_special_tokens=False):
        return " ".join(map(str, np.atleast_1d(ids)))


def model_with(factor):
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    params = jax.jit(lambda: init_params(config, seed=0))()
    spoiled = jax.tree_util.tree_map_with_path(
        lambda path, value: value * factor if "norm" in jax.tree_util.keystr(path[-2:]) else value, params
    )
    return Qwen2AudioForConditionalGeneration(config, spoiled)


@pytest.fixture(scope="module")
def spoiled():
    return model_with(jnp.nan)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 1},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "seed": 1, "top_k": 0, "min_p": 0.3},
        {"no_repeat_ngram_size": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"logits_processor": lambda ids, scores: jnp.nan_to_num(scores)},
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_generation_ends_with_an_error(options, spoiled):
    with pytest.raises(ValueError, match=r"logits are not numbers \(computed in float32; token 1 of row 0\)"):
        spoiled.generate(**random_inputs("gqa"), max_new_tokens=3, **options)


def test_a_session_and_a_stream_too(spoiled):
    one = {name: value[:1] for name, value in random_inputs("gqa").items() if name in ("input_ids", "attention_mask")}
    one["input_ids"] = np.full((1, 4), 5)
    one["attention_mask"] = np.ones((1, 4), int)
    with pytest.raises(ValueError, match="get the checkpoint anew"):
        spoiled.session().generate(**one, max_new_tokens=3)
    with pytest.raises(ValueError, match="get the checkpoint anew"):
        next(spoiled.stream(**one, max_new_tokens=3, tokenizer=Words()))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float16", ["65504", "dtype='bfloat16' or 'float32'", "--dtype bfloat16"]),
        ("bfloat16", ["dtype='float32'", "--dtype float32", "anew"]),
        ("float32", ["anew", "adapters"]),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_the_message(dtype, words, value):
    error = _fault(np.asarray([-1.0, value, 0.0], np.float32), step=7, dtype=dtype)
    assert f"computed in {dtype}; token 7 of row 1" in str(error)
    for word in words:
        assert word in str(error)
    assert _fault(np.asarray([-1.0, -300.0, 0.0], np.float32), step=1, dtype=dtype) is None


def test_sound_logits_go_on():
    out = model_with(1.0).generate(**random_inputs("gqa"), max_new_tokens=3, return_dict_in_generate=True)
    assert np.isfinite(out.log_probs).all()
