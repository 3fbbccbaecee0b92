"""A session gives what the model and the reference give from scratch, and computes only what is new."""

import copy
import weakref
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from judge import relative_error
from prompts import as_torch
from test_generate import Letters, drained

from qwen2audio_jax import make_mesh
from qwen2audio_jax.generation import decoding, encoding, memory
from qwen2audio_jax.generation import session as session_module
from qwen2audio_jax.generation.inputs import check_inputs
from qwen2audio_jax.generation.prefix import common_prefix_length, row_tokens
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.parallel.process_rows import Share

SETTINGS = {"pad_token_id": tiny.END_OF_TEXT, "eos_token_id": [tiny.IM_END, tiny.END_OF_TEXT], "do_sample": False}
SAMPLED = SETTINGS | {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 9}
NEW = 6


def text(count, *, seed):
    """Random text ids."""
    return np.random.default_rng([1, seed]).integers(0, 300, count)


def clip(name, frames, *, seed):
    """Random log-mel [1, M, max_frames] and its mask."""
    audio = tiny.CONFIGS[name]["audio_config"]
    shape = (1, audio["num_mel_bins"], 2 * audio["max_source_positions"])
    features = np.random.default_rng([2, seed]).normal(size=shape).astype(np.float32)
    return features, (np.arange(shape[2]) < frames)[None].astype(np.int64)


def batch(*rows, side="left"):
    """A padded batch; a row is a list of ids [T] and clips."""
    ids, heard = [], []
    for row in rows:
        parts = [np.full(token_count(int(p[1].sum())), tiny.AUDIO) if isinstance(p, tuple) else p for p in row]
        ids.append(np.concatenate(parts))
        heard += [p for p in row if isinstance(p, tuple)]
    width = max(map(len, ids))
    inputs = {"input_ids": np.full((len(ids), width), tiny.END_OF_TEXT)}
    inputs["attention_mask"] = np.zeros_like(inputs["input_ids"])
    for index, row in enumerate(ids):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        inputs["input_ids"][index, where], inputs["attention_mask"][index, where] = row, 1
    if heard:
        inputs["input_features"] = np.concatenate([features for features, _ in heard])
        inputs["feature_attention_mask"] = np.concatenate([mask for _, mask in heard])
    return inputs


@pytest.fixture(scope="module")
def talk():
    """Parts of prompts for the tiny model `gqa`: a beginning with two clips, and a third clip."""
    return [text(5, seed=0), clip("gqa", 57, seed=1), text(4, seed=2), clip("gqa", 160, seed=3)], clip(
        "gqa", 40, seed=4
    )


@pytest.fixture
def encoded(monkeypatch):
    """How many clips each call of the encoder has been given since, those that pad it included."""
    counts, encode = [], encoding.encode_audio
    monkeypatch.setattr(
        encoding, "encode_audio", lambda p, f, *a, **k: (counts.append(len(f)), encode(p, f, *a, **k))[1]
    )
    return counts


def length_of(*rows):
    return batch(*rows)["input_ids"].shape[1]


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_questions_equal_the_references(load, reference, talk, encoded, penalty):
    """Two clips in what is kept; questions of different lengths, the third with a clip of its own."""
    model, (start, third) = load("gqa"), talk
    session = model.session(**batch([*start, text(3, seed=5)]))
    assert encoded == [1, 1]
    kept = length_of(start) + 3
    np.testing.assert_array_equal(session.input_ids, batch([*start, text(3, seed=5)])["input_ids"][0])
    options = SETTINGS | {"max_new_tokens": NEW, "repetition_penalty": penalty}
    for question, reused, clips in (
        ([text(3, seed=5), text(7, seed=6)], kept, 0),
        ([text(3, seed=5), text(19, seed=7)], kept, 0),
        ([text(2, seed=8), third, text(6, seed=9)], kept - 3, 1),
    ):
        inputs = batch([*start, *question])
        wanted = reference("gqa").generate(**as_torch(inputs), **options).numpy()
        encoded.clear()
        np.testing.assert_array_equal(session.generate(**inputs, **options), wanted)
        assert session.reused.tolist() == [reused]
        assert sum(encoded) == clips
        np.testing.assert_array_equal(model.generate(**inputs, **options), wanted)


