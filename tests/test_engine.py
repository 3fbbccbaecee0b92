"""The engine answers as `generate` does, whatever else runs, and compiles nothing after its warm-up."""

import threading

import jax
import numpy as np
import pytest
import simulation
from prompts import row_alone

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, make_mesh
from qwen2audio_jax.engine import Engine, EngineFull, Request, RequestError, loop, placement
from qwen2audio_jax.engine import engine as engine_module
from qwen2audio_jax.generation import memory


@pytest.fixture(scope="module")
def processor(hf_checkpoint):
    return Qwen2AudioProcessor.from_pretrained(hf_checkpoint("gqa"))


def simulated(model, processor, programs, cases, *, slots, positions, tokens, seconds):
    with Engine(model, processor, slots=slots, positions=positions) as engine:
        shapes = engine.warmup(tokens=tokens, seconds=seconds)
        assert len(shapes) == len(set(shapes)) > 10
        programs.clear()
        outcomes = simulation.run(engine, cases)
        assert programs == []
        stats = engine.stats()
        assert engine.drain(timeout=1)
    counts = simulation.judge(model, processor, cases, outcomes)
    assert counts["equal"] > len(cases) // 2
    assert counts["errors"] > 0
    assert counts["reused"] > 0
    assert stats["submitted"] == len(cases)
    assert stats["failed"] == counts["errors"]
    assert counts["decided by rounding"] <= max(1, len(cases) // 100)
    assert stats["answered"] == counts["equal"] + counts["decided by rounding"]
    assert stats["slots_in_use"] == stats["queued"] == 0


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("beside", [pytest.param(True, id="beside steps"), pytest.param(False, id="between steps")])
def test_random_requests_are_answered_as_alone(load, processor, programs, monkeypatch, beside):
    monkeypatch.setattr(placement, "SHORTEST", 8)
    monkeypatch.setattr(loop, "two_at_a_time", lambda runtime: beside)
    cases = simulation.random_cases("gqa", 28, seed=5, pool=10, longest=7, frames=23)
    simulated(load("gqa"), processor, programs, cases, slots=2, positions=128, tokens=40, seconds=0.23)


def test_warmup_is_for_the_clips_that_its_prompts_can_hold(load, processor, monkeypatch):
    frames = []
    monkeypatch.setattr("qwen2audio_jax.engine.engine.warm_up", lambda *_, bounds, **__: frames.append(bounds.frames))
    model = load("gqa")
    with Engine(model, processor, slots=1, positions=128) as engine:
        for tokens in (5, 128):
            engine.warmup(tokens=tokens)
    assert frames == [20, min(512, model.config.audio_config.max_frames)]


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("shape", [pytest.param(None, marks=pytest.mark.long_job), (4, 2), (8, 1)])
def test_random_requests_of_all_lengths(load, processor, programs, shape):
    mesh = None if shape is None else make_mesh(data=shape[0], model=shape[1])
    cases = simulation.random_cases("gqa", 500 if shape is None else 300, seed=6)
    simulated(load("gqa", mesh), processor, programs, cases, slots=8, positions=384, tokens=250, seconds=2.6)


@pytest.fixture(scope="module")
def engine(load, processor):
    with Engine(load("gqa"), processor, slots=2, queue=3, positions=256) as engine:
        yield engine


def request(tokens=30, *, which=0, **more):
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, **more.pop("options", {})}
    return Request(inputs=row_alone("gqa", 0, ([4, "9", 3],), seed=which), options=options, **more)


def test_a_handle_gives_tokens_and_text_as_they_come(engine):
    handle = engine.submit(request(id="first"))
    tokens = list(handle)
    answer = handle.result()
    assert tokens == answer.token_ids.tolist() == list(handle)
    assert "".join(handle.text()) == answer.text
    assert (answer.id, answer.finish_reason, len(answer.token_ids)) == ("first", "length", 30)
    assert answer.seconds.load <= answer.seconds.queued <= answer.seconds.first_token <= answer.seconds.total
    assert (answer.prompt_tokens, answer.audio_seconds) == (9, 0.09)


def test_requests_beyond_the_queue_wait_or_are_refused(engine):
    handles = [engine.submit(request(200, which=seed)) for seed in range(5)]
    for how in ({"block": False}, {"timeout": 0.01}):
        with pytest.raises(EngineFull, match="raise queue"):
            handles.extend(engine.submit(request(200), **how) for _ in range(5))
    for handle in handles[1:]:
        handle.cancel()
    assert len(handles[0].result().token_ids) == 200
    assert {handle.result().finish_reason for handle in handles[1:]} <= {"cancelled", "length"}
    assert engine.drain(timeout=60)


