"""The sharding table, and that meshes of fake devices give what one device gives."""

import types
from dataclasses import dataclass

import jax
import numpy as np
import pytest
import tiny
from judge import relative_error
from prompts import RAGGED, random_inputs

from qwen2audio_jax import make_mesh
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.qwen2_audio import parameter_axes, parameter_specs, sharded_specs
from qwen2audio_jax.parallel.device_order import arrange, slices
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset, mesh_preset_names
from qwen2audio_jax.parallel.sharding import check_mesh, partition_spec

SETTINGS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": tiny.IM_END, "max_new_tokens": 16}


def test_the_table_refuses_collisions_and_unknown_axes():
    assert partition_spec("batch", None, "vocab") == jax.sharding.PartitionSpec("data", None, "model")
    with pytest.raises(ValueError, match="'heads' and 'ffn' both split over mesh axis 'model'"):
        partition_spec("heads", "ffn")
    with pytest.raises(ValueError, match="no logical axis 'hats'"):
        partition_spec("hats")


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_weight_has_axes_in_the_table(name):
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS[name])
    axes = jax.tree.leaves(parameter_axes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
    specs = jax.tree.leaves(parameter_specs(config))
    assert [len(one) for one in axes] == [len(spec.shape) for spec in specs]
    for one in axes:
        partition_spec(*one)


def test_published_model_has_the_published_size():
    specs = jax.tree.leaves(parameter_specs(Qwen2AudioConfig.from_name("qwen2-audio-7b")))
    assert len(specs) == 876
    assert sum(spec.size for spec in specs) == 8_397_094_912
    assert {spec.dtype.name for spec in specs} == {"bfloat16"}


@pytest.mark.parametrize(
    ("data", "model"),
    [(4, 2), *(pytest.param(*sizes, marks=pytest.mark.slow(seconds=7)) for sizes in ((2, 4), (8, 1)))],
)
def test_meshes_give_the_tokens_of_one_device(load, hf_checkpoint, data, model):
    """The vocabulary of 321 is odd, so it is padded on every mesh that splits it; 4 rows are padded to 8 on 8x1."""
    mesh = make_mesh(data=data, model=model)
    one, many = load("gqa"), load("gqa", mesh=mesh)
    inputs = random_inputs("gqa")
    assert relative_error(many(**inputs).logits, one(**inputs).logits) < 1e-5
    greedy = {"do_sample": False, "repetition_penalty": 1.1}
    np.testing.assert_array_equal(
        many.generate(**inputs, **SETTINGS, **greedy), one.generate(**inputs, **SETTINGS, **greedy)
    )
    sampled = {"do_sample": True, "seed": 4, "temperature": 1.2, "num_return_sequences": 2}
    np.testing.assert_array_equal(
        many.generate(**inputs, **SETTINGS, **sampled), one.generate(**inputs, **SETTINGS, **sampled)
    )


def test_weights_and_cache_are_really_split(load):
    from qwen2audio_jax.generation.run import new_cache

    mesh = make_mesh(data=2, model=4)
    model = load("gqa", mesh=mesh)
    embedding = model.params["decoder"]["embed_tokens"]["embedding"]
    assert embedding.shape == (324, 48)
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(81, 48)}
    query = model.params["decoder"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(48, 20)}
    whole = model.params["encoder"]["conv1"]["kernel"]
    assert {shard.data.shape for shard in whole.addressable_shards} == {whole.shape}
    cache = new_cache(model.runtime, 4, 32)
    assert {shard.data.shape for shard in cache.keys[0].addressable_shards} == {(2, 1, 32, 10)}
    for spec in jax.tree.leaves(sharded_specs(model.config, mesh=mesh)):
        assert spec.sharding.mesh == mesh


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "model": 2}, "takes 6 devices, but there are 8: the nearest that works is data=4 x model=2"),
        ({"model": 3}, "data=2 x model=3 takes 6 .* nearest that works is data=4 x model=2"),
        ({"model": 16}, "takes 16 devices, .* nearest that works is data=1 x model=8"),
        ({"data": 0}, "at least 1"),
        ({"model": 8, "num_slices": 2}, "each of the 2 slices has 4 .* nearest mesh that works is data=2 x model=4"),
        ({"model": 2, "num_slices": 3}, "num_slices=3: 8 devices of 1 processes and 1 slices do not fall"),
        ({"num_slices": 0}, "num_slices=0"),
        ({"preset": "v5e-16"}, "'v5e-16' is for 16 devices, but there are 8"),
        ({"preset": "v5e-8", "model": 4}, "leave them out"),
        ({"preset": "v5e8"}, "no mesh preset named 'v5e8'; there are: .*v5e-8"),
    ],
)
def test_meshes_that_do_not_fit_the_devices(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_meshes_that_do_not_divide_the_model():
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    message = r"num_key_value_heads=4 does not divide by the mesh's model=8; .* data=2 x model=4 \(.*: 1, 2, 4\)"
    with pytest.raises(ValueError, match=message):
        check_mesh(make_mesh(data=1, model=8), config=config)
    six = make_mesh(data=2, model=3, devices=jax.devices()[:6])
    with pytest.raises(ValueError, match=r"num_attention_heads=8 .* on 6 devices is data=3 x model=2"):
        check_mesh(six, config=config)
    other = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match="use make_mesh"):
        check_mesh(other, config=config)


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [3, pytest.param(5, marks=pytest.mark.slow(seconds=6))])
def test_odd_counts_are_padded(load, rows):
    """Rows and clips that no axis divides; an odd vocabulary is padded by every mesh that splits it."""
    one, many = load("gqa"), load("gqa", mesh=make_mesh(data=4, model=2))
    inputs = random_inputs("gqa", (RAGGED * 2)[:rows])
    assert relative_error(many(**inputs).logits, one(**inputs).logits) < 1e-5
    np.testing.assert_array_equal(
        many.generate(**inputs, **SETTINGS, do_sample=False), one.generate(**inputs, **SETTINGS, do_sample=False)
    )


