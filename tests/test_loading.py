"""`from_pretrained`: accepted and refused arguments, and the encoder alone."""

import jax
import numpy as np
import pytest
from hf_layout import write_hf_checkpoint
from judge import relative_error
from prompts import random_inputs

from qwen2audio_jax import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("loading")
    write_hf_checkpoint(place / "hf", "gqa")
    return place


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2AudioForConditionalGeneration.from_pretrained(folder / "hf", cache_dir=folder / "cache")


def test_a_folder_is_converted_once(folder, model, capsys):
    again = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "hf", cache_dir=folder / "cache")
    assert "converting" not in capsys.readouterr().err
    (converted,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    direct = Qwen2AudioForConditionalGeneration.from_pretrained(converted)
    for other in (again, direct):
        assert other.config == model.config
        assert other.generation_config == model.generation_config
        jax.tree.map(np.testing.assert_array_equal, other.params, model.params)
    assert Qwen2AudioProcessor.from_pretrained(converted).audio_token_id == model.config.audio_token_index


def test_generation_defaults_come_from_the_checkpoint(folder, model, tmp_path):
    assert model.generation_config.eos_token_id == (302, 300)
    write_hf_checkpoint(tmp_path / "hf", "gqa")
    (tmp_path / "hf" / "generation_config.json").unlink()
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "hf", cache_dir=tmp_path)
    assert plain.generation_config.eos_token_id == (302,)
    assert not plain.generation_config.do_sample


@pytest.mark.parametrize("mesh", [None, (4, 2)], ids=["one device", "4x2"])
def test_the_encoder_alone(folder, model, mesh):
    """Only its own weights are read, and it hears what the whole model hears; 6 clips are padded to 8 on 8 devices."""
    mesh = mesh and make_mesh(data=mesh[0], model=mesh[1])
    encoder = Qwen2AudioEncoder.from_pretrained(folder / "hf", cache_dir=folder / "cache", mesh=mesh)
    assert set(encoder.params) == {"conv1", "conv2", "embed_positions", "layers", "layer_norm"}
    inputs = random_inputs("gqa")
    arguments = inputs["input_features"], inputs["feature_attention_mask"]
    alone, whole = encoder(*arguments), model.encode_audio(*arguments)
    assert alone.last_hidden_state.shape == whole.encoded.shape
    assert alone.lengths.tolist() == whole.lengths.tolist()
    for clip, length in enumerate(whole.lengths):
        assert relative_error(alone.last_hidden_state[clip, :length], whole.encoded[clip, :length]) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not one of"),
        ({"mesh": (1, 8)}, ValueError, "num_key_value_heads=4 does not divide by the mesh's model=8"),
        ({"revision": "main"}, ValueError, "revision"),
        ({"trust_remote_kode": True}, TypeError, "trust_remote_code"),
        ({"source": "no/such/folder"}, ValueError, "no/such/folder"),
    ],
)
def test_what_cannot_be_loaded(folder, change, error, message):
    options = {"source": folder / "hf", "cache_dir": folder / "cache", **change}
    if "mesh" in options:
        options["mesh"] = make_mesh(data=options["mesh"][0], model=options["mesh"][1])
    with pytest.raises(error, match=message):
        Qwen2AudioForConditionalGeneration.from_pretrained(options.pop("source"), **options)
    if "dtype" in change:
        with pytest.raises(error, match=message):
            Qwen2AudioEncoder.from_pretrained(folder / "hf", **change)