def test_a_cancelled_request_frees_its_slot(engine):
    events = []
    for _ in range(2):
        events.append(threading.Event())
        long = engine.submit(
            request(240), on_change=lambda handle, event=events[-1]: event.set() if len(handle._tokens) > 3 else None
        )
        events[-1].wait(timeout=60)
        long.cancel()
        answer = long.result(timeout=60)
        assert answer.finish_reason == "cancelled"
        assert 4 <= len(answer.token_ids) < 240
    assert engine.stats()["slots_in_use"] == 0
    with pytest.raises(TimeoutError, match="no answer within"):
        engine.submit(request(240)).result(timeout=0.001)
    assert engine.drain(timeout=60)


def test_several_questions_on_one_clip_compute_it_once(engine, load):
    begin = row_alone("gqa", 0, ([4, "240", 3],), seed=3)
    before = engine.stats()
    requests = []
    for question in ([7, 8, 9], [7, 8], [11] * 20):
        inputs = {**begin, "input_ids": np.concatenate([begin["input_ids"], [question]], axis=1)}
        inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
        requests.append(Request(inputs=inputs, options={"max_new_tokens": 12}))
    answers = list(engine.answers(requests))
    after = engine.stats()
    assert after["clips_encoded"] - before["clips_encoded"] == 1
    # Whichever is ready first; at least one token of each is computed.
    assert sorted(answer.reused_tokens for answer in answers) in ([0, 67, 68], [0, 67, 69])
    for asked, answer in zip(requests, answers, strict=True):
        alone = load("gqa").generate(**asked.inputs, **asked.options)
        np.testing.assert_array_equal(
            alone[0, asked.inputs["input_ids"].shape[1] :][: len(answer.token_ids)], answer.token_ids
        )


def test_a_clip_whose_vectors_are_gone_is_not_encoded_for_a_rest_without_it(load, processor):
    begin = row_alone("gqa", 0, ([4, "240", 3],), seed=3)
    with Engine(load("gqa"), processor, slots=2, positions=256, clips_kept=0) as engine:
        for question in ([7, 8], [9, 10, 11]):
            inputs = {**begin, "input_ids": np.concatenate([begin["input_ids"], [question]], axis=1)}
            inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
            answer = engine.submit(Request(inputs=inputs, options={"max_new_tokens": 5})).result()
            alone = load("gqa").generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
            np.testing.assert_array_equal(alone[: len(answer.token_ids)], answer.token_ids)
        assert answer.reused_tokens == 67
        assert engine.stats()["clips_encoded"] == 1


