"""int8 weights and int8 cache: the error they make, and that they are the same wherever they come from and run."""

import copy
from functools import cache

import hf_layout
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import config_of, random_adapter, settings_of
from flax.traverse_util import flatten_dict, unflatten_dict
from judge import relative_error
from prompts import random_inputs
from test_resume import SMALL, Stopped, stop_at

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, make_mesh
from qwen2audio_jax.checkpoint import adapter as adapters
from qwen2audio_jax.checkpoint import reader
from qwen2audio_jax.checkpoint.check import check
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, export, verify
from qwen2audio_jax.convert.list_checkpoint import inspect
from qwen2audio_jax.embedded import examples
from qwen2audio_jax.generation import memory
from qwen2audio_jax.model.binding import bind
from qwen2audio_jax.model.kv_cache import cache_specs, empty_cache
from qwen2audio_jax.model.layers import Linear
from qwen2audio_jax.model.lora import merge_adapter
from qwen2audio_jax.model.quantization import channel_axis, quantize, scale_name
from qwen2audio_jax.model.qwen2_audio import (
    Prompt,
    decode_step,
    embed,
    fill,
    forward,
    init_params,
    parameter_axes,
    parameter_specs,
)
from qwen2audio_jax.parallel.sharding import partition_spec

TRANSCRIBE = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"
load_model = Qwen2AudioForConditionalGeneration.from_pretrained


def quantized(params):
    """The int8 form of a parameter tree, and the float tree that it stands for."""
    codes, floats = {}, {}
    for name, weight in flatten_dict(params, sep="/").items():
        axis = channel_axis(name)
        if axis is None:
            codes[name] = floats[name] = weight
            continue
        codes[name], scales = quantize(weight, axis=1 - axis)
        codes[scale_name(name)] = scales
        floats[name] = codes[name].astype(jnp.float32) * jnp.expand_dims(scales, 1 - axis)
    return unflatten_dict(codes, sep="/"), unflatten_dict(floats, sep="/")


def text_prompt(config, *, rows=3, width=20):
    rng = np.random.default_rng(3)
    ids = jnp.asarray(rng.integers(0, config.text_config.vocab_size, (rows, width)), jnp.int32)
    return Prompt(ids, jnp.asarray([width, width - 7, 3], jnp.int32)[:rows], None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("int8")
    hf_layout.write_hf_checkpoint(place / "hf", "gqa")
    return place


@pytest.fixture(scope="module")
def load(folder):
    """`load(data, model, ...)`: the tiny model on a mesh, float32 computation."""

    @cache
    def build(data=1, model=1, **options):
        mesh = make_mesh(data=data, model=model, devices=jax.devices()[: data * model])
        return load_model(folder / "hf", cache_dir=folder / "cache", mesh=mesh, **options)

    return build


@pytest.fixture(scope="module")
def converted(folder):
    assert command.main([str(folder / "hf"), str(folder / "orbax"), "--dtype", "int8", "--quiet"]) == 0
    return folder / "orbax"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    place = tmp_path_factory.mktemp("embedded")
    return {kind: load_model(cache_dir=place, cache_dtype=kind) for kind in ("auto", "int8")}


class TestQuantize:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_off_by_half_a_step_at_most(self, dtype, axis):
        x = (np.random.default_rng(0).standard_normal((37, 53)) * np.logspace(-2, 1, 53)).astype(dtype)
        codes, scales = quantize(x, axis=axis, xp=np)
        wide = x.astype(np.float32)
        assert codes.dtype == np.int8
        assert np.abs(codes).max(axis).min() == np.abs(codes).max() == 127
        np.testing.assert_allclose(scales, np.abs(wide).max(axis) / 127, rtol=1e-6)
        error = np.abs(codes * np.expand_dims(scales, axis) - wide)
        assert (error <= np.expand_dims(scales, axis) * 0.50001).all()

    def test_the_same_bits_on_host_and_device(self):
        x = np.random.default_rng(1).standard_normal((64, 300)).astype(np.float32)
        for ours, theirs in zip(
            quantize(x, axis=0, xp=np), jax.jit(quantize, static_argnames="axis")(x, axis=0), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    def test_zeros_stay_zeros(self):
        x = np.array([[0, 0, 0], [1, -2, 0.5]], np.float32)
        codes, scales = quantize(x, axis=1, xp=np)
        assert scales[0] == 0
        assert codes[0].tolist() == [0, 0, 0]

    # The decoder's shapes in the published model; query, key, value and output have the first.
    @pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096)], ids=str)
    def test_error_at_the_published_widths(self, shape):
        weight = np.random.default_rng(2).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        codes, scales = jax.jit(quantize, static_argnames="axis")(weight, axis=0)
        wide = weight.astype(np.float32)
        error = np.linalg.norm(np.asarray(codes) * np.asarray(scales) - wide) / np.linalg.norm(wide)
        assert 0.005 < error <= 0.012