def test_logits_equal_the_whole_prompts(load, talk):
    model, (start, third) = load("gqa"), talk
    session = model.session(**batch(start))
    for rows in (
        [[*start, text(9, seed=1)]],
        [[*start, text(2, seed=1), third, text(3, seed=2)], [*start, text(5, seed=3)]],
    ):
        inputs = batch(*rows)
        checked = check_inputs(*inputs.values(), *[None] * (4 - len(inputs)), config=model.config)
        logits = session._prompts(checked, checked.sizes, capacity=128).logits[: len(rows), :321]
        session = model.session(**batch(start))
        assert relative_error(logits, model(**inputs).logits[:, -1]) < 1e-5


def ends(model, inputs):
    """Options that end an answer in each way, and how many of its tokens are in the cache then."""
    new = model.generate(**inputs, **SETTINGS, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert new[3] not in new[:3]
    yield {"max_new_tokens": 8}, 7
    yield {"max_new_tokens": 1}, 0
    yield {"max_new_tokens": 8, "eos_token_id": [int(new[3])]}, 4
    stop = Letters().decode(new[2:4])
    seen = next(i for i in range(8) if stop in Letters().decode(new[: i + 1])) + 1
    yield {"max_new_tokens": 8, "stop_strings": [stop], "tokenizer": Letters()}, seen


def test_turns_of_a_chat(load, talk):
    """Each turn goes on from the answer before it, whichever way that ended; nothing is taken that is not there."""
    model, (start, third) = load("gqa"), talk
    inputs = batch(start)
    for options, cached in ends(model, inputs):
        session = model.session()
        first = session.generate(**inputs, **(SETTINGS | options), return_dict_in_generate=True)
        answer = first.sequences[0, length_of(start) :][: first.lengths[0]]
        held = session.input_ids
        assert len(held) >= length_of(start) + cached
        np.testing.assert_array_equal(held[: length_of(start) + cached][length_of(start) :], answer[:cached])
        turn = batch([*start, answer, text(5, seed=6), third, text(3, seed=7)])
        new = session.generate(**turn, **SETTINGS, max_new_tokens=NEW)
        assert session.reused.tolist() == [length_of(start) + cached]
        np.testing.assert_array_equal(new, model.generate(**turn, **SETTINGS, max_new_tokens=NEW))


def test_streams_that_are_left_early(load, talk, monkeypatch):
    """By the caller, or by an interrupt while the device works, at any step; the session goes on from what it has."""
    model, (start, _) = load("gqa"), talk
    inputs, options = batch(start), SETTINGS | {"max_new_tokens": 8, "tokenizer": Letters()}
    whole, reason = drained(model.stream(**inputs, **options))
    assert reason == "length"
    issue = decoding.next_step
    for left, interrupted in ((1, False), (3, False), (1, True), (3, True)):
        session, steps = model.session(), []

        def step(*arguments, steps=steps, left=left, interrupted=interrupted, **more):
            steps.append(issue(*arguments, **more))
            if interrupted and len(steps) == left:
                raise KeyboardInterrupt  # with the cache taken and none given back
            return steps[-1]

        monkeypatch.setattr(decoding, "next_step", step)
        stream = session.stream(**inputs, **options)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                list(stream)
            assert len(session.input_ids) == 0
        else:
            assert [next(stream) for _ in range(left)] == whole[:left]
            stream.close()
            assert len(session.input_ids) == length_of(start) + left
        monkeypatch.setattr(decoding, "next_step", issue)
        for question in ([text(5, seed=6)], []):  # a message in the place of the one taken back, and it once more
            again = batch([*start, *question])
            new, _ = drained(session.stream(**again, **options))
            assert new == drained(model.stream(**again, **options))[0]
        assert session.reused.tolist() == [length_of(start) - 1]
    # One that is never begun changes nothing, and two at once are each right.
    held = session.input_ids
    session.stream(**inputs, **options)
    np.testing.assert_array_equal(session.input_ids, held)
    one, two = (session.stream(**inputs, **options) for _ in range(2))
    assert [next(one), next(two)] == [whole[0]] * 2
    assert (list(one), list(two)) == (whole[1:], whole[1:])


def test_an_interrupt_while_waiting_keeps_what_was_read(load, talk, monkeypatch):
    model, (start, _) = load("gqa"), talk
    session, read, reads = model.session(), decoding.own_rows, []

    def interrupt(mesh, tree):
        reads.append(0)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read(mesh, tree)

    monkeypatch.setattr(decoding, "own_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.generate(**batch(start), **SETTINGS, max_new_tokens=8)
    monkeypatch.setattr(decoding, "own_rows", read)
    assert len(session.input_ids) == length_of(start) + 2
    inputs = batch([*start, session.input_ids[-2:], text(4, seed=6)])
    wanted = model.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
    np.testing.assert_array_equal(session.generate(**inputs, **SETTINGS, max_new_tokens=NEW), wanted)
    assert session.reused.tolist() == [length_of(start) + 2]


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        SETTINGS | {"min_new_tokens": 4},
        pytest.param(SAMPLED, marks=pytest.mark.slow(seconds=8)),
        SAMPLED | {"num_return_sequences": 2},
    ],
)
def test_a_ragged_batch_of_questions(load, talk, encoded, options, started):
    """Several questions from one beginning, one with a clip of its own and one that has another beginning."""
    model, (start, third) = load("gqa"), talk
    rows = [[*start, text(9, seed=1)], [*start, text(2, seed=2), third, text(3, seed=3)], [*start, text(30, seed=4)]]
    if started:
        rows[1] = [*start[:2], text(3, seed=12)]
    inputs, options = batch(*rows, side="right"), options | {"max_new_tokens": NEW}
    wanted = model.generate(**inputs, **options)
    session = model.session(**batch(start)) if started else model.session()
    encoded.clear()
    np.testing.assert_array_equal(session.generate(**inputs, **options), wanted)
    expected = [length_of(start)] * 3
    if started:
        expected[1] = length_of(start[:2])
    assert session.reused.tolist() == expected
    # Without a session the same clips are encoded in every row.
    assert sum(encoded) == (0 if started else 3)
    assert len(session.input_ids) == length_of(start)
    np.testing.assert_array_equal(session.generate(**inputs, **options), wanted)


