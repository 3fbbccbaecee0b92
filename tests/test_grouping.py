"""Prompts and clips of different lengths share a call only where that is cheaper, and come out as if alone."""

import copy
import itertools
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from prompts import RAGGED, random_inputs, row_alone

from qwen2audio_jax import make_mesh
from qwen2audio_jax.generation import encoding, memory, run
from qwen2audio_jax.generation.call import prefill_bytes
from qwen2audio_jax.generation.grouping import STARTING, plan_groups
from qwen2audio_jax.generation.inputs import check_inputs
from qwen2audio_jax.generation.padded_shapes import padded_tokens
from qwen2audio_jax.model import cache_pieces
from qwen2audio_jax.model.cache_pieces import PIECE
from qwen2audio_jax.model.kv_cache import cache_specs
from qwen2audio_jax.parallel.sharding import named_sharding

SETTINGS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": tiny.IM_END, "do_sample": False, "max_new_tokens": 6}
# 1 s beside the longest there are, several clips a row, and rows of text between them.
MIXED = ([4, "100", 3], [40], [5, "all", 2], [7, "100", 3, "90", 4], [6], [3, "all", 2])


def cost(count, width, *, parts, reading):
    return max(count // parts * width, reading) + STARTING


def partitions(rows):
    if not rows:
        yield []
        return
    first, *rest = rows
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [row for row in rest if row not in others]
            for more in partitions(left):
                yield [(first, *others), *more]


@pytest.mark.parametrize("reading", [0, 24, 256])
@pytest.mark.parametrize("counts", [(1, 2, 4), (2, 4, 8)])
def test_no_partition_is_cheaper(reading, counts):
    rng, price = np.random.default_rng(reading), partial(cost, parts=counts[0], reading=reading)
    for _ in range(12):
        widths = rng.choice([16, 32, 64, 320, 832], rng.integers(1, 7)).tolist()
        groups = plan_groups(widths, counts=counts, reading=reading)
        assert sorted(row for group in groups for row in group.members) == list(range(len(widths)))
        cheapest = min(
            sum(
                price(next(count for count in counts if count >= len(part)), max(widths[row] for row in part))
                for part in parts
            )
            for parts in partitions(list(range(len(widths))))
            if all(len(part) <= counts[-1] for part in parts)
        )
        assert sum(price(group.count, group.width) for group in groups) == cheapest
        for group in groups:
            assert group.count in counts
            assert group.width == max(widths[row] for row in group.members)
            assert list(group.members) == sorted(group.members)


def test_short_rows_share_the_reading_of_the_weights():
    apart = partial(plan_groups, counts=(1, 2, 4, 8, 16, 32))
    assert [group.members for group in apart([16, 832], reading=256)] == [(0,), (1,)]
    assert [group.members for group in apart([16, 832, 112], reading=24)] == [(0,), (2,), (1,)]
    assert [group.members for group in apart([16, 832, 112], reading=256)] == [(0, 2), (1,)]
    assert sorted(group.count for group in apart([320] * 100, reading=24)) == [4, 32, 32, 32]
    assert apart([], reading=24) == []


@pytest.fixture
def computed(monkeypatch):
    """[clips, frames] of every encoder call and [rows, tokens] of every prefill since."""
    clips, rows = [], []
    encode, prefill = encoding.encode_audio, run.prefill

    def counting_encode(params, features, frames, **more):
        clips.append((features.shape[0], features.shape[2]))
        return encode(params, features, frames, **more)

    def counting_prefill(params, embeddings, lengths, **more):
        rows.append(embeddings.shape[:2])
        return prefill(params, embeddings, lengths, **more)

    monkeypatch.setattr(encoding, "encode_audio", counting_encode)
    monkeypatch.setattr(run, "prefill", counting_prefill)
    return clips, rows


def test_a_ragged_batch_equals_its_rows_alone(load, computed):
    model, (clips, rows) = load("base"), computed
    inputs = random_inputs("base", MIXED)
    width = inputs["input_ids"].shape[1]
    batch = model.generate(**inputs, **SETTINGS)[:, width:]
    frames, lengths = inputs["feature_attention_mask"].sum(1), inputs["attention_mask"].sum(1)
    # Everything together would have been 8 x 3000 frames and 6 x 768 tokens.
    assert sum(map(np.prod, clips)) <= 1.1 * (frames.sum() + 2 * len(frames)) + 2 * STARTING * len(clips)
    assert sum(map(np.prod, rows)) <= 1.1 * lengths.sum() + STARTING * len(rows)
    assert len(clips) <= 3
    for row in range(len(MIXED)):
        alone = row_alone("base", row, MIXED)
        new = model.generate(**alone, **SETTINGS)[0, alone["input_ids"].shape[1] :]
        np.testing.assert_array_equal(new, batch[row, : len(new)])


def test_copies_are_computed_once(load, computed):
    model, (clips, rows) = load("gqa"), computed
    inputs, options = random_inputs("gqa", RAGGED[:2]), SETTINGS | {"do_sample": True, "temperature": 1.3}
    copies = model.generate(**inputs, **options, num_return_sequences=3, seed=5)
    assert (sum(count for count, _ in clips), sum(count for count, _ in rows)) == (1, 2)
    width = inputs["input_ids"].shape[1]
    for row, copied in itertools.product(range(2), range(3)):
        alone = row_alone("gqa", row, RAGGED[:2])
        new = model.generate(**alone, **options, seed=5 + 3 * row + copied)[0, alone["input_ids"].shape[1] :]
        np.testing.assert_array_equal(copies[3 * row + copied, width:][: len(new)], new)


@pytest.mark.slow(seconds=8)
def test_groups_on_a_mesh_have_rows_for_every_part(load, computed):
    many, one, (clips, rows) = load("gqa", mesh=make_mesh(data=2, model=4)), load("gqa"), computed
    lines = ([3, "all", 2], [6], [5], [200, "41"], [7], [4, "60"])
    inputs = random_inputs("gqa", lines)
    tokens = many.generate(**inputs, **SETTINGS)
    assert len(rows) > 1
    assert all(count % 2 == 0 for count, _ in rows)
    assert all(count % 8 == 0 for count, _ in clips)
    np.testing.assert_array_equal(tokens, one.generate(**inputs, **SETTINGS))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)], ids=str)
