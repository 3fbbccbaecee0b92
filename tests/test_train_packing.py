"""Epoch planning: every example once per epoch, within its row's limits, equal in all processes and after a restart."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import RAW, chat, make_processor, open_records, write_clip

from qwen2audio_jax.train.packing import Lengths, bucket_of, frame_buckets, longest_clip, plan_epoch
from qwen2audio_jax.train.settings import DataSettings

BUCKETS = (20, 40, 100)


def lengths_of(examples) -> Lengths:
    return Lengths(*(np.array([example[i] for example in examples], np.int64).reshape(-1) for i in range(3)))


def examples(max_tokens: int = 60, max_clips: int = 4):
    with_clips = st.tuples(st.integers(1, max_tokens), st.integers(1, max_clips), st.integers(3, 98))
    return st.lists(st.one_of(with_clips, st.tuples(st.integers(1, max_tokens), st.just(0), st.just(0))), max_size=90)


@given(
    examples(),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1),
    st.integers(0, 3),
)
@example([(2, 1, 19), (1, 0, 0), (2, 1, 19), (1, 0, 0)], 3, False, False, 0, 0)  # what is left over has no clip
@settings(max_examples=60, deadline=None)
def test_every_example_once_an_epoch_and_in_its_room(drawn, rows, packing, shuffle, short_first, epoch):
    lengths = lengths_of(drawn)
    data = DataSettings(
        train=(), rows=rows, max_tokens=60, max_clips=4, packing=packing, frames=BUCKETS, short_first=short_first
    )
    plan = plan_epoch(lengths, data, buckets=BUCKETS, seed=5, epoch=epoch, shuffle=shuffle)
    assert plan == plan_epoch(lengths, data, buckets=BUCKETS, seed=5, epoch=epoch, shuffle=shuffle)
    seen = [example for step in plan for row in step.rows for example in row]
    assert sorted(seen) == list(range(len(drawn)))
    for step in plan:
        assert len(step.rows) == rows
        inside = [example for row in step.rows for example in row]
        longest = lengths.frames[inside].max()
        assert step.frames == min(size for size in BUCKETS if size >= longest + 2 or size == BUCKETS[-1])
        assert step.tokens <= 60
        assert step.clips <= 4
        if packing:
            assert (step.tokens, step.clips) == (60, 4)
        for row in step.rows:
            assert packing or len(row) <= 1
            assert lengths.tokens[list(row)].sum() <= step.tokens
            assert lengths.clips[list(row)].sum() <= step.clips
    # Only the last step may have rows to spare, and each step has an example.
    assert all(all(step.rows) for step in plan[:-1])
    assert all(any(step.rows) for step in plan)
    if not shuffle or epoch < short_first:
        full = [step.frames for step in plan if all(step.rows)]
        assert full == sorted(full)


def speechlike(count: int, seed: int = 0) -> Lengths:
    """One clip of about 2 s in each, and 60 to 110 tokens."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(120, 290, count)
    return Lengths(tokens=frames // 4 + rng.integers(25, 50, count), clips=np.ones(count, np.int64), frames=frames)


def test_rows_are_full():
    lengths = speechlike(4000)
    data = DataSettings(train=(), rows=8, max_tokens=512, max_clips=6, frames=(160, 200, 240, 280, 320))
    plan = plan_epoch(lengths, data, buckets=data.frames, seed=0, epoch=0)
    room = len(plan) * 8
    assert lengths.tokens.sum() / (room * 512) > 0.85
    assert lengths.clips.sum() / (room * 6) > 0.85
    padded = sum(step.frames * sum(map(len, step.rows)) for step in plan)
    assert lengths.frames.sum() / padded > 0.88


def test_epochs_differ_in_order_and_in_who_shares_a_row():
    lengths = speechlike(600)
    data = DataSettings(train=(), rows=8, max_tokens=512, max_clips=6, frames=(160, 200, 240, 280, 320), short_first=1)
    plans = [plan_epoch(lengths, data, buckets=data.frames, seed=0, epoch=epoch) for epoch in range(3)]
    other = plan_epoch(lengths, data, buckets=data.frames, seed=1, epoch=1)
    assert [step.frames for step in plans[0]] == sorted(step.frames for step in plans[0])
    assert [step.frames for step in plans[1]] != sorted(step.frames for step in plans[1])
    rows = [{frozenset(row) for step in plan for row in step.rows} for plan in (*plans, other)]
    assert all(len(rows[i] & rows[j]) < 5 for i in range(4) for j in range(i))


def test_without_packing_a_step_is_as_small_as_it_can_be():
    lengths = Lengths(
        tokens=np.array([20, 30, 200, 220, 90, 300]),
        clips=np.array([1, 1, 3, 0, 1, 1]),
        frames=np.array([9, 9, 9, 0, 9, 9]),
    )
    data = DataSettings(train=(), rows=2, max_tokens=290, max_clips=8, packing=False)
    steps = plan_epoch(lengths, data, buckets=(20,), seed=0, epoch=0)
    assert {(tuple(sorted(e for row in s.rows for e in row)), s.tokens, s.clips) for s in steps} == {
        ((3, 5), 290, 1),
        ((2, 4), 256, 4),
        ((0, 1), 32, 1),
    }


def test_buckets_end_where_the_encoder_does():
    data = DataSettings(train=(), frames=(100, 200, 3000))
    assert frame_buckets(data, limit=3000) == (100, 200, 3000)
    assert frame_buckets(data, limit=300) == (100, 200, 300)
    assert frame_buckets(data, limit=200) == (100, 200)
    assert longest_clip((100, 200), limit=200) == 200
    assert longest_clip((100, 200), limit=3000) == 198
    assert bucket_of(np.array([0, 98, 99, 198, 199, 200]), buckets=(100, 200)).tolist() == [0, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(7):
        write_clip(folder / f"{i}.wav", 4000 + 2100 * i, seed=i)
    return folder


RECORDS = [
    *(chat(f"<audio>question {i}", f"answer {i}", f"{i % 7}.wav", id=f"chat {i}") for i in range(17)),
    *(chat("<audio><audio>" + "?" * i, "yes", f"{i}.wav", f"{i + 1}.wav", id=f"two {i}") for i in range(5)),
    *(chat("a" * i, "b", id=f"text {i}") for i in range(1, 5)),
    *({"prompt": RAW, "response": "ja" * i, "audios": [f"{i}.wav"], "id": f"raw {i}"} for i in range(6)),
]


def dataset_of(folder, processor, **options):
    return open_records(folder, RECORDS, processor=processor, **({"frames": (60, 110)} | options))


def arrays(batch):
    return {name: getattr(batch, name) for name in vars(batch)}


def assert_same(one, other):
    assert one[1] == other[1]
    for name, array in arrays(one[0]).items():
        assert np.array_equal(array, getattr(other[0], name)), name


@pytest.mark.parametrize("packing", [True, False])
def test_processes_share_the_rows_of_one_batch(folder, processor, packing):
    dataset = dataset_of(folder, processor, packing=packing)
    steps = dataset.steps_per_epoch(0) + 2
    whole = list(dataset.batches(stop=steps))
    parts = [list(dataset.batches(stop=steps, process_index=i, process_count=2)) for i in range(2)]
    for n, (batch, ids) in enumerate(whole):
        assert parts[0][n][1] + parts[1][n][1] == ids
        for name, array in arrays(batch).items():
            halves = [getattr(part[n][0], name) for part in parts]
            assert halves[0].shape == halves[1].shape
            assert np.array_equal(np.concatenate(halves), array)
    names = [id for _, ids in whole[: dataset.steps_per_epoch(0)] for id in ids]
    assert sorted(names) == sorted(record["id"] for record in RECORDS)


def test_a_restart_goes_on_with_the_same_batches(folder, processor):
    dataset = dataset_of(folder, processor)
    steps = dataset.steps_per_epoch(0) + dataset.steps_per_epoch(1) + 2
    whole = list(dataset.batches(stop=steps))
    for start in (1, dataset.steps_per_epoch(0), steps - 1):
        again = dataset_of(folder, processor)  # a new process, which has planned nothing yet
        for one, other in zip(whole[start:], again.batches(start=start, stop=steps), strict=True):
            assert_same(one, other)
    assert list(dataset.batches(start=3, stop=3)) == []


def test_training_goes_on_for_ever_and_can_be_left(folder, processor):
    dataset = dataset_of(folder, processor, rows=8)
    batches = dataset.batches()
    seen = [next(batches)[1] for _ in range(3 * dataset.steps_per_epoch(0))]
    assert len({id for ids in seen for id in ids}) == len(RECORDS)
    batches.close()


def test_an_evaluation_is_one_pass_in_the_same_order(folder, processor):
    one, other = (dataset_of(folder, processor, split="evaluate", seed=seed) for seed in (0, 1))
    batches = list(one.batches())
    assert len(batches) == one.steps_per_epoch()
    for a, b in zip(batches, other.batches(), strict=True):
        assert_same(a, b)
    assert sorted(id for _, ids in batches for id in ids) == sorted(record["id"] for record in RECORDS)
    assert batches[-1][0].ids.shape == (4, 160)


def test_seeds_give_other_orders(folder, processor):
    orders = {
        tuple(id for _, ids in dataset_of(folder, processor, seed=seed).batches(stop=3) for id in ids)
        for seed in range(3)
    }
    assert len(orders) == 3


def test_worker_processes_give_the_same_batches(folder, processor):
    threads, processes = (dataset_of(folder, processor, workers=workers) for workers in (0, 1))
    count = 0
    for one, other in zip(threads.batches(start=1, stop=4), processes.batches(start=1, stop=4), strict=True):
        assert_same(one, other)
        assert all(type(array) is np.ndarray for array in arrays(other[0]).values())
        count += 1
    assert count == 3


def test_rows_must_divide_by_the_processes(folder, processor):
    with pytest.raises(ValueError, match=r"data.rows = 4 does not divide by 3 processes"):
        dataset_of(folder, processor).batches(process_count=3)
