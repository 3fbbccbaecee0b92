"""After a warm-up no request within its bounds compiles or traces anything, whatever its lengths, rows and options."""

import copy
import itertools

import jax
import numpy as np
import pytest
import tiny
from prompts import random_inputs

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.generation import call, warmup
from qwen2audio_jax.model.qwen2_audio import init_params, sharded_specs

STOPS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": [tiny.IM_END, tiny.END_OF_TEXT]}


THETAS = itertools.count(20_000)


def make_model(mesh=None):
    """A model of a configuration of its own, so that none of its programs has been compiled."""
    settings = copy.deepcopy(tiny.CONFIGS["tied"])
    settings["text_config"]["rope_theta"] = float(next(THETAS))
    config = Qwen2AudioConfig.from_dict(settings)
    params = jax.jit(lambda: init_params(config, seed=3))()
    if mesh is not None:
        specs = sharded_specs(config, mesh=mesh)
        params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, spec.sharding), params, specs)
    return Qwen2AudioForConditionalGeneration(config, params, mesh=mesh)


def request(rng, *, rows, tokens, frames, new_tokens):
    """A random call within bounds: its inputs and options."""
    prompts, sampled = int(rng.integers(1, rows + 1)), bool(rng.random() < 0.5)
    lines = []
    for _ in range(prompts):
        line = [int(rng.integers(1, tokens - frames // 4 - 4))]
        if rng.random() < 0.6:
            line += [str(rng.integers(3, frames + 1)), int(rng.integers(1, 4))]
        lines.append(line)
    options = {
        "max_new_tokens": int(rng.integers(1, new_tokens + 1)),
        "do_sample": sampled,
        "temperature": float(rng.uniform(0.5, 2.0)),
        "top_k": int(rng.integers(1, 65)),
        "top_p": float(rng.uniform(0.5, 1.0)),
        "repetition_penalty": float(rng.uniform(1.0, 1.5)),
        "eos_token_id": rng.integers(0, 336, rng.integers(1, 9)).tolist(),
        "pad_token_id": tiny.END_OF_TEXT,
    }
    if sampled:
        options["num_return_sequences"] = int(rng.integers(1, rows // prompts + 1))
        options["seed"] = int(rng.integers(0, 1000))
    return random_inputs("tied", lines, seed=int(rng.integers(0, 1000))), options


def check(model, programs, *, count, rows, tokens, seconds, new_tokens):
    told = []
    shapes = model.warmup(
        rows=rows,
        tokens=tokens,
        seconds=seconds,
        max_new_tokens=new_tokens,
        top_k=50,
        on_progress=lambda *all_: told.append(all_),
    )
    assert sorted(name for *_, name in told) == sorted(shapes)
    assert [(done, total) for done, total, *_ in told] == [(i, len(shapes)) for i in range(1, len(shapes) + 1)]
    assert programs  # the count can count
    programs.clear()
    rng = np.random.default_rng(1)
    for _ in range(count):
        inputs, options = request(rng, rows=rows, tokens=tokens, frames=int(100 * seconds), new_tokens=new_tokens)
        model.generate(**inputs, **options)
        assert programs == [], (inputs["input_ids"].shape, options)
    model.generate(**random_inputs("tied", [[tokens + 80]]), **STOPS, max_new_tokens=2)
    assert programs


@pytest.mark.slow(seconds=16)
def test_nothing_is_compiled_afterwards(programs):
    check(make_model(), programs, count=25, rows=2, tokens=40, seconds=0.4, new_tokens=9)


@pytest.mark.slow(seconds=10)
def test_nothing_is_compiled_where_a_cache_grows(programs, monkeypatch):
    monkeypatch.setattr(call, "ROOM", 1)
    check(make_model(), programs, count=6, rows=1, tokens=120, seconds=0.4, new_tokens=60)


@pytest.mark.slow(seconds=80)
def test_nothing_is_compiled_in_a_mixed_workload(programs):
    check(make_model(), programs, count=200, rows=4, tokens=200, seconds=3.0, new_tokens=100)


@pytest.mark.slow(seconds=35)
@pytest.mark.parametrize("mesh", [(2, 1), (4, 2)], ids=str)
def test_nothing_is_compiled_on_a_mesh(programs, mesh):
    data, model = mesh
    mesh = make_mesh(data=data, model=model, devices=jax.devices()[: data * model])
    check(make_model(mesh), programs, count=40, rows=9, tokens=40, seconds=0.4, new_tokens=9)


def test_text_alone_has_no_clips(capsys):
    shapes = make_model().warmup(tokens=16, max_new_tokens=1, seconds=0, do_sample=False, threads=1)
    assert shapes == ["prefill 1 x 16 tokens", "decode 1 x 128 positions"]
    assert capsys.readouterr().err.startswith("warmup: 2 of 2 shapes compiled, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows=0: at least 1"),
        ({"tokens": 0}, "tokens=0: at least 1"),
        ({"tokens": 500}, "500 tokens and 20 new ones make 520, but the model has 512"),
        ({"seconds": 5}, "seconds=5: a clip has 0 .* to 4"),
        ({"clips": 3, "seconds": 0}, "clips=3 and seconds=0"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_bounds_that_cannot_be(change, message):
    bounds = {"tokens": 100, "max_new_tokens": 20, "seconds": 1.0}
    with pytest.raises(ValueError, match=message):
        make_model().warmup(**(bounds | change))


def test_more_programs_than_jax_keeps_are_refused(monkeypatch):
    monkeypatch.setattr(warmup, "MOST_PROGRAMS", 3)
    with pytest.raises(ValueError, match="some 6 programs, and JAX keeps 3: lower rows"):
        make_model().warmup(tokens=16, max_new_tokens=1, seconds=0, do_sample=False)


def test_an_error_ends_the_warm_up(monkeypatch):
    def fail(*arguments, **more):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(warmup, "compiled", fail)
    with pytest.raises(RuntimeError, match="no compiler"):
        make_model().warmup(tokens=16, max_new_tokens=1, seconds=0)
