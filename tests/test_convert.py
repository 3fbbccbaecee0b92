"""The converter: names, layouts, bytes, refusals, and leftovers of a failed or killed conversion."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hf_layout
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint import bounded_pool, hf_folder, mapping, reader, safetensors_file, writer
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, to_orbax, verify
from qwen2audio_jax.model.qwen2_audio import parameter_specs

ROOT = Path(__file__).resolve().parent.parent


def memory_gb(tensor_bytes: int) -> float:
    """The bound that leaves so much to tensors: a tiny model passes through in many groups."""
    return (bounded_pool._BASE_BYTES + 2 * tensor_bytes + 1) / 1e9


def restore(path) -> dict[str, np.ndarray]:
    specs = parameter_specs(Qwen2AudioConfig.from_pretrained(path))
    return {
        key: np.asarray(value) for key, value in flatten_dict(reader.restore_params(path, specs=specs), sep="/").items()
    }


def expected_parameters(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each parameter, cut by hand from the stored tensors: independent of the table in convert/mapping."""
    result = {}
    for name, value in tensors.items():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "lm_head":
            result["decoder/lm_head/kernel"] = value.transpose()
            continue
        if parts[0] == "multi_modal_projector":
            result["projector/" + ("kernel" if parts[-1] == "weight" else "bias")] = value.transpose()
            continue
        part = {"audio_tower": "encoder", "language_model": "decoder"}[parts[0]]
        module, kind = parts[-2], parts[-1]
        if module.startswith("conv"):
            leaf, array = (kind, value) if kind == "bias" else ("kernel", np.moveaxis(value, (0, 1, 2), (2, 1, 0)))
        elif module.startswith("embed"):
            leaf, array = "embedding", value
        elif "norm" in module:
            leaf, array = ("bias" if kind == "bias" else "scale"), value
        elif kind == "bias":
            leaf, array = "bias", value
        else:
            leaf, array = "kernel", value.transpose()
        result["/".join([part, *parts[1:-1], leaf])] = array
    return result


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(
    ("naming", "dtype", "shards"), [("new", "float32", 1), ("old", "bfloat16", 3), ("base_model", "float16", 2)]
)
def test_every_tensor_keeps_its_bytes(tmp_path, name, naming, dtype, shards):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", name, naming=naming, dtype=dtype, shards=shards)
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert_same(restore(tmp_path / "orbax"), expected_parameters(tensors))
    assert Qwen2AudioConfig.from_pretrained(tmp_path / "orbax").dtype == dtype
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "orbax" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_checkpoint_saved_by_the_reference(tmp_path, reference, hf_checkpoint, name):
    state = {key: value.numpy() for key, value in reference(name).state_dict().items()}
    if tiny.CONFIGS[name]["text_config"].get("tie_word_embeddings"):
        del state["lm_head.weight"]
    convert(hf_checkpoint(name), tmp_path / "orbax")
    assert_same(restore(tmp_path / "orbax"), expected_parameters(state))


@pytest.mark.parametrize("naming", hf_layout.NAMINGS)
def test_reference_shards_names_of_other_releases_and_a_sparse_config(tmp_path, reference, hf_checkpoint, naming):
    """What transformers writes in shards; the same under each release's names, with a config.json of few keys."""
    model = reference("gqa")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "a")
    tensors = {hf_layout.renamed(name, naming): value.numpy() for name, value in model.state_dict().items()}
    hf_layout.write_tensors(tmp_path / "other", tensors)
    config = json.loads((hf_checkpoint("gqa") / "config.json").read_text())
    kept = ("model_type", "audio_config", "text_config", "audio_token_index", "audio_token_id")
    sparse = {key: config[key] for key in kept if key in config}
    sparse["text_config"].pop("hidden_act")
    (tmp_path / "other" / "config.json").write_text(json.dumps(sparse))
    convert(tmp_path / "other", tmp_path / "b")
    assert_same(restore(tmp_path / "b"), restore(tmp_path / "a"))