def test_insertion_copies_no_cache(load, dtype, mesh):
    """The compiled program has the cache's memory as its result, and less of its own than one buffer takes."""
    data, model = mesh
    mesh = make_mesh(data=data, model=model, devices=jax.devices()[: data * model])
    config = load("gqa").config.text_config
    specs = partial(cache_specs, config, dtype=np.dtype(dtype), mesh=mesh)
    cache = specs(rows=64, capacity=1024)
    piece, scalar = specs(rows=64, capacity=PIECE), jax.ShapeDtypeStruct((), np.int32)
    with jax.set_mesh(mesh):
        one = jax.eval_shape(cache_pieces.row_of, (piece.keys, piece.values), scalar)
        lowered = [run.insert.lower(cache, new, scalar, scalar) for new in ((piece.keys, piece.values), one)]
    size = memory.cache_bytes(config, rows=64, capacity=1024, dtype=np.dtype(dtype), mesh=mesh)
    for program in lowered:
        found = program.compile().memory_analysis()
        assert found.alias_size_in_bytes >= size
        assert found.temp_size_in_bytes < size / (2 * config.num_hidden_layers) / 2


def test_the_cache_is_the_same_memory(load):
    model = load("gqa")
    cache = run.new_cache(model.runtime, 4, 256)
    before = [buffer.unsafe_buffer_pointer() for buffer in (*cache.keys, *cache.values)]
    piece = run.new_cache(model.runtime, 2, PIECE)
    ones = jax.tree.map(lambda array: array + 1, (piece.keys, piece.values))
    after = run.insert(cache, run.row_of(ones, np.int32(1)), np.int32(2), np.int32(PIECE))
    assert cache.keys[0].is_deleted()
    assert [buffer.unsafe_buffer_pointer() for buffer in (*after.keys, *after.values)] == before
    for buffer in (*after.keys, *after.values):
        expected = np.zeros(buffer.shape)
        expected[2, :, PIECE:] = 1
        np.testing.assert_array_equal(buffer, expected)


def test_clips_have_their_vectors_whatever_shape_they_were_encoded_in(load):
    from qwen2audio_jax.model.qwen2_audio import place_clip

    model = load("gqa")
    inputs = random_inputs("gqa")
    checked = check_inputs(*inputs.values(), config=model.config)
    vectors = encoding.hear(model.runtime, checked.clips)
    assert {each.shape for each in vectors} == {(75, 48)}
    features = model.encode_audio(inputs["input_features"], inputs["feature_attention_mask"])
    for clip, length in enumerate(features.lengths):
        np.testing.assert_allclose(vectors[clip][:length], features.projected[clip, :length], atol=1e-5)
    index = np.array([-1, 2, 0, -1], np.int32)
    placed = np.asarray(place_clip(np.zeros((3, 4, 48), np.float32), vectors[1], np.int32(1), index))
    np.testing.assert_array_equal(placed[1, 1], vectors[1][2])
    np.testing.assert_array_equal(placed[1, 2], vectors[1][0])
    assert not placed[[0, 2]].any()
    assert not placed[1, [0, 3]].any()


def test_memory_of_a_group_counts(load, monkeypatch):
    model, inputs = copy.copy(load("gqa")), random_inputs("gqa", [[400]])
    size = {"rows": 1, "dtype": np.dtype("float32"), "mesh": model.mesh}
    whole = memory.cache_bytes(model.config.text_config, capacity=512, **size)
    checked = check_inputs(inputs["input_ids"], None, None, None, config=model.config)
    beside = prefill_bytes(model.runtime, checked, checked.sizes)
    assert padded_tokens(400, config=model.config) == 448
    assert beside == memory.cache_bytes(model.config.text_config, capacity=512, **size)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: whole + beside)
    model.generate(**inputs, **SETTINGS | {"max_new_tokens": 1})
    monkeypatch.setattr(memory, "free_bytes", lambda devices: whole + beside - 1)
    with pytest.raises(ValueError, match="a float32 cache of 1 row x 512 positions"):
        model.generate(**inputs, **SETTINGS | {"max_new_tokens": 1})


def test_shardings_of_what_is_inserted(load):
    model = load("gqa", mesh=make_mesh(data=2, model=4))
    inputs = random_inputs("gqa")
    checked = check_inputs(*inputs.values(), config=model.config)
    prompted = run.prefill_prompts(model.runtime, checked, checked.sizes, capacity=256)
    split = named_sharding(model.mesh, "batch", "kv_heads", "capacity", "head_dim")
    assert all(each.sharding.is_equivalent_to(split, 4) for each in prompted.cache.keys)
    assert prompted.logits.sharding.is_equivalent_to(named_sharding(model.mesh, "batch", "vocab"), 2)
    assert prompted.cache.lengths.tolist() == checked.rows.lengths.tolist()