def test_several_answers_to_one_prompt(load, talk):
    model, (start, _) = load("gqa"), talk
    inputs, options = batch([*start, text(4, seed=6)]), SAMPLED | {"num_return_sequences": 3, "max_new_tokens": NEW}
    session = model.session(**batch(start))
    wanted = model.generate(**inputs, **options)
    for reused in (length_of(start), length_of(start) + 3):
        np.testing.assert_array_equal(session.generate(**inputs, **options), wanted)
        assert session.reused.tolist() == [reused]
    np.testing.assert_array_equal(session.input_ids, inputs["input_ids"][0])


def test_other_prompts_and_other_clips(load, talk):
    """Equal ids are not enough: what an audio position holds counts, to the last bit."""
    model, (start, third) = load("gqa"), talk
    session = model.session(**batch(start))
    features, mask = start[3]
    other = features.copy()
    other[0, 0, 0] += 1e-4
    for parts, reused in (
        ([*start[:3], (other, mask), text(4, seed=1)], length_of(start[:3])),
        ([*start[:3], clip("gqa", 157, seed=3), text(4, seed=1)], length_of(start[:3])),
        ([text(20, seed=40)], 0),
        ([text(20, seed=40), text(3, seed=1)], 20),
        ([third, text(3, seed=1)], 0),
    ):
        inputs = batch(parts)
        wanted = model.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
        np.testing.assert_array_equal(session.generate(**inputs, **SETTINGS, max_new_tokens=NEW), wanted)
        assert session.reused.tolist() == [reused]
    one = row_tokens(check_inputs(*batch(start).values(), config=model.config))[0]
    assert common_prefix_length(one, one) == len(one)
    assert common_prefix_length(one[:0], one) == 0


def test_a_fork_and_what_it_comes_from_go_separate_ways(load, talk):
    model, (start, _) = load("gqa"), talk
    one = model.session(**batch(start))
    two = one.fork()
    prompts = [batch([*start, text(6, seed=seed)]) for seed in (1, 2)]
    for inputs in prompts:
        for session in (one, two):
            wanted = model.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
            np.testing.assert_array_equal(session.generate(**inputs, **SETTINGS, max_new_tokens=NEW), wanted)
            assert session.reused.tolist() == [length_of(start)]
    assert len(model.session().fork().input_ids) == 0


