"""Turned kernels compute what kernels as stored do, are chosen by the processor, and leave as they came."""

import jax
import numpy as np
import pytest
from adapters import random_adapter, settings_of
from prompts import row_alone
from safetensors.numpy import load_file

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.model import kernel_layout
from qwen2audio_jax.model.lora import merge_adapter, merge_adapter_in_place, with_adapter


@pytest.fixture
def loaded(hf_checkpoint, tmp_path_factory, monkeypatch):
    """`loaded(dtype, mesh, turned=)`: a model whose kernels are turned, as on some CPUs, or not."""
    cache = tmp_path_factory.mktemp("turned")

    def load(dtype="float32", mesh=None, *, turned=True):
        monkeypatch.setattr("qwen2audio_jax.api.prefers_turned", lambda mesh, *, dtype: turned)
        return Qwen2AudioForConditionalGeneration.from_pretrained(
            hf_checkpoint("gqa"), dtype=dtype, mesh=mesh, cache_dir=cache
        )

    return load


def kernels(model, name):
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return [leaf for path, leaf in leaves if path[-1].key == name and leaf.ndim == 2]


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_the_same_tokens_and_logits(loaded, shape):
    mesh = None if shape is None else make_mesh(data=2, model=2, devices=jax.devices()[:4])
    turned, stored = loaded(mesh=mesh), loaded(mesh=mesh, turned=False)
    assert len(kernels(turned, "turned_kernel")) == len(kernels(stored, "kernel")) > 10
    assert not kernels(turned, "kernel")
    for one, other in zip(kernels(turned, "turned_kernel"), kernels(stored, "kernel"), strict=True):
        np.testing.assert_array_equal(one, other.T)
        assert [shard.data.shape for shard in one.addressable_shards] == [
            shard.data.shape[::-1] for shard in other.addressable_shards
        ]
    inputs = row_alone("gqa", 0, ([4, "40", 3], [5, "9"]))
    if mesh is None:
        options = {"max_new_tokens": 12, "do_sample": False}
        np.testing.assert_array_equal(turned.generate(**inputs, **options), stored.generate(**inputs, **options))
    logits, wanted = (np.asarray(model(**inputs).logits) for model in (turned, stored))
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_adapters_are_added(loaded):
    adapter, inputs = random_adapter("gqa", settings_of()), row_alone("gqa", 0, ([4, "40", 3], [5, "9"]))
    model, stored = loaded(), loaded(turned=False)
    wanted = np.asarray(logits(stored, merge_adapter(stored.params, adapter, scale=2.0), inputs))
    assert np.abs(wanted - np.asarray(stored(**inputs).logits)).max() > 0.1
    for add in (merge_adapter, with_adapter, merge_adapter_in_place):
        found = logits(model, add(model.params, adapter, scale=2.0), inputs)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def logits(model, params, inputs):
    return Qwen2AudioForConditionalGeneration(model.config, params, mesh=model.mesh)(**inputs).logits


def test_they_are_saved_as_they_came(loaded, hf_checkpoint, tmp_path):
    model = loaded()
    model.save_pretrained(tmp_path / "saved")
    (saved,), (came,) = (list(folder.glob("*.safetensors")) for folder in (tmp_path / "saved", hf_checkpoint("gqa")))
    tensors = load_file(saved)
    for name, array in load_file(came).items():
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize(
    ("flags", "dtype", "turned"),
    [
        ("fma avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16", True),
        ("fma avx2 avx512f avx512_bf16", "bfloat16", False),  # there [in, out] is the faster one
        ("fma avx2", "bfloat16", True),
        ("fma avx2", "float32", False),
        ("sse2", "bfloat16", False),
        ("fma avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "float32", False),
        (None, "bfloat16", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, flags, dtype, turned):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(kernel_layout, "CPU_INFO", info)
    assert kernel_layout.prefers_turned(make_mesh(data=1, devices=jax.devices()[:1]), dtype=dtype) is turned
