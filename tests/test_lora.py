"""LoRA: what is adapted, and its arithmetic against PEFT's."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import EVERYTHING, LINEARS, config_of, random_adapter, settings_of
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from judge import assert_as_close_as_the_reference, relative_error
from prompts import RAGGED, as_torch, forward_inputs, random_inputs
from safetensors.numpy import load_file
from train_rows import SHORT, examples, pack

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.checkpoint.adapter import load_adapter, save_adapter
from qwen2audio_jax.convert import convert, verify
from qwen2audio_jax.model.binding import bind
from qwen2audio_jax.model.layers import Linear
from qwen2audio_jax.model.lora import (
    init_adapter,
    linear_shapes,
    lora_axes,
    lora_scale,
    lora_specs,
    merge_adapter,
    target_paths,
    with_adapter,
)
from qwen2audio_jax.model.qwen2_audio import sharded_specs
from qwen2audio_jax.train.losses import sft_sums
from qwen2audio_jax.train.state import weight_shardings

# transformers warns of a property that it has itself renamed when PEFT asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

PACKED = [[3], [1, 0], [2, 4, 6], [5, 7]]


def logits(model, params, inputs):
    found = Qwen2AudioForConditionalGeneration(model.config, params)(**inputs).logits
    return np.asarray(found)[inputs["attention_mask"] == 1]


def peft_logits(inputs):
    """For `judge`: a model's logits."""
    import torch

    def logits(model):
        with torch.no_grad():
            return model(**forward_inputs(inputs)).logits.numpy()[inputs["attention_mask"] == 1]

    return logits


# What is adapted


def test_targets():
    config = config_of("gqa")
    linears = set(linear_shapes(config))
    assert set(target_paths(config, ["all-linear"])) == linears - {("decoder", "lm_head")}
    assert set(target_paths(config, ["all-linear", "lm_head"])) == linears
    assert set(target_paths(config, ["q_proj"])) == {path for path in linears if path[-1] == "q_proj"}
    assert {path[0] for path in target_paths(config, ["q_proj"])} == {"encoder", "decoder"}
    only = target_paths(config, ["decoder.q_proj", "projector", "decoder.q_proj"])
    assert only == [*[("decoder", "layers", str(n), "self_attn", "q_proj") for n in range(3)], ("projector",)]
    assert set(target_paths(config, ["encoder"])) == {path for path in linears if path[0] == "encoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj", "qkv")}, "'qkv' names no linear layer .* gate_proj, k_proj, lm_head, o_proj"),
        ({"targets": ("conv1",)}, "'conv1' names no linear layer"),
        ({"targets": ()}, "lora has no targets"),
        ({"rank": 0}, "lora.rank = 0"),
        ({"dropout": 1.0}, "lora.dropout = 1.0"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lora_specs(config_of("gqa"), settings_of(**{"targets": ("q_proj",), **changes}))


def test_a_tied_head_is_no_linear_layer():
    with pytest.raises(ValueError, match="'lm_head' names no linear layer"):
        lora_specs(config_of("tied"), settings_of(("lm_head",)))


# The arithmetic


def test_a_fresh_adapter_adds_nothing_and_its_values_are_a_linear_maps_own(load):
    model, settings = load("gqa"), settings_of()
    adapter = jax.jit(lambda: init_adapter(model.config, settings, seed=1))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), adapter) == jax.tree.map(
        lambda x: (x.shape, x.dtype), lora_specs(model.config, settings)
    )
    inputs = random_inputs("gqa")
    np.testing.assert_array_equal(
        logits(model, with_adapter(model.params, adapter, scale=2.0), inputs), logits(model, model.params, inputs)
    )
    a = np.asarray(adapter["decoder"]["layers"]["1"]["mlp"]["down_proj"]["lora_a"])  # [80, 3]
    assert 0.9 * 80**-0.5 < np.abs(a).max() <= 80**-0.5
    assert np.abs(a.mean()) < 0.02
    fewer = jax.jit(lambda: init_adapter(model.config, settings_of(("down_proj",)), seed=1))()
    np.testing.assert_array_equal(fewer["decoder"]["layers"]["1"]["mlp"]["down_proj"]["lora_a"], a)
    assert not np.array_equal(fewer["decoder"]["layers"]["0"]["mlp"]["down_proj"]["lora_a"], a)