def test_capacity_grows_and_shrinks(load, talk):
    """Through several listed sizes, and back."""
    model, (start, _) = load("gqa"), talk
    session, capacities, parts = model.session(), [], list(start)
    for count in (5, 60, 200):
        parts.append(text(count, seed=count))
        inputs = batch(parts)
        wanted = model.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
        np.testing.assert_array_equal(session.generate(**inputs, **SETTINGS, max_new_tokens=NEW), wanted)
        capacities.append(session._held.cache.capacity)
    inputs = batch(parts[:5])
    np.testing.assert_array_equal(
        session.generate(**inputs, **SETTINGS, max_new_tokens=NEW),
        model.generate(**inputs, **SETTINGS, max_new_tokens=NEW),
    )
    capacities.append(session._held.cache.capacity)
    assert capacities == [128, 256, 384, 128]


def test_at_the_last_positions(load, encoded):
    """1024 positions: where the padding of what is new finds no room, more is read once again, even half a clip."""
    model = load("gqa")
    start = [text(930, seed=1), clip("gqa", 300, seed=2)]
    session = model.session(**batch(start))
    inputs = batch([*start, text(14, seed=3)])
    width = inputs["input_ids"].shape[1]
    assert width == 1019
    encoded.clear()
    new = session.generate(**inputs, **SETTINGS, max_new_tokens=5)
    assert session.reused.tolist() == [1005]
    assert encoded == []
    np.testing.assert_array_equal(new, model.generate(**inputs, **SETTINGS, max_new_tokens=5))
    turn = batch([*start, text(18, seed=4)])
    encoded.clear()
    new = session.generate(**turn, **SETTINGS, max_new_tokens=1)
    assert session.reused.tolist() == [1024 - 24]
    assert encoded == [1]
    np.testing.assert_array_equal(new, model.generate(**turn, **SETTINGS, max_new_tokens=1))
    held = session.input_ids
    with pytest.raises(ValueError, match="a prompt of 1023 tokens and 2 new ones make 1025, but the model has 1024"):
        session.generate(**turn, **SETTINGS, max_new_tokens=2)
    np.testing.assert_array_equal(session.input_ids, held)


@pytest.mark.parametrize(
    ("name", "data", "model"), [("gqa", 4, 2), pytest.param("base", 1, 8, marks=pytest.mark.slow(seconds=8))]
)
def test_meshes(load, name, data, model):
    many, one = load(name, mesh=make_mesh(data=data, model=model)), load(name)
    start, third = (
        [text(5, seed=0), clip(name, 57, seed=1), text(4, seed=2), clip(name, 160, seed=3)],
        clip(name, 40, seed=4),
    )
    session = many.session(**batch(start))
    rows = [[*start, text(2, seed=2), third, text(3, seed=3)], [*start, text(9, seed=1)], [*start, text(3, seed=4)]]
    longest = length_of(rows[0][len(start) :]) - 1
    # Compiling for eight devices takes seconds: a single question goes to one of the meshes alone.
    for asked, more in [(rows[:1], [0]), (rows, [longest, 0, 0])] if name == "gqa" else [(rows, [0, 0, 0])]:
        inputs = batch(*asked)
        new = session.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
        assert session.reused.tolist() == [length_of(start) + count for count in more]
        np.testing.assert_array_equal(new, one.generate(**inputs, **SETTINGS, max_new_tokens=NEW))
    # A mesh axis of one device splits nothing, so it has no name here.
    specs = session._held.cache.keys[0].sharding.spec
    assert specs[1] == "model"


def test_int8_cache(load, talk):
    """Codes may flip where sums were made in another order: the distribution is the same but for that."""
    model, (start, _) = copy.copy(load("gqa")), talk
    model.cache_dtype = "int8"
    session = model.session(**batch(start))
    assert session._held.cache.keys[0].codes.dtype == np.int8
    for seed in (1, 2):
        inputs = batch([*start, text(6, seed=seed)])
        outputs = [
            each.generate(**inputs, **SETTINGS, max_new_tokens=NEW, return_dict_in_generate=True)
            for each in (session, model)
        ]
        assert session.reused.tolist() == [length_of(start)]
        assert abs(outputs[0].log_probs - outputs[1].log_probs).max() < 0.02
        np.testing.assert_array_equal(outputs[0].sequences, outputs[1].sequences)
    session.generate(**batch([*start, text(60, seed=3)]), **SETTINGS, max_new_tokens=NEW)
    assert session.reused.tolist() == [length_of(start)]


