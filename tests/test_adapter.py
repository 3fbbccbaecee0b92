"""Adapter files: names, what is refused, `from_pretrained(adapter=)` and `--adapter`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import LINEARS, config_of, random_adapter, settings_of
from flax.traverse_util import flatten_dict, unflatten_dict
from hf_layout import write_hf_checkpoint
from judge import relative_error
from prompts import random_inputs
from safetensors.numpy import load_file, save_file

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.checkpoint.adapter import find_adapter, load_adapter, save_adapter
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.model.kernel_layout import KERNEL, TURNED
from qwen2audio_jax.model.lora import merge_adapter_in_place, with_adapter
from qwen2audio_jax.source import resolve_checkpoint


@pytest.fixture
def saved(tmp_path):
    """An adapter of every linear layer in a folder, and its tree."""
    settings = settings_of()
    adapter = random_adapter("gqa", settings)
    save_adapter(tmp_path / "adapter", adapter, settings=settings, config=config_of("gqa"), base_model="owner/base")
    return tmp_path / "adapter", adapter


def rewrite(folder, change):
    """Change the tensors of an adapter by name."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def reconfigure(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_names_are_pefts(saved):
    folder, adapter = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model"
    np.testing.assert_array_equal(
        tensors[f"{prefix}.language_model.layers.1.self_attn.q_proj.lora_A.weight"],
        adapter["decoder"]["layers"]["1"]["self_attn"]["q_proj"]["lora_a"].T,
    )
    assert tensors[f"{prefix}.audio_tower.layers.2.fc1.lora_B.weight"].shape == (56, 3)
    assert {
        f"{prefix}.multi_modal_projector.linear.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
        f"{prefix}.audio_tower.layers.0.self_attn.out_proj.lora_A.weight",
    } <= set(tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(["linear", "lm_head", *LINEARS])
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 4, "owner/base")


OLD_NAMES = (
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.lm_head.", "base_model.model.language_model.lm_head."),
    ("base_model.model.model.", "base_model.model."),
)


def old_name(name):
    for new, old in OLD_NAMES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def test_names_of_older_releases(saved):
    folder, adapter = saved
    rewrite(folder, lambda tensors: {old_name(name): value for name, value in tensors.items()})
    assert "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight" in load_file(
        folder / "adapter_model.safetensors"
    )
    found, scale = load_adapter(folder, config=config_of("gqa"))
    assert scale == pytest.approx(4 / 3)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, (4, 2)], ids=["one device", "4x2"])
def test_from_pretrained_merges(saved, mesh, dtype, tmp_path):
    folder, adapter = saved
    write_hf_checkpoint(tmp_path / "hf", "gqa")
    mesh = mesh and make_mesh(data=mesh[0], model=mesh[1])
    options = {"cache_dir": tmp_path / "cache", "dtype": dtype, "mesh": mesh}
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "hf", adapter=folder, **options)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "hf", **options)
    assert jax.tree.map(lambda x: (x.sharding, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.sharding, x.dtype), dict(plain.params)
    )
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    for path, before in flatten_dict(dict(plain.params)).items():
        after = np.asarray(flatten_dict(model.params)[path], np.float32)
        before = np.array(before, np.float32)
        pair = flatten_dict(adapter, is_leaf=lambda _, node: "lora_a" in node).get(path[:-1])
        if path[-1] in (KERNEL, TURNED) and pair is not None:
            added = 4 / 3 * pair["lora_a"] @ pair["lora_b"]
            kernel = before if path[-1] == KERNEL else before.T
            kernel[:, : added.shape[1]] += added
        np.testing.assert_allclose(after, before, atol=tolerance * np.abs(before).max(), rtol=0)
    if dtype == "float32":  # and both compute the same, the head's padded vocabulary included
        inputs = random_inputs("gqa")
        params = with_adapter(plain.params, adapter, scale=4 / 3)
        beside = Qwen2AudioForConditionalGeneration(plain.config, params, mesh=mesh)
        assert relative_error(model(**inputs).logits, beside(**inputs).logits) < 1e-5


def test_merging_in_place_gives_the_old_weights_away():
    params = {"l": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    adapter = {"l": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 5))}}
    old = params["l"]["kernel"]
    merged = merge_adapter_in_place(params, adapter, scale=0.5)
    np.testing.assert_array_equal(merged["l"]["kernel"], [[2, 2, 2, 2, 2, 1]] * 4)
    assert merged["l"]["bias"] is params["l"]["bias"]
    assert old.is_deleted()


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _without(t, Q), r"missing lora_A of model.language_model.layers.0.self_attn.q_proj"),
        (lambda t: {k: v for k, v in t.items() if "fc1" not in k}, r"missing audio_tower.layers.2.fc1: adapter_config"),
        (lambda t: {**t, Q: t[Q][:2]}, r"misshapen base.*layers.0.self_attn.q_proj.lora_A.weight: stored \(2, 48\)"),
        (lambda t: {**t, Q: t[Q].astype(np.float64)}, "q_proj.lora_A.weight is stored as F64"),
        (lambda t: {**t, Q.replace("layers.0", "layers.7"): t[Q]}, "unexpected .*layers.7.*no such linear layer"),
        (lambda t: {**t, old_name(Q): t[Q]}, "duplicate .*q_proj.lora_A.weight: the same as base_model"),
        (
            lambda t: {**t, "base_model.model.lm_head.base_layer.weight": t[Q]},
            r"misshapen base_model.model.lm_head.base_layer.weight: stored \(3, 48\)",
        ),
        (lambda t: {**t, Q.replace("lora_A", "lora_magnitude_vector"): t[Q]}, "unexpected .*lora_magnitude_vector"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    folder, _ = saved
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, config=config_of("gqa"))