@pytest.mark.parametrize("shape", [(4, 7), (4, 1)], ids=["prompt", "one token"])
def test_merged_equals_beside(load, shape):
    """Also where one token a row takes another way through the projections."""
    model, settings = load("gqa"), settings_of()
    adapter, scale = random_adapter("gqa", settings), lora_scale(settings)
    ids = np.random.default_rng(0).integers(0, 300, shape)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    beside = logits(model, with_adapter(model.params, adapter, scale=scale), inputs)
    assert relative_error(logits(model, merge_adapter(model.params, adapter, scale=scale), inputs), beside) < 1e-5
    assert relative_error(logits(model, model.params, inputs), beside) > 0.1


def test_generating_with_an_adapter_beside_equals_merged(load):
    model, settings = load("gqa"), settings_of()
    adapter, scale = random_adapter("gqa", settings), lora_scale(settings)
    inputs = random_inputs("gqa", RAGGED[:2])
    beside, merged, plain = (
        Qwen2AudioForConditionalGeneration(model.config, params).generate(**inputs, max_new_tokens=8, do_sample=False)
        for params in (
            with_adapter(model.params, adapter, scale=scale),
            merge_adapter(model.params, adapter, scale=scale),
            model.params,
        )
    )
    np.testing.assert_array_equal(beside, merged)
    assert not np.array_equal(beside, plain)


def declare(config, *, rngs):
    return Linear(("width", 64), ("ffn", 5), bias=False, rngs=rngs)


def test_dropout():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((400, 64)), jnp.float32)
    weights = {"kernel": jnp.zeros((64, 5))}
    # a and b pick out the first five inputs: what is dropped can be counted.
    adapter = {"lora_a": jnp.eye(64, 5), "lora_b": jnp.eye(5)}

    def output(key, dropout=0.25):
        bound = with_adapter({"l": weights}, {"l": adapter}, scale=2.0, dropout=dropout, key=key)
        return np.asarray(bind(declare, None, bound["l"])(x))

    key = jax.random.PRNGKey(3)
    dropped = output(key)
    kept = dropped != 0
    assert 0.72 < kept.mean() < 0.78
    np.testing.assert_allclose(dropped[kept], (2.0 / 0.75 * np.asarray(x)[:, :5])[kept], rtol=1e-5)
    np.testing.assert_array_equal(output(key), dropped)
    assert (output(jax.random.PRNGKey(4)) != dropped).any()
    np.testing.assert_allclose(output(None), 2 * np.asarray(x)[:, :5], rtol=1e-6)
    np.testing.assert_allclose(output(key, dropout=0.0), 2 * np.asarray(x)[:, :5], rtol=1e-6)
    split = bind(declare, None, with_adapter({"l": weights}, {"l": adapter}, scale=2.0, dropout=0.25, key=key)["l"])
    np.testing.assert_array_equal(np.asarray(split.split(x, 5))[..., 0], dropped)


def lora_loss(config, batch, *, scale, remat="none", dropout=0.0, key=None):
    def loss(adapter, params):
        sums = sft_sums(
            with_adapter(params, adapter, scale=scale, dropout=dropout, key=key), batch, cfg=config, remat=remat
        )
        return sums.loss / sums.count

    return loss


def batch_of(name):
    inputs, labels = examples(name, SHORT)
    return pack(inputs, labels, PACKED, tokens=64, clips=4)


@pytest.mark.slow(seconds=10)
def test_gradients_do_not_depend_on_mesh_or_recomputation(load):
    """Dropout included: its draws belong to linear maps and not to devices."""
    model, settings = load("tied"), settings_of(("all-linear",))
    adapter, batch = random_adapter("tied", settings), batch_of("tied")
    options = {"scale": lora_scale(settings), "dropout": 0.2, "key": jax.random.PRNGKey(5)}
    expected = jax.jit(jax.grad(lora_loss(model.config, batch, **options)))(adapter, model.params)

    mesh = make_mesh(data=4, model=2)
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, spec.sharding), dict(model.params), sharded_specs(model.config, mesh=mesh)
    )
    where = weight_shardings(adapter, lora_axes(model.config, settings), mesh=mesh, fsdp=True)
    split = where["decoder"]["layers"]["0"]["mlp"]["down_proj"]
    assert (split["lora_a"].spec, split["lora_b"].spec) == (P("model", None), P(None, "data"))
    with jax.set_mesh(mesh):
        gradient = jax.grad(lora_loss(model.config, batch, remat="layers", **options))
        found = jax.jit(gradient, out_shardings=where)(jax.tree.map(jax.device_put, adapter, where), params)
    for path, value in flatten_dict(expected).items():
        assert relative_error(flatten_dict(found)[path], value) < 1e-4, path


