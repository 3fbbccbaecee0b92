"""Checkpoint folders: written whole or not at all, restored strictly, padded and cast onto any mesh."""

import hashlib
import json
import shutil
from pathlib import Path

import hf_layout
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

import qwen2audio_jax
from qwen2audio_jax.checkpoint import reader, writer
from qwen2audio_jax.checkpoint.reader import is_checkpoint, read_manifest, restore_params
from qwen2audio_jax.checkpoint.writer import new_checkpoint, save_params
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.parallel.sharding import make_mesh


def tree() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "encoder": {"conv1": {"kernel": draw(3, 4, 8), "bias": draw(8)}},
        "projector": {"kernel": draw(8, 16).astype(ml_dtypes.bfloat16)},
        "decoder": {
            "embed_tokens": {"embedding": draw(13, 16)},
            "lm_head": {"kernel": draw(16, 13).astype(np.float16)},
            "norm": {"scale": draw(16)},
        },
    }


def specs_of(params: dict, *, dtype: object = None) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), params)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict]:
    params = tree()
    save_params(tmp_path / "checkpoint", params)
    return tmp_path / "checkpoint", params


def assert_equal(actual: dict, expected: dict) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip(saved):
    path, params = saved
    assert is_checkpoint(path)
    assert is_checkpoint(str(path))
    assert_equal(restore_params(path, specs=specs_of(params)), params)
    manifest = read_manifest(path)
    kernel = params["encoder"]["conv1"]["kernel"]
    assert manifest["parameters"]["encoder/conv1/kernel"] == {
        "shape": [3, 4, 8],
        "dtype": "float32",
        "bytes": 384,
        "sha256": hashlib.sha256(kernel.tobytes()).hexdigest(),
    }
    leaves = jax.tree.leaves(params)
    assert manifest["totals"] == {
        "tensors": 6,
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves),
    }
    assert manifest["tool"] == f"qwen2audio_jax {qwen2audio_jax.__version__}"
    assert manifest["parameters"]["projector/kernel"]["dtype"] == "bfloat16"
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", "params"]


def test_device_arrays_and_config(tmp_path):
    config = Qwen2AudioConfig(dtype="float32")
    mesh = make_mesh(data=2, model=4)
    x = jax.device_put(
        np.arange(32.0, dtype=np.float32).reshape(4, 8), NamedSharding(mesh, PartitionSpec(None, "model"))
    )
    save_params(tmp_path / "a", {"projector": {"kernel": x}}, config=config)
    assert Qwen2AudioConfig.from_pretrained(tmp_path / "a") == config
    restored = restore_params(
        tmp_path / "a", specs={"projector": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    )
    assert_equal(restored, {"projector": {"kernel": np.asarray(x)}})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_floating_dtypes(saved, dtype):
    path, params = saved
    restored = restore_params(path, specs=specs_of(params, dtype=jnp.dtype(dtype)))
    assert_equal(restored, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (2, 4)])
