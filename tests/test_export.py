"""Export to a Hugging Face folder: names, bytes, files, loading by transformers, and leftovers of a failure."""

import json
import os
import re

import hf_layout
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from qwen2audio_jax import embedded
from qwen2audio_jax.checkpoint import hf_folder, hf_writer, mapping, safetensors_writer, writer
from qwen2audio_jax.checkpoint.model_card import card_of_export, exported_card, weights_sha256
from qwen2audio_jax.checkpoint.reader import read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, export, verify
from qwen2audio_jax.model.qwen2_audio import init_params


def exported(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    assert sum(map(len, tensors)) == len({name for each in tensors for name in each})
    return {name: value for each in tensors for name, value in each.items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert actual[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize(("names", "naming", "dtype"), [("hub", "old", "bfloat16"), ("current", "new", "float16")])
def test_every_tensor_gets_its_bytes_back(tmp_path, name, names, naming, dtype):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", name, naming="new", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back", names=names)
    if tiny.CONFIGS[name]["text_config"].get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    assert_same(exported(tmp_path / "back"), {hf_layout.renamed(key, naming): value for key, value in tensors.items()})
    held = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == held | {"README.md"}
    for file in held - {"config.json", "model.safetensors"}:
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert verify(tmp_path / "back", tmp_path / "orbax") == []


def test_card(tmp_path):
    """By the manifest; or, where it came along, by the record of the training."""
    hf_layout.write_hf_checkpoint(tmp_path / "some-one", "tied", naming="new")
    for place, record in (("plain", None), ("trained", (embedded.model_folder() / "training.json").read_text())):
        if record is not None:
            (tmp_path / "some-one" / "training.json").write_text(record)
        convert(tmp_path / "some-one", tmp_path / f"{place}-orbax")
        export(tmp_path / f"{place}-orbax", tmp_path / place)
    plain, trained = ((tmp_path / place / "README.md").read_text() for place in ("plain", "trained"))
    manifest = read_manifest(tmp_path / "plain-orbax")
    assert "# Qwen2-Audio, exported from some-one" in plain
    assert f"`{weights_sha256(manifest)}`" in plain
    assert str(tmp_path) not in plain
    assert "model-index" not in plain
    assert trained == (embedded.model_folder() / "README.md").read_text()
    manifest["source"] |= {"source": "some-one/a_model", "commit": "c0ffee", "adapter": "/tmp/adapters/mine"}
    front = exported_card(manifest).split("---")[1]
    assert 'base_model: "some-one/a_model"\nbase_model_relation: finetune\n' in front
    assert card_of_export(manifest, b'{"another": "tool"}') == exported_card(manifest)
    hub = pytest.importorskip("huggingface_hub")
    scores = {
        (each.dataset_name, each.metric_type): each.metric_value for each in hub.ModelCard(trained).data.eval_results
    }
    assert scores["voices never trained on", "digit_error_rate"] == 0.0203
    assert hub.ModelCard(exported_card(manifest)).data.base_model == "some-one/a_model"


def test_shards_and_index(tmp_path, capfd):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", naming="old", dtype="bfloat16", shards=2)
    convert(tmp_path / "hf", tmp_path / "orbax")
    arguments = ["export", str(tmp_path / "orbax"), str(tmp_path / "back"), "--max-shard-size", "40KB"]
    assert command.main(arguments) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(f"{tmp_path / 'back'}: exported [0-9.]+kB in 00:\\d\\d, .*B/s\n$", err)
    index = json.loads((tmp_path / "back" / hf_folder.INDEX).read_text())
    tensors = exported(tmp_path / "back")
    assert_same(tensors, exported(tmp_path / "hf"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{k + 1:05}-of-{len(files):05}.safetensors" for k in range(len(files))]
    assert len(files) > 3
    for file in files:
        held = load_file(tmp_path / "back" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 40_000
    assert verify(tmp_path / "back", tmp_path / "orbax") == []
    convert(tmp_path / "back", tmp_path / "again")
    assert verify(tmp_path / "hf", tmp_path / "again") == []


@pytest.mark.parametrize("name", ["gqa", "tied"])
@pytest.mark.parametrize("names", mapping.NAMINGS)
def test_transformers_loads_it_and_gives_the_same_logits(tmp_path, reference, name, names):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_layout.write_hf_checkpoint(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back", names=names, max_shard_bytes=50_000)
    loaded, info = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    state, expected = loaded.state_dict(), reference(name).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    ids = torch.arange(17, dtype=torch.long)[None] * 3
    with torch.no_grad():
        ours = loaded.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        theirs = reference(name)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(ours, theirs)


def test_mixed_dtypes_are_aligned(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "mels80", dtype="bfloat16")
    tensors = {name: value.astype(np.float32) if name.endswith("bias") else value for name, value in tensors.items()}
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back", names="current")
    assert_same(exported(tmp_path / "back"), tensors)
    with hf_folder.open_weights(tmp_path / "back") as weights:
        for tensor in weights.tensors:
            assert tensor.entry.offset % (4 if tensor.entry.dtype == "F32" else 2) == 0


def test_trained_parameters_are_exported(tmp_path):
    """A checkpoint that no conversion wrote."""
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["base"])
    writer.save_params(tmp_path / "trained", jax.jit(lambda: init_params(config, seed=3))(), config=config)
    export(tmp_path / "trained", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "trained") == []


def test_names_are_undone_by_the_converter():
    for tensor, _, _ in mapping.TABLE:
        for naming in mapping.NAMINGS:
            assert mapping.canonical_name(mapping.released_name(tensor, naming=naming)) == tensor


def refused(*arguments: object, capfd, message: str) -> None:
    assert command.main(["export", *map(str, arguments)]) == 2
    line = capfd.readouterr().err.strip("\r\n").split("\r")[-1]
    assert message in line
    assert "\n" not in line


def test_refusals(tmp_path, capfd):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    orbax, new = tmp_path / "orbax", tmp_path / "new"
    refused(orbax, tmp_path / "mine", capfd=capfd, message="is not empty; choose a new or empty folder")
    refused(orbax, tmp_path / "mine" / "thesis.txt", capfd=capfd, message="is a file; choose a new or empty folder")
    refused(orbax, "memry://bucket/x", capfd=capfd, message="fsspec knows no scheme")
    refused(tmp_path / "hf", new, capfd=capfd, message="holds no manifest.json")
    for size in ("5 apples", "0", "-1GB", "", "0.1B"):
        refused(orbax, new, f"--max-shard-size={size}", capfd=capfd, message="is not a size; give one such as 5GB")
    config = json.loads((orbax / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (orbax / "config.json").write_text(json.dumps(config))
    refused(orbax, new, capfd=capfd, message="does not match its config.json: missing decoder/lm_head/kernel")
    with pytest.raises(ValueError, match="names is 'old'; it must be one of hub, current"):
        export(orbax, new, names="old")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        export(orbax, new, max_shard_bytes=0)
    assert not new.exists()
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_sizes():
    assert [hf_writer.parse_size(text) for text in ("5GB", "1.5 kb", "2MiB", "7")] == [5 * 10**9, 1500, 2 << 20, 7]


def test_damage_is_named_and_leaves_nothing(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied")
    convert(tmp_path / "hf", tmp_path / "orbax")
    value = tensors["model.audio_tower.embed_positions.weight"].tobytes()
    files = [path for path in (tmp_path / "orbax" / "params").rglob("*") if path.is_file()]
    file = next(path for path in files if value in path.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(value) + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="embed_positions/embedding: its bytes do not have the manifest's sha256"):
        export(tmp_path / "orbax", tmp_path / "new", max_shard_bytes=1000)
    assert not (tmp_path / "new").exists()


def test_early_failure_leaves_nothing(tmp_path, monkeypatch):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa")
    convert(tmp_path / "hf", tmp_path / "orbax")
    (tmp_path / "empty").mkdir()

    def fail(number):
        raise OSError("disk on fire")

    monkeypatch.setattr(safetensors_writer.os, "fsync", fail)
    for place in (tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(OSError, match="disk on fire"):
            export(tmp_path / "orbax", place)
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()


class Stopped(OSError):
    pass


def stop_export(orbax, dst, *, share=0.5, **options) -> None:
    def stop(done, total):
        if done > share * total:
            raise Stopped("disk on fire")

    with pytest.raises(Stopped):
        export(orbax, dst, max_shard_bytes=20_000, on_progress=stop, **options)


@pytest.fixture
def orbax(tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", naming="old", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "orbax")
    return tmp_path / "orbax"


def test_stopped_export_goes_on(tmp_path, orbax):
    stop_export(orbax, tmp_path / "back")
    present = {path.name: path.stat().st_ino for path in (tmp_path / "back").glob("*.safetensors")}
    assert len(present) > 3
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert not names & {"config.json", hf_folder.INDEX, hf_folder.WEIGHTS}
    stop_export(orbax, tmp_path / "back", share=0.8)
    largest = max((tmp_path / "back").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)  # cut: written again
    seen = []
    export(orbax, tmp_path / "back", max_shard_bytes=20_000, on_progress=lambda done, total: seen.append((done, total)))
    assert 0 < seen[0][0] < seen[-1][0] == seen[-1][1]
    for name, number in present.items():
        assert name == largest.name or (tmp_path / "back" / name).stat().st_ino == number
    assert_same(exported(tmp_path / "back"), exported(tmp_path / "hf"))
    assert verify(tmp_path / "back", orbax) == []
    assert not any(path.name.startswith(".") for path in (tmp_path / "back").iterdir())


def test_stopped_export_is_not_mixed_with_another(tmp_path, orbax, capfd):
    stop_export(orbax, tmp_path / "back")
    message = "holds an unfinished export of another checkpoint, or with other options"
    for options in (["--names", "current"], ["--max-shard-size", "5GB"]):
        refused(orbax, tmp_path / "back", *options, capfd=capfd, message=message)
    hf_layout.write_hf_checkpoint(tmp_path / "other", "gqa", naming="old", dtype="bfloat16", seed=99)
    convert(tmp_path / "other", tmp_path / "orbax2")
    refused(tmp_path / "orbax2", tmp_path / "back", "--max-shard-size", "20KB", capfd=capfd, message=message)
    export(orbax, tmp_path / "back", max_shard_bytes=20_000)
    assert verify(tmp_path / "back", orbax) == []


def test_one_export_at_a_time(tmp_path, orbax, capfd):
    def second(done, total):
        if done < total:
            with pytest.raises(ValueError, match="another process is writing this export; wait for it to end"):
                export(orbax, tmp_path / "back")

    export(orbax, tmp_path / "back", on_progress=second)
    assert verify(tmp_path / "back", orbax) == []