def products(jaxpr):
    """Shapes of all products in a jaxpr, those of nested ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_training_forms_nothing_of_a_kernels_size(load):
    """Neither kernel + a . b nor a kernel's gradient."""
    model, settings = load("gqa"), settings_of(("q_proj", "fc1", "down_proj"))
    adapter, shapes = random_adapter("gqa", settings), linear_shapes(model.config)
    kernels = {
        order for path in target_paths(model.config, settings.targets) for order in (shapes[path], shapes[path][::-1])
    }
    loss = lora_loss(model.config, batch_of("gqa"), scale=1.0)
    found = set(products(jax.make_jaxpr(jax.grad(loss))(adapter, model.params).jaxpr))
    assert {(40, 3), (3, 40)} & found  # gradients of fc1's lora_a
    assert not kernels & found
    both = set(products(jax.make_jaxpr(jax.grad(loss, argnums=1))(adapter, model.params).jaxpr))
    assert kernels & both  # where they are asked for, they are found


def test_bfloat16_computes_in_bfloat16(load):
    """Float32 masters and gradients, bf16 activations."""
    model, settings = load("tied"), settings_of(("all-linear",))
    adapter, batch, scale = random_adapter("tied", settings), batch_of("tied"), lora_scale(settings)
    narrow = replace(model.config, dtype="bfloat16")
    expected = jax.jit(lora_loss(model.config, batch, scale=scale))(adapter, model.params)
    loss, gradient = jax.jit(jax.value_and_grad(lora_loss(narrow, batch, scale=scale)))(adapter, model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(expected), rel=2e-2)


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gqa", EVERYTHING),
        pytest.param("base", ("q_proj", "o_proj", "out_proj", "fc1"), marks=pytest.mark.slow(seconds=5)),
        ("tied", ("decoder", "encoder.q_proj", "projector")),
    ],
)
def test_peft_computes_with_our_adapter(peft, reference, load, tmp_path, name, targets):
    model, settings = load(name), settings_of(targets, alpha=2.5, dropout=0.1)
    # Clips of `base` are as long as the published model's: two rows of it hold one.
    adapter, inputs = random_adapter(name, settings), random_inputs(name, RAGGED[:2] if name == "base" else RAGGED)
    save_adapter(tmp_path, adapter, settings=settings, config=model.config, base_model="owner/base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference(name)), tmp_path)
    adapted = {key for key, _ in theirs.named_modules() if key.endswith("lora_A.default")}
    assert len(adapted) == len(target_paths(model.config, targets))
    ours = logits(model, with_adapter(model.params, adapter, scale=lora_scale(settings)), inputs)
    assert_as_close_as_the_reference(ours, theirs.eval(), peft_logits(inputs))
    assert relative_error(logits(model, model.params, inputs), ours) > 0.1
    again, scale = load_adapter(tmp_path, config=model.config)
    assert scale == lora_scale(settings)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


PEFT_OPTIONS = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "fc2", "lm_head", "linear"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"language_model.layers.1.self_attn.q_proj": 5, "up_proj": 2},
        "alpha_pattern": {"audio_tower.layers.0.self_attn.q_proj": 11, "model.language_model.layers.2.mlp.up_proj": 1},
    },
    "regex": {"target_modules": r".*language_model.*\.(v_proj|down_proj)", "init_lora_weights": "gaussian"},
    "some layers": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


def peft_adapter(peft, reference, folder, *, name="gqa", embeddings=False, **options):
    """A PEFT model with random additions, saved."""
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "task_type": "CAUSAL_LM", **options})
    theirs = peft.get_peft_model(copy.deepcopy(reference(name)), config).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key or "trainable_tokens_delta" in key:
                value.normal_(0, 0.3)
            elif "modules_to_save" in key:
                value.add_(torch.randn_like(value) * 0.1)
    theirs.save_pretrained(folder, save_embedding_layers=embeddings)
    return theirs


@pytest.mark.parametrize("kind", PEFT_OPTIONS)
def test_we_compute_with_pefts_adapter(peft, reference, load, tmp_path, kind):
    theirs = peft_adapter(peft, reference, tmp_path, **PEFT_OPTIONS[kind])
    model, inputs = load("gqa"), random_inputs("gqa")
    adapter, scale = load_adapter(tmp_path, config=model.config)
    ours = logits(model, with_adapter(model.params, adapter, scale=scale), inputs)
    assert_as_close_as_the_reference(ours, theirs, peft_logits(inputs))
    assert relative_error(logits(model, model.params, inputs), ours) > 1e-2