def test_cast(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
    for dtype in ("bfloat16", "float16"):
        convert(tmp_path / "hf", tmp_path / dtype, dtype=dtype)
        cast = {key: value.astype(dtype) for key, value in tensors.items()}
        assert_same(restore(tmp_path / dtype), expected_parameters(cast))
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype


def test_dtype_of_the_weights_is_recorded_where_the_config_states_none(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", dtype="bfloat16")
    edit_config(tmp_path / "hf", lambda config: (config.pop("torch_dtype"), config["text_config"].pop("torch_dtype")))
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert Qwen2AudioConfig.from_pretrained(tmp_path / "orbax").dtype == "bfloat16"


def test_long_tensors_pass_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(writer, "CHUNK_BYTES", 512)
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "mels80", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "orbax", memory_gb=memory_gb(200_000))
    assert_same(restore(tmp_path / "orbax"), expected_parameters(tensors))


def test_progress_counts_every_byte(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    seen = []
    convert(tmp_path / "hf", tmp_path / "orbax", on_progress=lambda done, total: seen.append((done, total)))
    total = sum(value.nbytes for value in tensors.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_table_covers_every_parameter_once():
    tensors = [row[0] for row in mapping.TABLE]
    parameters = [row[1] for row in mapping.TABLE]
    assert len(set(tensors)) == len(tensors)
    assert len(set(parameters)) == len(parameters)
    with pytest.raises(LookupError, match="no row for the parameter encoder/new"):
        mapping.expected_tensors({"encoder/new": (1,)})


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("base_model.model.language_model.model.norm.weight", "language_model.norm.weight"),
        ("base_model.model.model.language_model.norm.weight", "language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("base_model.lm_head.weight", "lm_head.weight"),
        ("model.audio_tower.conv1.bias", "audio_tower.conv1.bias"),
        ("other.model.x", "other.model.x"),
    ],
)
def test_canonical_name(stored, canonical):
    assert mapping.canonical_name(stored) == canonical


# What is refused, and in what words.


def edit_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(src, dst, *, match, **options) -> None:
    """Converting fails with a message, and nothing is left at `dst`."""
    with pytest.raises(ValueError, match=match):
        convert(src, dst, **options)
    assert not Path(dst).exists()


def test_all_mismatches_are_listed_together(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
    del tensors["model.audio_tower.conv1.bias"], tensors["model.language_model.norm.weight"]
    tensors["model.language_model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 80), np.float32)
    tensors["model.language_model.layers.7.input_layernorm.weight"] = np.ones(48, np.float32)
    tensors["language_model.lm_head.weight"] = tensors["lm_head.weight"]
    tensors["model.audio_tower.conv2.bias"] = np.zeros(40, np.int32)
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=r"do not match config\.json") as caught:
        convert(tmp_path / "hf", tmp_path / "orbax")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(lines) == 6
    text = "\n".join(lines)
    assert "missing audio_tower.conv1.bias (40,)" in text
    assert "missing language_model.norm.weight (48,)" in text
    assert (
        "misshapen model.language_model.layers.1.mlp.up_proj.weight: stored (48, 80), the configuration needs (80, 48)"
        in text
    )
    assert "unexpected model.language_model.layers.7.input_layernorm.weight (48,)" in text
    assert re.search("duplicate lm_head.weight: stored as .* and as ", text)
    assert "conv2.bias is stored as I32; weights are read from BF16, F16, F32" in text
    assert not (tmp_path / "orbax").exists()


def test_known_buffers_are_passed_over(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", naming="old")
    stored = {hf_layout.renamed(name, "old"): value for name, value in tensors.items()}
    stored["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(7, np.float32)
    stored["language_model.model.rotary_emb.inv_freq"] = np.zeros(7, np.float32)
    hf_layout.write_tensors(tmp_path / "hf", stored)
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert reader.is_checkpoint(tmp_path / "orbax")


@pytest.mark.smoke
def test_tied_head(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    hf_layout.write_tensors(tmp_path / "hf", tensors | {"lm_head.weight": embedding})
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert "decoder/lm_head/kernel" not in restore(tmp_path / "orbax")
    hf_layout.write_tensors(tmp_path / "hf", tensors | {"lm_head.weight": embedding * np.float32(1.001)})
    refused(tmp_path / "hf", tmp_path / "no", match="lm_head.weight differs from .*tie_word_embeddings")
    hf_layout.write_tensors(tmp_path / "hf", tensors | {"lm_head.weight": embedding[:-1].copy()})
    refused(tmp_path / "hf", tmp_path / "no", match=r"misshapen lm_head.weight: stored \(335, 56\), .* \(336, 56\)")


def test_untied_head_must_be_there(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
    del tensors["lm_head.weight"]
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    refused(tmp_path / "hf", tmp_path / "no", match="missing lm_head.weight .* does not tie it")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", hf_layout.DTYPES)
def test_not_finite(tmp_path, value, dtype):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", dtype=dtype)
    tensors["model.audio_tower.layers.0.fc1.weight"][5, 3] = value
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    refused(tmp_path / "hf", tmp_path / "no", match="fc1.weight holds NaN or Inf; .*--allow-non-finite")
    assert command.main([str(tmp_path / "hf"), str(tmp_path / "orbax"), "--allow-non-finite"]) == 0
    assert_same(restore(tmp_path / "orbax"), expected_parameters(tensors))


def test_cast_that_overflows(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    tensors["model.audio_tower.conv1.bias"][0] = 1e5
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    refused(
        tmp_path / "hf",
        tmp_path / "no",
        match="conv1.bias after the cast from F32 to float16 holds NaN or Inf",
        dtype="float16",
    )


def test_source_that_is_none(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    refused(tmp_path / "none", tmp_path / "no", match="no such folder, nor a hub id")
    refused(tmp_path / "hf", tmp_path / "no", match="revision 'main' goes with a hub id", revision="main")
    refused(
        tmp_path / "hf", tmp_path / "no", match="must be one of keep, float32, bfloat16, float16, int8", dtype="int4"
    )
    refused(tmp_path / "hf", tmp_path / "no", match="must be 'refuse' or 'allow'", non_finite="drop")
    refused(tmp_path / "hf", f"s3://{tmp_path}", match="is no URL of a bucket")
    shutil.copytree(tmp_path / "hf", tmp_path / "both")
    (tmp_path / "both" / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path / "both", tmp_path / "no", match="holds both")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused(tmp_path / "hf", tmp_path / "no", match=r"holds neither model\.safetensors nor")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path / "hf", tmp_path / "no", match=r"pickled \(pytorch_model.bin\).*safe_serialization=True")
    (tmp_path / "hf" / "config.json").unlink()
    refused(tmp_path / "hf", tmp_path / "no", match=r"config\.json: no such file")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "x\0.safetensors",
    ],
)
def test_index_that_leads_out(tmp_path, name):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    shutil.move(tmp_path / "hf" / "model.safetensors", tmp_path / "x.safetensors")  # valid, and never to be read
    write_index(tmp_path / "hf", {"lm_head.weight": name})
    refused(tmp_path / "hf", tmp_path / "no", match="only plain names of files in the folder itself are read")


@pytest.mark.parametrize("name", [7, None, ["x.safetensors"], "", "..", "x.bin"])
def test_index_with_no_file_name(tmp_path, name):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", shards=2)
    write_index(tmp_path / "hf", {"lm_head.weight": name})
    refused(tmp_path / "hf", tmp_path / "no", match="it must be the name of a .safetensors file")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_malformed_index(tmp_path, index):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", shards=2)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
    refused(tmp_path / "hf", tmp_path / "no", match=r"index\.json")


def test_index_and_files_that_disagree(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", shards=2)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    moved, unlisted = [name for name, file in index.items() if file == first][:2]
    write_index(
        tmp_path / "hf", {name: second if name == moved else file for name, file in index.items() if name != unlisted}
    )
    with pytest.raises(
        ValueError, match=f"missing {moved}: model.safetensors.index.json puts it in {second}"
    ) as caught:
        convert(tmp_path / "hf", tmp_path / "no")
    assert f"unexpected {unlisted}: in {first}, but not in model.safetensors.index.json" in str(caught.value)
    write_index(tmp_path / "hf", index)
    shutil.copy(tmp_path / "hf" / first, tmp_path / "hf" / "third.safetensors")
    write_index(tmp_path / "hf", index | {"extra": "third.safetensors"})
    refused(tmp_path / "hf", tmp_path / "no", match=f"duplicate {moved}: in 2 files")
    (tmp_path / "hf" / "third.safetensors").unlink()
    refused(tmp_path / "hf", tmp_path / "no", match=r"third\.safetensors: no such file")
    assert tensors


def test_an_index_of_the_single_file_beside_it(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    write_index(tmp_path / "hf", dict.fromkeys(tensors, "model.safetensors"))
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert verify(tmp_path / "hf", tmp_path / "orbax") == []


def link_all(source, folder):
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)


def link_into_a_subfolder(real, place):
    shutil.copytree(real, place / "linked" / "weights")
    for file in (place / "linked" / "weights").iterdir():
        (place / "linked" / f"{file.name}").symlink_to(Path("weights", file.name))
    return place / "linked"


def link_to_another_folder(real, place):
    link_all(real, place / "linked")
    return place / "linked"


def snapshot_of_a_hub_cache(real, place):
    repo = place / "models--a--b"
    shutil.copytree(real, repo / "blobs")
    for file in real.iterdir():
        (repo / "blobs" / file.name).rename(repo / "blobs" / f"sha-{file.name}")
    (repo / "snapshots" / "0123").mkdir(parents=True)
    for file in real.iterdir():
        (repo / "snapshots" / "0123" / file.name).symlink_to(Path("..", "..", "blobs", f"sha-{file.name}"))
    return repo / "snapshots" / "0123"


def folder_of_links_into_a_hub_cache(real, place):
    """As huggingface_hub made them for local_dir= before 0.23."""
    snapshot = snapshot_of_a_hub_cache(real, place)
    (place / "local").mkdir()
    for file in snapshot.iterdir():
        (place / "local" / file.name).symlink_to(file.resolve())
    return place / "local"


def link_to_the_folder(real, place):
    (place / "linked").symlink_to(snapshot_of_a_hub_cache(real, place))
    return place / "linked"


def link_of_links(real, place):
    link_all(real, place / "first")
    link_all(place / "first", place / "linked")
    return place / "linked"


@pytest.mark.parametrize(
    "linked",
    [
        link_into_a_subfolder,
        link_to_another_folder,
        snapshot_of_a_hub_cache,
        folder_of_links_into_a_hub_cache,
        link_to_the_folder,
        link_of_links,
    ],
)
def test_links_that_are_followed(tmp_path, linked):
    hf_layout.write_hf_checkpoint(tmp_path / "real", "tied", shards=2)
    convert(linked(tmp_path / "real", tmp_path), tmp_path / "orbax")
    assert verify(tmp_path / "real", tmp_path / "orbax") == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_to_files_of_another_name_are_refused(tmp_path, name):
    """What a checkpoint from a stranger could link to: anything on this machine, but not under a name of its own."""
    folder = tmp_path / "hf"
    hf_layout.write_hf_checkpoint(folder, "tied")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    refused(folder, tmp_path / "no", match=rf"{re.escape(name)}: is a link to outside its folder .*another name")


def test_an_index_cannot_choose_a_link_out_of_the_folder(tmp_path):
    folder = tmp_path / "hf"
    hf_layout.write_hf_checkpoint(folder, "tied", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first = sorted(set(index.values()))[0]
    for outside in ("other.safetensors", "sub/other.safetensors", "../other.safetensors"):
        write_index(folder, {name: outside if file == first else file for name, file in index.items()})
        (tmp_path / "other.safetensors").write_bytes((folder / first).read_bytes())
        if "/" not in outside and not (folder / outside).exists():
            (folder / outside).symlink_to(tmp_path / "other.safetensors")
        refused(folder, tmp_path / "no", match="is a link to outside its folder|only plain names of files")


def test_named_pipe_does_not_block(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    (tmp_path / "hf" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf" / "model.safetensors")
    refused(tmp_path / "hf", tmp_path / "no", match="is not a regular file")
    with pytest.raises(ValueError, match="is not a regular file"):
        safetensors_file.SafetensorsFile(tmp_path / "hf" / "model.safetensors")


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BIG = 1 << 62


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "does not begin with '{'"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is not JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"a":' * 100_000, b"", "not valid JSON"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "the name 'dtype' stands twice"),
        ({"a": 1}, b"", "must state dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, bytes(8), "and nothing else"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map names to strings"),
        ({"a": entry(dtype="F4")}, bytes(8), "unknown dtype 'F4'"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "unknown dtype"),
        ({"a": entry(shape=(-2,))}, bytes(8), "has shape"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "has shape"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "has shape"),
        ({"a": entry(shape=(1 << 64,))}, bytes(8), "has shape"),
        ({"a": entry(shape=(BIG, BIG, 4))}, bytes(8), "takes .* bytes, but data_offsets"),
        ({"a": entry(offsets=(0, 8, 9))}, bytes(8), "data_offsets"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "takes 8 bytes"),
        ({"a": entry(shape=(3,))}, bytes(8), "takes 12 bytes, but"),
        ({"a": entry(offsets=(4, 12))}, bytes(12), "leaves a gap before it: it begins at 4"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' overlaps the one before"),
        ({"a": entry()}, bytes(9), "the tensors end at byte"),
        ({"a": entry()}, bytes(7), "the tensors end at byte"),
    ],
)
def test_header_that_is_wrong(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        safetensors_file.SafetensorsFile(header_file(tmp_path / "x.safetensors", header, data))


def test_header_lengths(tmp_path):
    path = tmp_path / "x.safetensors"
    for content, message in (
        (b"abc", "too few for a header"),
        ((10).to_bytes(8, "little") + b"{}", "states a header of 10 bytes, but the file has 10"),
        ((10**8 + 1).to_bytes(8, "little") + b"{}", "at most 100000000 are read"),
        (bytes([255] * 8) + b"{}", "at most 100000000 are read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            safetensors_file.SafetensorsFile(path)


def test_mutated_files_never_crash(tmp_path):
    """Any damage to a header is a ValueError or leaves tensors that lie within the file."""
    source = tmp_path / "source.safetensors"
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, ml_dtypes.bfloat16)}
    from safetensors.numpy import save_file

    save_file(values, source)
    content = source.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    path = tmp_path / "mutated.safetensors"
    refusals = 0
    for _ in range(1500):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(length)
            kind = rng.randrange(3)
            if kind == 0:
                mutated[place] = rng.choice(b'0123456789[]{}",:-eE \x00\xff')
            elif kind == 1:
                del mutated[place]
            else:
                mutated.insert(place, rng.choice(b'0123456789[]{}",'))
        path.write_bytes(mutated)
        try:
            with safetensors_file.SafetensorsFile(path) as file:
                for name, each in file.entries.items():
                    assert each.offset + each.nbytes <= len(mutated)
                    if each.dtype in safetensors_file.DTYPES:
                        assert sum(block.nbytes for _, block in file.blocks(name)) == each.nbytes
        except ValueError:
            refusals += 1
    assert refusals > 1000


def test_file_that_shrinks_while_read(tmp_path):
    path = header_file(tmp_path / "x.safetensors", {"a": entry()}, bytes(8))
    with safetensors_file.SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(ValueError, match="within a tensor; copy the file again"):
            list(file.blocks("a"))


# What is left behind.


def test_destinations(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert(tmp_path / "hf", tmp_path / "orbax", dtype="float16")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and not an unfinished checkpoint"):
        convert(tmp_path / "hf", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file"):
        convert(tmp_path / "hf", tmp_path / "mine" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "hf", tmp_path / "empty")
    assert reader.is_checkpoint(tmp_path / "empty")


def test_full_disk_is_seen_before(tmp_path, monkeypatch):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(tmp_path / "hf", tmp_path / "deep" / "no", match=r"needs 0\.00 GB and the disk has 0\.00 GB free")
    assert not (tmp_path / "deep").exists()


# The command.


def test_command(tmp_path, capfd):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    assert command.main([str(tmp_path / "hf"), str(tmp_path / "orbax"), "--dtype", "bfloat16"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(f"{tmp_path / 'orbax'}: converted {len(tensors)} tensors, [0-9.]+kB in 00:\\d\\d, .*B/s\n$", err)
    cast = {key: value.astype("bfloat16") for key, value in tensors.items()}
    assert_same(restore(tmp_path / "orbax"), expected_parameters(cast))


def test_command_refuses_in_one_line(tmp_path, capfd):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    hf_layout.write_tensors(tmp_path / "hf", dict(list(tensors.items())[3:]))
    assert command.main([str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 2
    line = capfd.readouterr().err.strip("\r\n").split("\r")[-1]
    assert "\n" not in line
    assert line.count("missing ") == 3
    with pytest.raises(SystemExit) as caught:
        command.main([str(tmp_path / "hf"), str(tmp_path / "orbax"), "--dtype", "int4"])
    assert caught.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_command_that_fails(tmp_path, capfd, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(to_orbax, "convert", fail)
    assert command.main([str(tmp_path), str(tmp_path / "orbax")]) == 1
    assert "failed: no space left" in capfd.readouterr().err


def test_module_in_a_checkout(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", naming="old", dtype="bfloat16")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "convert", tmp_path / "hf", tmp_path / "orbax"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "WARNING" not in run.stderr
    assert reader.is_checkpoint(tmp_path / "orbax")


def test_settings_are_plain_files(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "hf" / "merges.txt").symlink_to(tmp_path / "secret")
    refused(tmp_path / "hf", tmp_path / "no", match=r"merges\.txt: is a link to outside its folder")
    assert "merges.txt" in hf_folder.SETTINGS
