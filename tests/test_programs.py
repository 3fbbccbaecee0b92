"""Programs of few rows are compiled apart where that is faster, and give the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from prompts import random_inputs

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
from qwen2audio_jax.generation import decoding, encoding, programs, run
from qwen2audio_jax.generation.programs import ByRows, Product
from qwen2audio_jax.model.qwen2_audio import init_params


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """`processor(flags)`: what /proc/cpuinfo says."""

    def set_flags(flags):
        info = tmp_path / f"cpuinfo-{flags.replace(' ', '-')}"
        info.write_text(f"flags\t\t: {flags}\n")
        monkeypatch.setattr(programs, "CPU_INFO", info)

    return set_flags


def multiply(dtype):
    """A product x [M, 256] . w [256, 512] as a program."""
    return ByRows(lambda x, w: x @ w, lambda x, w: Product(len(x), dtype, x))


def text_of(function, rows, dtype):
    x, w = jnp.ones((rows, 256), dtype), jnp.ones((256, 512), dtype)
    np.testing.assert_array_equal(function(x, w), jnp.full((rows, 512), 256, dtype))
    return function.lower(x, w).compile().as_text()


@pytest.mark.parametrize(
    ("flags", "dtype", "few"),
    [
        ("fma avx2", "float32", range(3, 64)),
        ("fma avx2", "bfloat16", ()),
        ("fma avx2 avx512f", "float32", ()),
        ("sse2", "float32", ()),
    ],
)
def test_rows_dtype_and_processor_decide(processor, flags, dtype, few):
    processor(flags)
    function, usual = multiply(dtype), jax.jit(lambda x, w: x @ w)
    for rows in (1, 2, 3, 8, 63, 64, 200):
        x, w = jnp.ones((rows, 256), dtype), jnp.ones((256, 512), dtype)
        wanted = usual.lower(x, w).compile(programs._ROUNDING | (programs._EIGEN if rows in few else {}))
        assert products(text_of(function, rows, dtype)) == products(wanted.as_text()), rows


def products(text):
    """How a program's products are called."""
    return [kind for kind in ("ynn", "dot(", "custom-call") if kind in text]


def test_the_two_differ(processor):
    """Where YNNPACK is on, few rows go without it: else the test before this one would tell nothing."""
    processor("fma avx2")
    if "ynn" not in text_of(multiply("float32"), 64, "float32"):
        pytest.skip("this XLA computes no product with YNNPACK, or was told not to")
    assert "ynn" not in text_of(multiply("float32"), 8, "float32")


def test_a_release_without_the_option(processor, monkeypatch):
    processor("fma avx2")
    monkeypatch.setattr(programs, "_EIGEN", {"xla_cpu_no_such_option": ""})
    programs._knows_eigen.cache_clear()
    try:
        function = multiply("float32")
        assert products(text_of(function, 8, "float32")) == products(text_of(function, 64, "float32"))
    finally:
        programs._knows_eigen.cache_clear()


def test_specs_and_host_arrays_are_taken(processor):
    processor("fma avx2")
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 256), (256, 512))]
    assert multiply("float32").lower(*specs).out_info.shape == (8, 512)
    x, w = (np.ones(spec.shape, np.float32) for spec in specs)
    np.testing.assert_array_equal(multiply("float32")(x, w), np.full((8, 512), 256.0))


def test_the_same_tokens(processor):
    """Encoder, prompts and steps of few rows, with either program."""
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    params = init_params(config, seed=4)
    requests = [[[4, "40", 3], [7, "60", 2], [5], [9, "8", 1]], [[7]]]
    taken = {}
    for flags in ("fma avx2", "fma avx2 avx512f"):
        processor(flags)
        model = Qwen2AudioForConditionalGeneration(config, params)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
        answers = [model.generate(**random_inputs("gqa", rows, seed=2), **options) for rows in requests]
        taken[flags] = [answer.tolist() for answer in answers]
    first, second = taken.values()
    assert first == second
    few = [program.few._cache_size() for program in (decoding.next_step, encoding.encode_audio, run.prefill)]
    assert all(few), few