def test_every_preset_is_a_mesh_of_the_published_model():
    config = Qwen2AudioConfig.from_name("qwen2-audio-7b")
    for name in mesh_preset_names():
        known = load_mesh_preset(name)
        assert known.data * known.model == known.devices
        assert known.devices // known.num_slices % known.model == 0
        assert all(
            size % known.model == 0
            for size in (config.text_config.num_key_value_heads, config.text_config.intermediate_size)
        )
        assert known.dtype == config.dtype
    assert dict(make_mesh(preset="v6e-8").shape) == {"data": 2, "model": 4}
    assert set(mesh_preset_names()) == {"one-device", "v5e-8", "v6e-8", "v5p-8", "8xh100", "v5e-16", "2x8xh100"}


@dataclass(frozen=True)
class Fake:
    """A device of a machine that is not here."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_make_mesh_takes_every_preset():
    for name in mesh_preset_names():
        known = load_mesh_preset(name)
        host = 8 if known.num_slices == 2 or known.devices == 8 else 4
        mesh = make_mesh(preset=name, devices=[Fake(i, i // host) for i in range(known.devices)])
        assert dict(mesh.shape) == {"data": known.data, "model": known.model}
        # A group stays on its host.
        assert all(len({device.process_index for device in group}) == 1 for group in mesh.devices)


def fakes(counts, *, platform="cpu", **more):
    """Devices of processes that have so many each."""
    owners = [process for process, count in enumerate(counts) for _ in range(count)]
    return [
        types.SimpleNamespace(id=i, process_index=p, platform=platform, device_kind=platform, **more)
        for i, p in enumerate(owners)
    ]


def ids(devices, *, model, num_slices=None):
    return [[d.id for d in group] for group in arrange(slices(devices, num_slices), model=model)]


def test_slices_lie_along_data():
    mixed = fakes([2, 2, 2, 2])
    for device in mixed:
        device.slice_index = device.process_index % 2
    assert ids(mixed, model=2) == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert ids(mixed, model=4) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert ids(fakes([2, 2, 2, 2]), model=4, num_slices=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids(fakes([8]), model=2, num_slices=4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    uneven = fakes([4, 2])
    for device in uneven:
        device.slice_index = device.process_index
    with pytest.raises(ValueError, match="the slices have 4, 2 devices"):
        slices(uneven, None)


def test_a_group_stays_in_a_process_where_it_fits():
    """Whatever order the devices are given in."""
    devices = fakes([4, 4])
    shuffled = [devices[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert ids(shuffled, model=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ids(shuffled, model=8) == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_tpus_are_ordered_by_their_wiring():
    """A block of 4 x 4 chips, four hosts of 2 x 2: a group of a host's four, of two neighbours, and of a whole row."""
    devices = fakes([4, 4, 4, 4], platform="tpu", core_on_chip=0, slice_index=0)
    for device in devices:
        host, own = device.process_index, device.id % 4
        device.coords = (host % 2 * 2 + own % 2, host // 2 * 2 + own // 2, 0)
    at = {device.id: device.coords for device in devices}
    assert [sorted(group) for group in ids(devices, model=4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    for group in ids(devices, model=2):
        (x0, y0, _), (x1, y1, _) = (at[i] for i in group)
        assert abs(x0 - x1) + abs(y0 - y1) == 1
    assert ids(devices, model=8) == ids(devices, model=8)
    assert sorted(i for group in ids(devices, model=8) for i in group) == list(range(16))
    assert ids(devices[:3], model=3) == [[0, 1, 2]]  # no block of chips: as they come