EXTRAS = {
    "head and projector saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "multi_modal_projector"]},
    "embeddings and a norm saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "layer_norm"]},
    "embeddings adapted": {
        "target_modules": ["embed_tokens", "q_proj", "lm_head"],
        "rank_pattern": {"embed_tokens": 5},
    },
    "embeddings adapted and saved": {"target_modules": ["embed_tokens", "lm_head"], "embeddings": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7, 300]},
    "tokens by module": {
        "target_modules": ["fc1"],
        "trainable_token_indices": {"embed_tokens": [302, 5], "lm_head": [8, 9, 301]},
    },
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow(seconds=2) if kind.startswith("embeddings a") else ())
        for kind in EXTRAS
    ],
)
def test_we_compute_with_what_else_peft_trains(peft, reference, load, tmp_path, kind):
    theirs = peft_adapter(peft, reference, tmp_path, **EXTRAS[kind])
    model, inputs = load("gqa"), random_inputs("gqa")
    adapter, scale = load_adapter(tmp_path, config=model.config)
    ours = logits(model, merge_adapter(model.params, adapter, scale=scale), inputs)
    assert_as_close_as_the_reference(ours, theirs, peft_logits(inputs))
    assert relative_error(logits(model, model.params, inputs), ours) > 1e-2


def test_extras_are_converted_and_quantised_as_they_are_merged(peft, reference, hf_checkpoint, tmp_path):
    """By the converter, while int8 weights are read, and by the converter to int8."""
    source, adapter, cache = hf_checkpoint("gqa"), tmp_path / "adapter", tmp_path / "cache"
    options = {"target_modules": ["embed_tokens", "q_proj", "fc1"], "modules_to_save": ["multi_modal_projector"]}
    peft_adapter(peft, reference, adapter, **options, trainable_token_indices={"lm_head": [3, 301]})
    load = Qwen2AudioForConditionalGeneration.from_pretrained
    merged = load(source, adapter=adapter, cache_dir=cache)
    convert(source, tmp_path / "orbax", adapter=adapter)
    for path, array in flatten_dict(load(tmp_path / "orbax").params).items():
        np.testing.assert_allclose(array, flatten_dict(merged.params)[path], rtol=0, atol=1e-6)
    small = load(source, adapter=adapter, cache_dir=cache, weights_dtype="int8")
    convert(source, tmp_path / "int8", adapter=adapter, dtype="int8")
    for path, array in flatten_dict(load(tmp_path / "int8").params).items():
        other = np.asarray(flatten_dict(small.params)[path], np.float32)
        np.testing.assert_allclose(
            np.asarray(array, np.float32), other, rtol=0, atol=1 if array.dtype == np.int8 else 1e-6
        )
    assert verify(source, tmp_path / "orbax", adapter=adapter) == []


def test_what_parts_tied_embeddings_from_their_head_is_refused(peft, reference, load, tmp_path):
    peft_adapter(peft, reference, tmp_path, name="tied", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="head is its embeddings, which the adapter would part"):
        load_adapter(tmp_path, config=load("tied").config)


def test_gradients_equal_pefts(peft, reference, load, tmp_path):
    import torch

    theirs = peft_adapter(peft, reference, tmp_path, target_modules=["linear", "lm_head", *LINEARS])
    inputs, labels = examples("gqa", SHORT)
    for key, value in theirs.named_parameters():
        value.requires_grad_("lora_" in key)
    loss = theirs(**as_torch(inputs), labels=torch.from_numpy(labels)).loss
    loss.backward()
    expected = {
        key.replace(".default", ""): value.grad.numpy() for key, value in theirs.named_parameters() if "lora_" in key
    }
    model = load("gqa")
    adapter, scale = load_adapter(tmp_path, config=model.config)
    compute = jax.value_and_grad(lora_loss(model.config, batch_of("gqa"), scale=scale, remat="layers"))
    ours, gradient = jax.jit(compute)(adapter, model.params)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    # The file's names again, through the same table.
    settings = settings_of(("all-linear", "lm_head"), rank=3)
    save_adapter(tmp_path / "gradient", gradient, settings=settings, config=model.config, base_model="")
    found = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-4, key


def test_from_pretrained_merges_pefts_adapter(peft, reference, hf_checkpoint, load, tmp_path):
    theirs = peft_adapter(peft, reference, tmp_path / "adapter", target_modules="all-linear")
    inputs = random_inputs("gqa")
    model = Qwen2AudioForConditionalGeneration.from_pretrained(
        hf_checkpoint("gqa"), adapter=tmp_path / "adapter", cache_dir=tmp_path
    )
    assert_as_close_as_the_reference(logits(model, model.params, inputs), theirs, peft_logits(inputs))
