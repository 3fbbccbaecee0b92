"""Verification of a converted checkpoint: its manifest, its listing, and the comparison with its source."""

import hashlib
import json
import shutil

import hf_layout
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint import mapping, reader
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, inspect, verify
from qwen2audio_jax.model.qwen2_audio import parameter_specs


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_manifest_tells_where_every_parameter_comes_from(tmp_path, dtype):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", naming="old", dtype="bfloat16", shards=3)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=dtype)
    manifest = reader.read_manifest(tmp_path / "orbax")
    source = {"source": str(tmp_path / "hf"), "revision": None, "commit": None, "dtype": dtype, "non_finite": "refuse"}
    assert {**manifest["source"], "stamps": None} == {**source, "stamps": None}
    for name, (size, changed, _) in manifest["source"]["stamps"].items():
        status = (tmp_path / "hf" / name).stat()
        assert (size, changed) == (status.st_size, status.st_mtime_ns)
    assert len(manifest["source"]["stamps"]) == 3
    stored = {hf_layout.renamed(name, "old"): value for name, value in tensors.items()}
    rows = {parameter: transform for _, parameter, transform in mapping.TABLE}
    seen = set()
    for name, each in manifest["parameters"].items():
        origin = each["origin"]
        value = stored[origin["tensor"]]
        seen.add(origin["tensor"])
        assert origin == {
            "file": index[origin["tensor"]],
            "tensor": origin["tensor"],
            "shape": list(value.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        }
        kept = value if dtype == "keep" else value.astype(np.float16)
        reverse = rows["/".join("{n}" if part.isdigit() else part for part in name.split("/"))] == "reversed"
        parameter = np.ascontiguousarray(kept.transpose() if reverse else kept)
        assert each["sha256"] == hashlib.sha256(parameter.tobytes()).hexdigest()
        assert (each["shape"], each["dtype"]) == (list(parameter.shape), str(parameter.dtype))
    assert seen == stored.keys()
    assert manifest["totals"] == {
        "tensors": len(stored),
        "parameters": sum(value.size for value in stored.values()),
        "bytes": sum(value.nbytes for value in stored.values()),
    }


def test_inspect_lists_from_the_manifest_alone(tmp_path, capfd):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "params")
    contents = inspect(tmp_path / "orbax")
    assert contents["totals"]["parameters"] == sum(value.size for value in tensors.values())
    assert command.main(["inspect", str(tmp_path / "orbax")]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert len(lines) == len(tensors) + 1
    assert ["encoder/conv1/kernel", "3x128x24", "float32", "36864"] in [line.split() for line in lines]
    size = sum(value.nbytes for value in tensors.values())
    assert lines[-1] == f"{len(tensors)} tensors, {size // 4} parameters, {size} bytes"
    assert command.main(["inspect", str(tmp_path / "orbax"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == contents
    assert command.main(["inspect", str(tmp_path / "hf")]) == 2
    assert "holds no manifest.json" in capfd.readouterr().err


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(
    ("naming", "stored", "dtype"),
    [("old", "bfloat16", "keep"), ("new", "float32", "bfloat16"), ("new", "float16", "float32")],
)
def test_a_right_checkpoint_verifies(tmp_path, name, naming, stored, dtype):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", name, naming=naming, dtype=stored, shards=2)
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=dtype)
    seen = []
    differences = verify(
        tmp_path / "hf", tmp_path / "orbax", on_progress=lambda done, total: seen.append((done, total))
    )
    assert differences == []
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_head_stored_although_tied_and_non_finite_weights_verify(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    tensors["model.audio_tower.conv1.bias"][:2] = np.nan, -np.inf
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax", non_finite="allow")
    assert verify(tmp_path / "hf", tmp_path / "orbax") == []
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + np.float32(1)
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    (difference,) = verify(tmp_path / "hf", tmp_path / "orbax")
    assert difference.startswith("missing lm_head.weight: the checkpoint ties it")


def test_every_difference_is_named(tmp_path, capfd):
    """A source that is another one: a bit, a shape, a dtype changed, a tensor more, one less, other settings."""
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "orbax")
    changed = tensors["model.audio_tower.layers.1.fc2.weight"].view(np.uint16)
    changed[3, 5] ^= 1
    tensors["model.language_model.layers.9.input_layernorm.weight"] = np.ones(48, ml_dtypes.bfloat16)
    del tensors["model.audio_tower.conv1.bias"]
    tensors["model.audio_tower.conv2.bias"] = np.zeros(41, ml_dtypes.bfloat16)
    tensors["model.language_model.norm.weight"] = tensors["model.language_model.norm.weight"].astype(np.float32)
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    (tmp_path / "hf" / "generation_config.json").write_text("{}")
    (tmp_path / "hf" / "merges.txt").write_text("a b")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    expected = [
        "generation_config.json: differs from the source's",
        "missing merges.txt: the source has it, the checkpoint does not",
        "config.json: does not mean what the source's does",
        "missing language_model.layers.9.input_layernorm.weight (48,): the source has it, the checkpoint does not",
        "extra encoder/conv1/bias (40,): the source has no audio_tower.conv1.bias",
        "encoder/conv2/bias: stored (40,), so the source's should be (40,), but it is (41,)",
        "decoder/norm/scale: stored as bfloat16 from float32, but the manifest states no cast",
        "encoder/layers/1/fc2/kernel: 1 of 2240 values differ from the source's model.audio_tower.layers.1.fc2.weight",
        "encoder/layers/1/fc2/kernel: the source's model.audio_tower.layers.1.fc2.weight is not the one that was "
        "converted (sha256)",
    ]
    assert sorted(verify(tmp_path / "hf", tmp_path / "orbax")) == sorted(expected)
    assert command.main(["verify", str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 1
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == sorted(expected)
    assert err.endswith(f"9 differences from {tmp_path / 'hf'}\n")


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_one_flipped_bit_on_disk_is_noticed_and_its_parameter_named(tmp_path, dtype):
    """The bits of a parameter are searched in Orbax's files, where all but the smallest stand as they are."""
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "mels80")
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=dtype)
    specs = {
        name: np.dtype(each["dtype"]) for name, each in reader.read_manifest(tmp_path / "orbax")["parameters"].items()
    }
    config = Qwen2AudioConfig.from_pretrained(tmp_path / "orbax")
    tree = flatten_dict(reader.restore_params(tmp_path / "orbax", specs=parameter_specs(config)), sep="/")
    files = [path for path in (tmp_path / "orbax" / "params").rglob("*") if path.is_file()]
    flipped = 0
    for name in ("encoder/conv2/kernel", "decoder/layers/1/mlp/up_proj/kernel", "decoder/lm_head/kernel"):
        values = np.asarray(tree[name]).astype(specs[name])
        place, offset = next((path, at) for path in files if (at := path.read_bytes().find(values.tobytes())) >= 0)
        content = bytearray(place.read_bytes())
        content[offset + values.nbytes // 2] ^= 0x10
        place.write_bytes(content)
        (difference,) = verify(tmp_path / "hf", tmp_path / "orbax")
        assert difference.startswith(f"{name}: its bytes do not have the manifest's sha256")
        content[offset + values.nbytes // 2] ^= 0x10
        place.write_bytes(content)
        flipped += 1
    assert flipped == 3
    assert verify(tmp_path / "hf", tmp_path / "orbax") == []


def test_a_damaged_or_shortened_index_names_parameters(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    files = sorted((tmp_path / "orbax" / "params" / "state").rglob("manifest.ocdbt"), key=lambda path: len(path.parts))
    for content in (files[0].read_bytes()[:-1], files[0].read_bytes()[:40] + b"\xff" + files[0].read_bytes()[41:]):
        copy = tmp_path / f"copy{len(content)}"
        shutil.copytree(tmp_path / "orbax", copy)
        (copy / files[0].relative_to(tmp_path / "orbax")).write_bytes(content)
        differences = verify(tmp_path / "hf", copy)
        named = {difference.split(":")[0] for difference in differences}
        assert named >= reader.read_manifest(copy)["parameters"].keys()


def test_verify_refuses_what_it_cannot_compare(tmp_path, capfd):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    for src, dst, message in (
        (tmp_path / "none", tmp_path / "orbax", "no such folder, nor a hub id"),
        (tmp_path / "hf", tmp_path / "none", "no such folder; give a folder that `convert` wrote"),
        (tmp_path / "orbax", tmp_path / "orbax", "holds neither model.safetensors nor"),
    ):
        assert command.main(["verify", str(src), str(dst)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert message in err
        assert err.strip("\r\n").count("\n") == 0
    with pytest.raises(SystemExit) as caught:
        command.main(["verify", str(tmp_path)])
    assert caught.value.code == 2
    assert capfd.readouterr().err.startswith("python -m convert verify: ")