def test_onto_a_mesh_with_a_padded_vocabulary(saved, data, model):
    path, params = saved
    mesh = make_mesh(data=data, model=model)
    vocab = -(-13 // model) * model

    def spec(*axes, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    specs = {
        "decoder": {
            "embed_tokens": {"embedding": spec("model", None, shape=(vocab, 16))},
            "lm_head": {"kernel": spec(None, "model", shape=(16, vocab), dtype=jnp.bfloat16)},
            "norm": {"scale": spec(shape=(16,))},
        }
    }
    restored = restore_params(path, specs=specs)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, specs)
    embedding = np.asarray(restored["decoder"]["embed_tokens"]["embedding"])
    assert embedding.shape == (vocab, 16)
    np.testing.assert_array_equal(embedding[:13], params["decoder"]["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(embedding[13:], 0)
    head = np.asarray(restored["decoder"]["lm_head"]["kernel"])
    np.testing.assert_array_equal(head[:, :13], params["decoder"]["lm_head"]["kernel"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(head[:, 13:], 0)


def test_part_of_the_tree(saved):
    path, params = saved
    part = {name: params[name] for name in ("encoder", "projector")}
    assert_equal(restore_params(path, specs=specs_of(part)), part)


def test_every_difference_is_listed(saved):
    path, params = saved
    specs = specs_of(params)
    del specs["encoder"]["conv1"]["bias"]
    specs["decoder"]["more"] = {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}
    specs["projector"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    specs["decoder"]["norm"]["scale"] = jax.ShapeDtypeStruct((16,), jnp.int32)
    specs["decoder"]["embed_tokens"]["embedding"] = jax.ShapeDtypeStruct((12, 16), jnp.float32)
    with pytest.raises(ValueError, match="does not match the configuration") as caught:
        restore_params(path, specs=specs)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "misshapen decoder/embed_tokens/embedding: stored (13, 16), the configuration needs (12, 16)",
        "missing decoder/more/kernel (2,)",
        "decoder/norm/scale cannot be read as int32: ask for a floating dtype",
        "unexpected encoder/conv1/bias (8,): the configuration has no such parameter",
        "misshapen projector/kernel: stored (8, 16), the configuration needs (16, 8)",
    ]


def test_only_the_vocabulary_is_padded(saved):
    path, params = saved
    specs = specs_of(params)
    specs["decoder"]["embed_tokens"]["embedding"] = jax.ShapeDtypeStruct((13, 20), jnp.float32)
    specs["projector"]["kernel"] = jax.ShapeDtypeStruct((8, 20), jnp.float32)
    with pytest.raises(ValueError, match="misshapen decoder/embed_tokens") as caught:
        restore_params(path, specs=specs)
    assert "misshapen projector/kernel" in str(caught.value)


def test_what_is_no_checkpoint(tmp_path, saved):
    path, _ = saved
    messages = {
        tmp_path / "none": "no such folder",
        tmp_path: r"holds no manifest\.json, so it is not a finished checkpoint",
        path / "manifest.json": "no such folder",
    }
    for place, message in messages.items():
        assert not is_checkpoint(place)
        with pytest.raises(ValueError, match=message):
            restore_params(place, specs={})
    for content, message in (
        ("{", "the manifest cannot be read"),
        ("{}", "is not that of a qwen2audio_jax checkpoint"),
        (json.dumps(read_manifest(path) | {"version": 3}), "version 3 and this package reads version 2; upgrade"),
    ):
        (path / "manifest.json").write_text(content)
        assert not is_checkpoint(path)
        with pytest.raises(ValueError, match=message):
            restore_params(path, specs={})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("source", None),
        ("totals", {"tensors": 3}),
        ("tool", 3),
        ("parameters", [1]),
        ("parameters.projector/kernel", {"shape": [4]}),
        ("parameters.projector/kernel", 1),
        ("parameters.projector/kernel.shape", [-1, 4]),
        ("parameters.projector/kernel.bytes", "9"),
        ("parameters.projector/kernel.dtype", 3),
        ("files", None),
    ],
)
def test_a_damaged_manifest_is_named(saved, place, value):
    path, _ = saved
    manifest = read_manifest(path)
    *parts, last = place.split(".")
    entry = manifest
    for part in parts:
        entry = entry[part]
    entry[last] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert not is_checkpoint(path)
    with pytest.raises(ValueError, match=f"damaged at {'.'.join(place.split('.')[:2])}; copy or convert it again"):
        restore_params(path, specs={})


def test_copied_checkpoint_loads_and_a_half_copied_one_does_not(saved, tmp_path):
    path, params = saved
    specs = specs_of(params)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shutil.rmtree(path)
    assert_equal(restore_params(copy, specs=specs), params)
    files = sorted(file for file in (copy / "params").rglob("*") if file.is_file())
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(copy).as_posix()
        file.write_bytes(content + b"x")
        with pytest.raises(ValueError, match=f"{name} has {len(content) + 1} bytes instead of {len(content)}"):
            restore_params(copy, specs=specs)
        file.unlink()
        with pytest.raises(ValueError, match=f"damaged or not copied whole.*\n  missing {name}"):
            restore_params(copy, specs=specs)
        file.write_bytes(content)
    assert_equal(restore_params(copy, specs=specs), params)
    shutil.rmtree(copy / "params")
    with pytest.raises(ValueError, match="damaged or not copied whole"):
        restore_params(copy, specs=specs)


def test_manifest_that_lists_more_than_is_stored(saved):
    path, params = saved
    manifest = read_manifest(path)
    manifest["parameters"]["projector/bias"] = {"shape": [16], "dtype": "float32", "bytes": 64, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    params["projector"]["bias"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="missing projector/bias: the manifest lists it"):
        restore_params(path, specs=specs_of(params))


def test_block_that_raises_leaves_nothing(tmp_path):
    def interrupted():
        with new_checkpoint(tmp_path / "deep" / "a") as writer:
            writer.add("x/y", np.zeros(3, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "deep" / "a").exists()
    with pytest.raises(ValueError, match="needs at least one parameter"), new_checkpoint(tmp_path / "b"):
        pass
    assert not (tmp_path / "b").exists()
    with new_checkpoint(tmp_path / "c") as writer:
        writer.add("x/y", np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="x/y was added twice"):
            writer.add("x/y", np.zeros(3, np.float32))


def test_two_writers(tmp_path):
    with new_checkpoint(tmp_path / "a") as writer:
        writer.add("x/y", np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="another process is writing"), new_checkpoint(tmp_path / "a"):
            pass
        assert not is_checkpoint(tmp_path / "a")
    assert is_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match="already holds a checkpoint"), new_checkpoint(tmp_path / "a"):
        pass
    assert not (tmp_path / "a" / reader.MARKER).exists()


def test_larger_than_a_group_and_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "GROUP_BYTES", 200)
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64)
    params = tree()
    save_params(tmp_path / "a", params)
    mesh = make_mesh(data=1, model=8)
    specs = specs_of(params)
    specs["encoder"]["conv1"]["kernel"] = jax.ShapeDtypeStruct(
        (3, 4, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, None, "model"))
    )
    assert_equal(restore_params(tmp_path / "a", specs=specs), params)


def test_what_takes_the_most_memory_is_read_first_and_alone(saved, monkeypatch):
    path, params = saved
    groups, threads = [], []

    def read(folder, wanted, **by):
        groups.append([*wanted])
        threads.append(by.get("threads"))
        return _read(folder, wanted, **by)

    _read = reader._read
    monkeypatch.setattr(reader, "_read", read)
    monkeypatch.setattr(reader, "READ_BYTES", 150)
    assert_equal(restore_params(path, specs=specs_of(params)), params)
    sizes = {name: leaf.nbytes for name, leaf in flatten_dict(params, sep="/").items()}
    large = sorted((name for name in sizes if sizes[name] > 150), key=lambda name: -sizes[name])
    assert len(large) >= 2
    first, rest = groups
    assert (first, threads) == (large, [1, None])
    assert {*rest} == sizes.keys() - {*large}


def test_nothing_is_logged(saved, capfd):
    path, params = saved
    restore_params(path, specs=specs_of(params))
    save_params(path.parent / "again", params)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_old_and_new_names_agree_with_the_declared_parameters():
    """The numpy writer that other tests use and the model's declarations hold the same number of weights."""
    import tiny

    from qwen2audio_jax.model.qwen2_audio import parameter_specs

    for config in tiny.CONFIGS.values():
        declared = jax.tree.leaves(parameter_specs(Qwen2AudioConfig.from_dict(config)))
        shapes = hf_layout.tensor_shapes(config).values()
        assert sum(leaf.size for leaf in declared) == sum(int(np.prod(shape)) for shape in shapes)