def test_every_problem_is_listed(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load_adapter(folder, config=config_of("mels80"))
    assert str(error.value).count("misshapen") > 40
    assert "missing audio_tower.layers.3.fc1" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type is "LOHA", not LORA'),
        ({"use_dora": True}, "use_dora is true, which is not supported"),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "missing lm_head: .* modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"trainable_token_indices": [3]}, "missing trainable_tokens_delta"),
        ({"target_parameters": ["x"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is"),
        ({"something_new": 3}, "something_new is 3, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"r": "8"}, 'r is "8"; it must be a whole number above 0'),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is null; it must be a number above 0"),
        ({"rank_pattern": {"^model.*q_proj": 4}}, "rank_pattern has the key .* no expressions"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern.q_proj is true"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; it must map"),
        ({"modules_to_save": True}, "modules_to_save in adapter_config.json is true; it must be a list"),
        ({"modules_to_save": [1]}, r"modules_to_save in adapter_config.json is \[1\]; it must be a list"),
        ({"use_rslora": "false"}, 'use_rslora is "false"; it must be true or false'),
    ],
)
def test_kinds_of_adapters_that_are_refused(saved, values, message):
    folder, _ = saved
    reconfigure(folder, **values)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, config=config_of("gqa"))


@pytest.mark.parametrize(
    "notes",
    [
        {"unsloth_version": "2026.4.2", "unsloth_fixed": True},
        {"swift_version": "3.8", "_commit_hash": "0123", "author": "x"},
        {"llamafactory_version": "0.9", "dataset": ["mine"]},
        {"peft_version": "0.19.0", "trl_version": "0.25", "license": "mit"},
        {"use_qalora": False, "arrow_config": None, "ensure_weight_tying": False, "modules_to_save": []},
    ],
    ids=lambda notes: next(iter(notes)),
)
def test_notes_of_other_tools_change_nothing(saved, notes):
    folder, adapter = saved
    reconfigure(folder, **notes)
    loaded, scale = load_adapter(folder, config=config_of("gqa"))
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert scale == load_adapter(folder, config=config_of("gqa"))[1]


def test_an_adapter_where_a_model_is_asked_for(saved, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds an adapter \(adapter_config.json\) and no model; .*adapter= \(--adapter\)"
    ):
        resolve_checkpoint(saved[0], cache_dir=tmp_path / "cache")


def test_folders_that_hold_no_adapter(saved, tmp_path, capsys):
    folder, _ = saved
    config = config_of("gqa")
    with pytest.raises(ValueError, match=r"holds no adapter_config.json; give a folder that PEFT's"):
        load_adapter(tmp_path, config=config)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors.*copy it again"):
        load_adapter(folder, config=config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors; copy"):
        load_adapter(folder, config=config)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"adapter_model.bin is pickled, which is never read"):
        load_adapter(folder, config=config)
    (tmp_path / "outside").write_bytes(whole)
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link to outside its folder"):
        load_adapter(folder, config=config)
    write_hf_checkpoint(tmp_path / "hf", "gqa")
    command = ["generate", "--model", str(tmp_path / "hf"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--adapter", str(tmp_path / "nowhere" / "at" / "all"), "Hello"]) == 2
    assert "no such adapter folder, nor a hub id" in capsys.readouterr().err


def test_a_hub_id_names_an_adapter(saved, monkeypatch):
    folder, adapter = saved
    asked = []

    def download(repo_id, *, revision, patterns):
        asked.append((repo_id, *patterns))
        return folder

    monkeypatch.setattr("qwen2audio_jax.storage.hub.download", download)
    found, _ = load_adapter(find_adapter("owner/name"), config=config_of("gqa"))
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    assert asked == [("owner/name", "adapter_config.json", "adapter_model.safetensors")]


def test_the_command_takes_an_adapter(saved, tmp_path, capsys):
    folder, _ = saved
    write_hf_checkpoint(tmp_path / "hf", "gqa")
    command = ["generate", "--model", str(tmp_path / "hf"), "--cache-dir", str(tmp_path / "cache")]
    command += ["--json", "--max-new-tokens", "6", "Hello"]
    answers = []
    for more in ([], ["--adapter", str(folder)]):
        assert main([*command, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["ids"])
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat: {}, "the adapter holds nothing"),
        (lambda flat: dict(list(flat.items())[:1]), "half a pair"),
        (lambda flat: {**flat, ("encoder", "conv1", "lora_a"): np.zeros((1, 1))}, "encoder/conv1/lora_a"),
        (lambda flat: {path: value[:2] for path, value in flat.items()}, r"lora_a has shape \(2, 3\); \(48, 3\) is"),
    ],
)
def test_adapters_that_cannot_be_saved(tmp_path, change, message):
    settings = settings_of(("decoder.q_proj",))
    adapter = unflatten_dict(change(flatten_dict(random_adapter("gqa", settings))))
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path / "out", adapter, settings=settings, config=config_of("gqa"), base_model="")
    assert not (tmp_path / "out").exists()


def test_saving_replaces_an_adapter_whole(saved, monkeypatch):
    folder, _ = saved
    settings = settings_of(("decoder.q_proj",), rank=2)
    adapter = random_adapter("gqa", settings, seed=4)
    (folder / "README.md").write_text("mine")

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qwen2audio_jax.checkpoint.adapter._write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            save_adapter(folder, adapter, settings=settings, config=config_of("gqa"), base_model="")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_model.safetensors"]
    save_adapter(folder, adapter, settings=settings, config=config_of("gqa"), base_model="")
    found, scale = load_adapter(folder, config=config_of("gqa"))
    assert scale == 2.0
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