class TestWeights:
    @pytest.mark.parametrize("name", ["gqa", pytest.param("tied", marks=pytest.mark.slow(seconds=5))])
    def test_computes_with_what_the_codes_stand_for(self, name):
        config = config_of(name)
        codes, floats = jax.jit(lambda: quantized(init_params(config, seed=0)))()
        prompt, logits = text_prompt(config), jax.jit(forward, static_argnames="cfg")
        assert relative_error(logits(codes, prompt, cfg=config), logits(floats, prompt, cfg=config)) < 1e-5

    def test_split_heads_are_scaled_alike(self):
        codes, _ = quantized({"decoder": {"x": {"kernel": jax.random.normal(jax.random.key(0), (8, 12))}}})

        def declare(config, *, rngs):
            return Linear(("width", 8), ("heads", 12), bias=False, rngs=rngs)

        linear = bind(declare, None, codes["decoder"]["x"])
        x = jax.random.normal(jax.random.key(1), (2, 3, 8))
        assert relative_error(linear.split(x, 4).reshape(2, 3, 12), linear(x)) < 1e-6

    def test_specs_and_axes(self, load):
        config = config_of("gqa")
        specs, axes = parameter_specs(config, weights="int8"), parameter_axes(config, weights="int8")
        assert axes["decoder"]["layers"]["0"]["mlp"]["up_proj"]["scale"] == ("ffn",)
        assert axes["decoder"]["embed_tokens"]["scale"] == ("vocab",)
        flat = flatten_dict(specs, sep="/")
        for path, names in flatten_dict(axes, sep="/").items():
            assert len(names) == len(flat[path].shape)
            partition_spec(*names)
        loaded = load(weights_dtype="int8").params
        jax.tree.map(
            lambda spec, leaf: np.testing.assert_equal((leaf.shape, leaf.dtype), (spec.shape, spec.dtype)),
            specs,
            loaded,
        )
        assert not any(spec.dtype == np.int8 for spec in jax.tree.leaves([specs["encoder"], specs["projector"]]))

    @pytest.mark.parametrize("mesh", [(4, 2), (2, 4)], ids=str)
    @pytest.mark.slow(seconds=15)
    def test_meshes_agree(self, load, mesh):
        inputs = random_inputs("gqa")
        one, many = load(weights_dtype="int8"), load(*mesh, weights_dtype="int8")
        assert many.params["decoder"]["lm_head"]["scale"].shape[0] % mesh[1] == 0
        assert relative_error(many(**inputs).logits, one(**inputs).logits) < 1e-5
        texts = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for model in (one, many)]
        np.testing.assert_array_equal(*texts)

    def test_divergence_from_float(self, load, record_property):
        inputs = random_inputs("gqa")
        float_, int8 = (jax.nn.log_softmax(load(**w)(**inputs).logits) for w in ({}, {"weights_dtype": "int8"}))
        real = inputs["attention_mask"].astype(bool)
        divergence = (jnp.exp(float_) * (float_ - int8)).sum(-1)[real].mean()
        record_property("kl", float(divergence))
        assert 0 < divergence < 0.01

    def test_an_adapter_is_added_before(self, folder, tmp_path):
        settings = settings_of(("q_proj", "lm_head", "fc1"))
        adapter = random_adapter("gqa", settings)
        adapters.save_adapter(tmp_path / "a", adapter, settings=settings, config=config_of("gqa"), base_model="x")
        model = load_model(folder / "hf", cache_dir=folder / "cache", adapter=tmp_path / "a", weights_dtype="int8")
        plain = load_model(folder / "hf", cache_dir=folder / "cache").params
        _, merged = quantized(merge_adapter(plain, adapter, scale=settings.alpha / settings.rank))
        prompt = text_prompt(model.config)
        close = relative_error(
            forward(model.params, prompt, cfg=model.config), forward(merged, prompt, cfg=model.config)
        )
        assert close < 5e-3  # a code may fall to the other side of a tie
        convert(folder / "hf", tmp_path / "orbax", dtype="int8", adapter=tmp_path / "a")
        assert verify(folder / "hf", tmp_path / "orbax", adapter=tmp_path / "a") == []
        converted = load_model(tmp_path / "orbax")
        for name, codes in flatten_dict(converted.params, sep="/").items():
            theirs = flatten_dict(model.params, sep="/")[name]
            if codes.dtype == np.int8:
                assert np.abs(np.asarray(codes, np.int16) - np.asarray(theirs)).max() <= 1
            else:
                assert relative_error(codes, theirs) < 1e-5
        with pytest.raises(ValueError, match="int8 and an adapter is added before they are: load the checkpoint"):
            load_model(tmp_path / "orbax", adapter=tmp_path / "a")

    @pytest.mark.parametrize("option", ["weights_dtype", "cache_dtype"])
    def test_an_unknown_storage_is_refused_first(self, option):
        with pytest.raises(ValueError, match=f"{option}='int4' is not one of 'auto', 'int8'"):
            load_model("/nowhere", **{option: "int4"})