def test_closing_frees_the_memory(load, talk):
    """At once, of a stream under way when that ends; a fork has what it needs."""
    model, (start, _) = load("gqa"), talk
    inputs, options = batch([*start, text(6, seed=1)]), SETTINGS | {"max_new_tokens": NEW}
    with model.session(**batch(start)) as session:
        kept = weakref.ref(session._held.cache.keys[0])
        fork = session.fork()
        unstarted = session.stream(**inputs, **options, tokenizer=Letters())
    assert kept() is not None
    np.testing.assert_array_equal(fork.generate(**inputs, **options), model.generate(**inputs, **options))
    assert kept() is None
    stream = fork.stream(**inputs, **options, tokenizer=Letters())
    next(stream)
    fork.close()
    assert list(stream)
    assert len(fork.input_ids) == 0
    for call in (session.read, session.generate, partial(session.stream, tokenizer=Letters())):
        with pytest.raises(ValueError, match="this session is closed"):
            call(**inputs)
    with pytest.raises(ValueError, match="this session is closed"):
        session.fork()
    with pytest.raises(ValueError, match="this session is closed"):
        next(unstarted)


def test_memory_is_checked_before_it_is_taken(load, talk, monkeypatch):
    """What the session holds makes room for what takes its place, and a refusal loses nothing."""
    model, (start, _) = load("gqa"), talk
    session = model.session(**batch(start))
    inputs = batch([*start, text(4, seed=6)])
    rows = {"rows": 1, "dtype": np.dtype("float32"), "mesh": model.mesh}
    needed = memory.cache_bytes(model.config.text_config, capacity=128, **rows)
    session.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
    assert session._held.cache.capacity == 128
    monkeypatch.setattr(memory, "free_bytes", lambda devices: needed // 10)
    with pytest.raises(ValueError, match=r"a float32 cache of \d rows? x"):
        model.session(**batch(start))
    session.generate(**inputs, **SETTINGS, max_new_tokens=NEW)
    for refused in (batch([*start, text(90, seed=6)]), batch([*start, text(4, seed=6)], [*start, text(3, seed=7)])):
        held = session.input_ids
        with pytest.raises(ValueError, match=r"a float32 cache of \d rows? x"):
            session.generate(**refused, **SETTINGS, max_new_tokens=NEW)
        np.testing.assert_array_equal(session.input_ids, held)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 2 * needed)  # the old cache and the new
    session.generate(**batch([*start, text(90, seed=6)]), **SETTINGS, max_new_tokens=NEW)


def test_refusals(load, talk, monkeypatch):
    model, (start, _) = load("gqa"), talk
    with pytest.raises(ValueError, match="a session holds one prompt, not 2"):
        model.session(**batch(start, [text(3, seed=1)]))
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.session(**batch(start), max_new_tokens=3)
    with pytest.raises(ValueError, match="the model has 1024 positions"):
        model.session(**batch([text(1025, seed=1)]))
    with pytest.raises(ValueError, match="stream takes one prompt"):
        model.session().stream(**batch(start, start), tokenizer=Letters())
    monkeypatch.setattr(session_module, "share_of", lambda mesh: Share(2, 0, (0,), False))
    with pytest.raises(ValueError, match="a session runs in one process"):
        model.session()


def test_the_same_shapes_compile_nothing(load, talk):
    model, (start, _) = load("gqa"), talk
    session, compiled = model.session(**batch(start)), []
    for seed in (1, 2):
        session.generate(**batch([*start, text(6, seed=seed)]), **SETTINGS, max_new_tokens=NEW)

    def listener(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for seed in (3, 4):
            session.generate(**batch([*start, text(7, seed=seed)]), **SETTINGS, max_new_tokens=NEW)
            assert session.reused.tolist() == [length_of(start)]
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