def test_options_that_cannot_be_used_are_the_requests_error(engine):
    for options, message in (
        ({"temprature": 1}, "options: .*temperature"),
        ({"num_return_sequences": 2, "do_sample": True}, "submit a request for each"),
        ({"eos_token_id": list(range(9))}, "9 ids, and 8 fit"),
        ({"max_new_tokens": 250, "min_new_tokens": 0}, "engine has 256 a slot: .*raise positions"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            engine.submit(request(5, options=options)).result()
        assert caught.value.kind == "input"
    with pytest.raises(ValueError, match="either messages or a prompt"):
        Request(prompt="a", messages=[])


def steps_and_answers(engine, requests, monkeypatch):
    """The rows that steps had, and the answers, which are those of `generate`."""
    rows, choose = set(), engine._state.choose

    def counted(*options):
        rows.add(engine._state.stepped)
        return choose(*options)

    with monkeypatch.context() as patched:
        patched.setattr(engine._state, "choose", counted)
        answers = list(engine.answers(requests))
    for asked, answer in zip(requests, answers, strict=True):
        alone = engine.model.generate(**asked.inputs, **asked.options)[0, asked.inputs["input_ids"].shape[1] :]
        np.testing.assert_array_equal(alone, answer.token_ids)
    return rows, answers


def test_few_requests_are_computed_in_few_rows(load, processor, monkeypatch):
    """In copies, whose tokens come back into the slots: what a row held can be the beginning of another prompt."""
    with Engine(load("gqa"), processor, slots=8, positions=256) as engine:
        inputs, options = row_alone("gqa", 0, ([4, "240", 3],), seed=3), {"max_new_tokens": 30, "min_new_tokens": 30}
        asked = Request(inputs=inputs, options=options)
        rows, (first,) = steps_and_answers(engine, [asked], monkeypatch)
        assert rows == {1}
        ids = np.concatenate([inputs["input_ids"], [first.token_ids[:28]], [[7, 8]]], axis=1)
        asked = Request(inputs={**inputs, "input_ids": ids, "attention_mask": np.ones_like(ids)}, options=options)
        rows, (again,) = steps_and_answers(engine, [asked], monkeypatch)
        assert (rows, again.reused_tokens) == ({1}, ids.shape[1] - 2)
        # Three, of which the last goes on alone; six are too many, and two steps not worth the copies.
        rows, _ = steps_and_answers(engine, [request(20 + 30 * seed, which=seed) for seed in range(3)], monkeypatch)
        assert {4, 1} <= rows
        assert 8 in steps_and_answers(engine, [request(40, which=seed) for seed in range(6)], monkeypatch)[0]
        assert steps_and_answers(engine, [request(3)], monkeypatch)[0] == {8}


def test_few_rows_of_an_int8_cache(hf_checkpoint, processor, monkeypatch, tmp_path):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(
        hf_checkpoint("gqa"), cache_dtype="int8", cache_dir=tmp_path
    )
    with Engine(model, processor, slots=2, positions=128) as engine:
        assert steps_and_answers(engine, [request(20)], monkeypatch)[0] == {1}


def test_logits_that_are_not_numbers_end_one_request(load, processor, monkeypatch):
    with Engine(load("gqa"), processor, slots=2, positions=128) as engine:
        first_tokens = engine._state.first_tokens

        def spoilt(logits, embedded, rows):
            bad = np.array([[np.nan if row.seed == 13 else 0.0] for row in rows] + [[0.0]] * (len(logits) - len(rows)))
            return first_tokens(logits + bad, embedded, rows)

        monkeypatch.setattr(engine._state, "first_tokens", spoilt)
        good, bad = engine.submit(request(9)), engine.submit(request(9, seed=13))
        assert len(good.result().token_ids) == 9
        with pytest.raises(RequestError, match=r"not numbers .*token 1"):
            bad.result()


@pytest.mark.parametrize("program", ["forward", "choose", "first_tokens"])
def test_an_error_of_the_device_ends_all_requests_with_one(load, processor, monkeypatch, program):
    with Engine(load("gqa"), processor, slots=2, positions=128) as engine:
        submitted = threading.Event()

        def fail(*arguments):
            submitted.wait()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(engine._state, program, fail)
        handles = [engine.submit(request(9, which=seed)) for seed in range(4)]
        submitted.set()
        for handle in handles:
            with pytest.raises(RequestError, match=r"device failed \(JaxRuntimeError\)") as caught:
                handle.result(timeout=60)
            assert caught.value.kind == "device"
        with pytest.raises(RuntimeError, match="device failed"):
            engine.submit(request(9))


def test_prompts_that_are_ready_before_a_slot_is_free_can_be_cancelled(load, processor, monkeypatch):
    def long_prompt(seed):
        inputs = row_alone("gqa", 0, ([4, "9", 40],), seed=seed)
        return Request(inputs=inputs, options={"max_new_tokens": 9, "min_new_tokens": 9})

    with Engine(load("gqa"), processor, slots=2, positions=256) as engine:
        forward, seen = engine._state.forward, threading.Event()
        monkeypatch.setattr(engine._state, "forward", lambda: (seen.wait(timeout=0.1), forward())[1])
        running = [engine.submit(request(240, which=seed)) for seed in (5, 6)]
        for handle in running:
            assert next(iter(handle)) >= 0  # or another could be prepared, and have a slot, before it
        ahead = [engine.submit(long_prompt(seed)) for seed in (1, 2)]
        for handle in ahead:
            assert next(iter(handle)) >= 0  # its first token needs no slot
        assert not any(handle.done for handle in running)
        ahead[0].cancel()
        seen.set()
        answers = [handle.result(timeout=60) for handle in (*ahead, *running)]
    assert [answer.finish_reason for answer in answers] == ["cancelled", "length", "length", "length"]
    assert [len(answer.token_ids) for answer in answers[1:]] == [9, 240, 240]


@pytest.mark.parametrize("busy", [False, True])
def test_a_closed_engine_leaves_nobody_waiting(load, processor, busy):
    engine = Engine(load("gqa"), processor, slots=1, positions=256)
    if busy:
        first = engine.submit(request(30))
        assert next(iter(first)) >= 0
    handles = [engine.submit(request(240, which=seed)) for seed in range(4)]
    if busy:
        first.result()
    engine.close()
    for handle in handles:
        with pytest.raises(RequestError, match="closed"):
            handle.result(timeout=60)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request(9))


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40, 100, 10**6])
def test_the_default_slots_leave_room_for_the_copies_of_few_rows(load, processor, monkeypatch, rows):
    """Without the fifth of an accelerator's memory that is left free."""
    model = load("gqa")
    shape = {"capacity": 128, "dtype": np.dtype("float32"), "mesh": model.mesh}
    one = memory.cache_bytes(model.config.text_config, rows=1, **shape)
    for module in (memory, engine_module):
        monkeypatch.setattr(module, "free_bytes", lambda devices: int(one * rows / 0.8) + 1)
    with Engine(model, processor, positions=128) as engine:
        few = max(engine._state.steps[:-1], default=0)
        assert engine.slots + few <= max(rows, 1)
        assert engine.slots == 256 or rows - engine.slots - few < 17


def test_numbers_out_of_range_are_refused(load, processor):
    for more, message in (
        ({"slots": 0}, "slots=0: at least 1"),
        ({"positions": 10**6}, "positions=1000000: a slot has 1 to"),
        ({"queue": 0}, "queue=0"),
        ({"workers": -1}, "workers=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(load("gqa"), processor, **more)