class TestConvert:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_what_loading_makes(self, folder, converted, dtype):
        loaded = load_model(folder / "hf", cache_dir=folder / "cache", weights_dtype="int8", dtype=dtype)
        stored = load_model(converted, dtype=dtype)
        assert stored.config == loaded.config
        jax.tree.map(np.testing.assert_array_equal, stored.params, loaded.params)

    def test_tied(self, tmp_path):
        hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", dtype="bfloat16")
        convert(tmp_path / "hf", tmp_path / "orbax", dtype="int8")
        loaded = load_model(tmp_path / "hf", cache_dir=tmp_path / "cache", weights_dtype="int8")
        jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "orbax").params, loaded.params)
        assert verify(tmp_path / "hf", tmp_path / "orbax") == []

    def test_is_said_and_checked(self, folder, converted):
        contents = inspect(converted)
        specs = flatten_dict(parameter_specs(config_of("gqa"), weights="int8"), sep="/")
        assert contents["parameters"].keys() == specs.keys()
        codes = [name for name, each in contents["parameters"].items() if each["dtype"] == "int8"]
        assert contents["source"]["dtype"] == "int8"
        assert contents["source"]["quantized"].startswith("int8 codes, symmetric")
        assert len(codes) == 7 * 3 + 2
        assert all(not finding.problems for finding in check(converted))
        assert verify(folder / "hf", converted) == []

    def test_verify_finds_another_source(self, converted, tmp_path):
        tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
        tensors["model.language_model.layers.1.mlp.up_proj.weight"][3] *= -2
        hf_layout.write_tensors(tmp_path / "hf", tensors)
        found = verify(tmp_path / "hf", converted)
        assert len(found) == 2
        assert all(difference.startswith("decoder/layers/1/mlp/up_proj/kernel") for difference in found)

    def test_goes_on_where_it_was(self, folder, tmp_path):
        with pytest.raises(Stopped):
            convert(folder / "hf", tmp_path / "a", dtype="int8", memory_gb=SMALL, on_progress=stop_at(0.5))
        with pytest.raises(ValueError, match="unfinished checkpoint with dtype 'int8' instead of 'keep'"):
            convert(folder / "hf", tmp_path / "a", memory_gb=SMALL)
        convert(folder / "hf", tmp_path / "a", dtype="int8", memory_gb=SMALL)
        assert verify(folder / "hf", tmp_path / "a") == []

    def test_refusals(self, folder, converted, tmp_path):
        with pytest.raises(ValueError, match=r"its weights are int8, .*; export the checkpoint that it was converted"):
            export(converted, tmp_path / "out")
        with pytest.raises(ValueError, match=r"its weights are int8, .*; use the checkpoint that it was converted"):
            reader.restore_params(converted, specs=parameter_specs(config_of("gqa")))
        with pytest.raises(ValueError, match="NaN and Inf have no int8 codes"):
            convert(folder / "hf", tmp_path / "no", dtype="int8", non_finite="allow")
        tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
        tensors["lm_head.weight"][0, 0] = np.inf
        hf_layout.write_tensors(tmp_path / "hf", tensors)
        with pytest.raises(ValueError, match=r"lm_head\.weight holds NaN or Inf"):
            convert(tmp_path / "hf", tmp_path / "no", dtype="int8")
        assert not (tmp_path / "no").exists()


def step_logits(params, config, *, dtype, prompt):
    """Logits after the prompts and after two more tokens, through a cache of a dtype."""
    rows = len(prompt.ids)
    cache = empty_cache(config.text_config, rows=rows, capacity=32, dtype=jnp.dtype(dtype))
    embeddings = embed(params, prompt, cfg=config)
    logits, cache = jax.jit(fill, static_argnames="cfg")(params, embeddings, cache, counts=prompt.lengths, cfg=config)
    found = [logits]
    for token in (5, 9):
        tokens = jnp.full((rows,), token, jnp.int32)
        logits, cache = jax.jit(decode_step, static_argnames="cfg")(params, tokens, cache, cfg=config)
        found.append(logits)
    return np.stack(found)


