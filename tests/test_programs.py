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
from qwen2audio_jax.model import kernel_layout
from qwen2audio_jax.model.qwen2_audio import init_params


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """`processor(flags)`: what /proc/cpuinfo says."""

    def set_flags(flags):
        info = tmp_path / f"cpuinfo-{flags.replace(' ', '-')}"
        info.write_text(f"flags\t\t: {flags}\n")
        monkeypatch.setattr(kernel_layout, "CPU_INFO", info)

    return set_flags


def multiply(dtype):
    """A product x [M, 256] . w [256, 512] as a program."""
    return ByRows(lambda x, w: x @ w, lambda x, w: Product(len(x), dtype, x))


def operands(rows):
    return jnp.ones((rows, 256)), jnp.ones((256, 512))


def text_of(function, rows):
    np.testing.assert_array_equal(function(*operands(rows)), jnp.full((rows, 512), 256.0))
    return function.lower(*operands(rows)).compile().as_text()


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
    function = multiply(dtype)
    function.few, function.usual = (lambda x, w: "few"), (lambda x, w: "usual")
    for rows in (1, 2, 3, 8, 63, 64, 200):
        assert function(*operands(rows)) == ("few" if rows in few else "usual"), rows


def test_the_two_differ(processor):
    """Where YNNPACK is on, few rows go without it."""
    processor("fma avx2")
    if "ynn" not in text_of(multiply("float32"), 64):
        pytest.skip("this XLA computes no product with YNNPACK, or was told not to")
    assert "ynn" not in text_of(multiply("float32"), 8)


def test_a_release_without_the_option(processor, monkeypatch):
    processor("fma avx2")
    monkeypatch.setattr(programs, "_EIGEN", {"xla_cpu_no_such_option": ""})
    programs._knows_eigen.cache_clear()
    try:
        assert text_of(multiply("float32"), 8)
    finally:
        programs._knows_eigen.cache_clear()


def test_specs_and_host_arrays_are_taken(processor):
    processor("fma avx2")
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 256), (256, 512))]
    assert multiply("float32").lower(*specs).out_info.shape == (8, 512)
    x, w = (np.ones(spec.shape, np.float32) for spec in specs)
    np.testing.assert_array_equal(multiply("float32")(x, w), np.full((8, 512), 256.0))


def test_the_same_tokens(processor, monkeypatch):
    """Encoder, prompts and steps of few rows, with either program."""
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    model = Qwen2AudioForConditionalGeneration(config, init_params(config, seed=4))
    requests = [[[4, "40", 3], [7, "60", 2], [5], [9, "8", 1]], [[7]]]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    called = set()

    def seen(name, few):
        def call(*arguments, **named):
            called.add(name)
            return few(*arguments, **named)

        return call

    chosen = {"step": decoding.next_step, "encode": encoding.encode_audio, "prefill": run.prefill}
    for name, function in chosen.items():
        monkeypatch.setattr(function, "few", seen(name, function.few))
    found = {}
    for flags in ("fma avx2 avx512f", "fma avx2"):
        assert not called
        processor(flags)
        inputs = [random_inputs("gqa", rows, seed=2) for rows in requests]
        found[flags] = [model.generate(**each, **options, return_dict_in_generate=True) for each in inputs]
    assert called == set(chosen)
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(one.sequences, other.sequences)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