class TestCache:
    @pytest.mark.slow(seconds=30)
    def test_same_answers_of_the_embedded_model(self, embedded):
        processor = Qwen2AudioProcessor.from_pretrained()
        clips = [processor.feature_extractor.load(str(path)) for path in examples()]
        inputs = processor(text=[TRANSCRIBE] * len(clips), audio=clips)
        answers = [
            model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
            for model in embedded.values()
        ]
        np.testing.assert_array_equal(answers[0].sequences, answers[1].sequences)
        # Alone, without padding, the same as in the batch.
        one = processor(text=TRANSCRIBE, audio=clips[0])
        alone = embedded["int8"].generate(**one, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        length = int(alone.lengths[0])
        new = [each.sequences[0, -each.sequences.shape[1] :] for each in (alone, answers[1])]
        assert alone.lengths[0] == answers[1].lengths[0]
        start = one.input_ids.shape[1], inputs.input_ids.shape[1]
        np.testing.assert_array_equal(new[0][start[0] :][:length], new[1][start[1] :][:length])

    def test_logits_of_the_embedded_model(self, embedded):
        model = embedded["auto"]
        prompt = text_prompt(model.config)
        found = [step_logits(model.params, model.config, dtype=d, prompt=prompt) for d in ("float32", "int8")]
        assert 0 < np.abs(found[0] - found[1]).max() <= 0.02 * np.ptp(found[0])
        # The shortest row by itself.
        short = Prompt(prompt.ids[2:, :3], prompt.lengths[2:], None, None)
        alone = step_logits(model.params, model.config, dtype="int8", prompt=short)
        assert np.abs(alone[:, 0] - found[0][:, 2]).max() <= 0.02 * np.ptp(found[0])

    @pytest.mark.parametrize("mesh", [pytest.param((4, 2), marks=pytest.mark.slow(seconds=13)), (2, 4)], ids=str)
    def test_meshes_split_it_like_a_float_cache(self, load, mesh):
        inputs = random_inputs("gqa")
        model = load(*mesh, weights_dtype="int8", cache_dtype="int8")
        specs = cache_specs(model.config.text_config, rows=4, capacity=16, dtype=np.int8, mesh=model.mesh)
        assert specs.keys[0].codes.sharding.spec == partition_spec("batch", "kv_heads", "capacity", "head_dim")
        assert specs.keys[0].scales.sharding.spec == partition_spec("batch", "kv_heads", "capacity")
        sequences = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert sequences.shape == (4, inputs["input_ids"].shape[1] + 3)


class TestFits:
    CONFIG = config_of("gqa").text_config

    def test_bytes(self):
        mesh = make_mesh(data=2, model=4)
        size = {"rows": 8, "capacity": 64, "mesh": mesh}
        # Keys and values of 3 layers, 4 heads of 10: a row's share and a head's on each of 2 x 4 devices.
        values = 2 * 3 * 8 * 4 * 64 * 10 // 8
        lengths = 8 * 4 // 2
        assert memory.cache_bytes(self.CONFIG, dtype=np.float32, **size) == 4 * values + lengths
        assert memory.cache_bytes(self.CONFIG, dtype=jnp.dtype("int8"), **size) == values + 4 * values // 10 + lengths

    @pytest.mark.parametrize("kind", ["auto", "int8"])
    def test_too_large_a_cache_is_refused_before_it_is_made(self, load, monkeypatch, kind):
        model = copy.copy(load())
        model.cache_dtype = kind
        inputs = random_inputs("gqa")
        monkeypatch.setattr(memory, "free_bytes", lambda devices: 10_000)
        dtype, remedy = (
            ("float32", "cache_dtype='int8', or a mesh") if kind == "auto" else ("int8", "max_new_tokens, or a mesh")
        )
        with pytest.raises(
            ValueError, match=rf"a {dtype} cache of \d+ rows? x \d+ positions .*{remedy} of more devices"
        ):
            model.generate(**inputs, max_new_tokens=4)
        monkeypatch.setattr(memory, "free_bytes", lambda devices: 1 << 30)
        model.generate(**inputs, max_new_tokens=1)

    def test_free_memory(self):
        class Device:
            def __init__(self, stats):
                self.memory_stats = lambda: stats

        told = [Device({"bytes_limit": 100, "bytes_in_use": used}) for used in (30, 70)]
        assert memory.free_bytes([*told, Device(None)]) == 30
        assert memory.free_bytes([Device(None)]) is None
