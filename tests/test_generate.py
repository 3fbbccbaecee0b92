"""Generation against the reference's `generate`, and each row against that row alone."""

import numpy as np
import pytest
import tiny
from judge import in_float64, relative_error
from prompts import RAGGED, as_torch, random_inputs, row_alone
from record_reference import NEW_TOKENS, PENALTIES, RECORD, SETTINGS, greedy_tokens, last_logits

from qwen2audio_jax.generation import call, decoding, encoding, run

NAMES = tuple(tiny.CONFIGS)


@pytest.fixture(scope="session")
def recorded():
    """The reference's recorded output: see record_reference.py."""
    with np.load(RECORD) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(n, marks=pytest.mark.slow(seconds=35)) for n in NAMES if n != "tied")]
)
def test_the_record_is_the_references(reference, recorded, name):
    model = reference(name)
    exact = last_logits(name)(in_float64(model))
    # The cosines of RoPE's float32 angles are the processor's.
    assert relative_error(recorded[f"{name}/logits"], exact) < 1e-6
    for penalty in PENALTIES:
        np.testing.assert_array_equal(recorded[f"{name}/{penalty}"], greedy_tokens(model, name, penalty))


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_record(load, recorded, name):
    logits = load(name)(**random_inputs(name)).logits[:, -1]
    assert relative_error(logits, recorded[f"{name}/logits"]) < recorded[f"{name}/allowed"]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow(seconds=14)) if n != "gqa" else n for n in NAMES]
)
def test_greedy_tokens_equal_the_references_rows_alone(load, recorded, name, penalty):
    """Batched with padding on either side, and alone."""
    wanted = recorded[f"{name}/{penalty}"]
    assert len(np.unique(wanted)) > 10
    model = load(name)
    options = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": penalty, **SETTINGS}
    for side in ("left", "right"):
        inputs = random_inputs(name, side=side)
        width = inputs["input_ids"].shape[1]
        sequences = model.generate(**inputs, **options)
        np.testing.assert_array_equal(sequences[:, :width], inputs["input_ids"])
        np.testing.assert_array_equal(sequences[:, width:], wanted[:, : sequences.shape[1] - width])
    for row in range(len(RAGGED)):
        alone = row_alone(name, row)
        new = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        np.testing.assert_array_equal(new, wanted[row, : len(new)])


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_the_references_padded_batch(reference, load, name, penalty):
    inputs = random_inputs(name)
    options = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": penalty, **SETTINGS}
    np.testing.assert_array_equal(
        load(name).generate(**inputs, **options), reference(name).generate(**as_torch(inputs), **options).numpy()
    )


@pytest.mark.parametrize("cache_dtype", ["auto", pytest.param("int8", marks=pytest.mark.slow(seconds=10))])
def test_a_cache_that_grows_changes_no_token(load, monkeypatch, cache_dtype):
    """Begun with room for one more token, and for all."""
    same, inputs = load("gqa"), random_inputs("gqa")
    model = type(same)(same.config, same.params, cache_dtype=cache_dtype)
    capacities = []
    step = decoding.next_step

    def counted(runtime, last, cache, stopped, sampling, *, mode):
        capacities.append(cache.capacity)
        return step(runtime, last, cache, stopped, sampling, mode=mode)

    monkeypatch.setattr(decoding, "next_step", counted)
    options = {"max_new_tokens": 300, **SETTINGS, "eos_token_id": []}
    monkeypatch.setattr(call, "ROOM", 1000)
    whole = model.generate(**inputs, **options)
    fixed = sorted(set(capacities))
    capacities.clear()
    monkeypatch.setattr(call, "ROOM", 1)
    np.testing.assert_array_equal(model.generate(**inputs, **options), whole)
    assert len(fixed) == 1
    assert sorted(set(capacities)) == [*range(128, fixed[0] + 1, 128)]
    assert capacities == sorted(capacities)
    tokens = inputs["attention_mask"].sum(1).max()
    assert all(tokens + index + 1 <= capacity < tokens + index + 1 + 128 for index, capacity in enumerate(capacities))


def test_stop_ids_and_padding_of_finished_rows(reference, load):
    inputs = random_inputs("gqa")
    width = inputs["input_ids"].shape[1]
    free = load("gqa").generate(**inputs, **SETTINGS, max_new_tokens=12)[:, width:]
    stop = [int(free[0, 2]), int(free[3, 5])]
    options = SETTINGS | {"eos_token_id": stop, "max_new_tokens": 12}
    output = load("gqa").generate(**inputs, **options, return_dict_in_generate=True)
    np.testing.assert_array_equal(output.sequences, reference("gqa").generate(**as_torch(inputs), **options).numpy())
    for row, reason in enumerate(output.finish_reasons):
        new = output.sequences[row, width : width + output.lengths[row]]
        assert (reason == "eos") == (new[-1] in stop)
        assert not np.isin(new[:-1], stop).any()
        assert (output.sequences[row, width + output.lengths[row] :] == tiny.END_OF_TEXT).all()
        assert (output.log_probs[row, output.lengths[row] :] == 0).all()
    assert "eos" in output.finish_reasons

    # A minimum keeps the stop ids out until it is reached; max_length counts the prompt.
    options = SETTINGS | {"eos_token_id": stop, "min_new_tokens": 8, "max_length": width + 12}
    ours = load("gqa").generate(**inputs, **options)
    np.testing.assert_array_equal(ours, reference("gqa").generate(**as_torch(inputs), **options).numpy())
    assert not np.isin(ours[:, width : width + 8], stop).any()


def test_log_probs_are_the_models_own(load):
    model, inputs = load("gqa"), random_inputs("gqa")
    output = model.generate(
        **inputs, **SETTINGS, max_new_tokens=5, repetition_penalty=1.3, return_dict_in_generate=True
    )
    width = inputs["input_ids"].shape[1]
    longer = dict(inputs, input_ids=output.sequences)
    longer["attention_mask"] = np.pad(inputs["attention_mask"], ((0, 0), (0, 5)), constant_values=1)
    logits = np.asarray(model(**longer).logits[:, width - 1 : -1], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, output.sequences[:, width:, None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(output.log_probs, chosen, atol=1e-4)


def test_sampled_rows_depend_on_their_seed_alone(load):
    model = load("gqa")
    options = SETTINGS | {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "max_new_tokens": 12}
    inputs = random_inputs("gqa")
    width = inputs["input_ids"].shape[1]
    batch = model.generate(**inputs, **options, seed=[11, 5, 7, 11])[:, width:]
    for row, seed in enumerate([11, 5, 7, 11]):
        alone = row_alone("gqa", row)
        new = model.generate(**alone, **options, seed=seed)[0, alone["input_ids"].shape[1] :]
        np.testing.assert_array_equal(new, batch[row, : len(new)])
    assert (model.generate(**inputs, **options, seed=3)[:, width:] != batch).any()

    # An int s is s, s + 1, ... over the returned rows, copies of one prompt next to each other.
    copies = model.generate(**inputs, **options, seed=20, num_return_sequences=3)
    assert len(copies) == 12
    np.testing.assert_array_equal(copies[:, :width], np.repeat(inputs["input_ids"], 3, axis=0))
    alone = row_alone("gqa", 2)
    for copy in range(3):
        new = model.generate(**alone, **options, seed=20 + 2 * 3 + copy)[0, alone["input_ids"].shape[1] :]
        np.testing.assert_array_equal(copies[6 + copy, width : width + len(new)], new)


class Letters:
    """A tokenizer whose token i is the letter i modulo 26."""

    def decode(self, ids, *, skip_special_tokens=False):
        return "".join(chr(ord("a") + int(i) % 26) for i in ids)


@pytest.mark.smoke
def test_stop_strings_end_each_row_by_itself(load, monkeypatch):
    model, inputs = load("gqa"), random_inputs("gqa")
    width = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, **SETTINGS, max_new_tokens=20)[:, width:]
    text = Letters().decode(free[0])
    stop = text[5:8]
    output = model.generate(
        **inputs,
        **SETTINGS,
        max_new_tokens=20,
        stop_strings=[stop],
        tokenizer=Letters(),
        return_dict_in_generate=True,
    )
    assert output.finish_reasons[0] == "stop_string"
    for row, length in enumerate(output.lengths):
        written = Letters().decode(free[row])
        end = written.find(stop) + 3 if stop in written else 20
        assert length == min(end, 20)
        np.testing.assert_array_equal(output.sequences[row, width : width + length], free[row, :length])
        assert (output.sequences[row, width + length :] == tiny.END_OF_TEXT).all()
    monkeypatch.setattr(encoding, "encode_audio", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(ValueError, match="tokenizer="):
        model.generate(**inputs, stop_strings=["x"])


def drained(generator):
    """A generator's items and its return value."""
    yielded = []
    while True:
        try:
            yielded.append(next(generator))
        except StopIteration as end:
            return yielded, end.value


@pytest.mark.smoke
def test_stream_yields_what_generate_returns(load):
    model, inputs = load("gqa"), row_alone("gqa", 1)
    new = model.generate(**inputs, **SETTINGS, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    pieces, reason = drained(model.stream(**inputs, **SETTINGS, max_new_tokens=9, tokenizer=Letters()))
    assert reason == "length"
    assert len(pieces) == 9
    assert "".join(pieces) == Letters().decode(new)
    with pytest.raises(ValueError, match="one prompt"):
        model.stream(**random_inputs("gqa"), tokenizer=Letters())


def test_the_host_runs_one_step_ahead(load, monkeypatch):
    """The next step is issued before this one's tokens are read, and none is issued beyond the budget."""
    events = []
    issue, read = decoding.next_step, decoding.own_rows
    monkeypatch.setattr(decoding, "next_step", lambda *a, **k: (events.append("issue"), issue(*a, **k))[1])
    monkeypatch.setattr(decoding, "own_rows", lambda *a: (events.append("read"), read(*a))[1])
    load("gqa").generate(**row_alone("gqa", 0), **SETTINGS, max_new_tokens=4)
    assert events == ["issue", "read", "issue", "read", "issue", "read", "read"]


def test_a_second_call_of_the_same_shapes_compiles_nothing(load):
    """Other tokens, lengths within the listed shape, penalty and temperature: the same programs."""
    import jax

    model = load("gqa")
    options = SETTINGS | {"do_sample": True, "seed": 1, "max_new_tokens": 6}
    model.generate(**random_inputs("gqa"), **options)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        other = random_inputs("gqa", rows=([7], [2, "all", 3], ["5", 2, "59"], [9, "111", "160", 4, "41", 9]), seed=4)
        model.generate(**other, **options | {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 9})
        assert compiled == []
        model.generate(**random_inputs("gqa", rows=([200],)), **options)
        assert compiled  # the count can count
    finally:
        jax.monitoring.clear_event_listeners()


def test_the_cache_is_donated(load):
    from qwen2audio_jax.model.kv_cache import empty_cache

    model = load("gqa")
    cache = empty_cache(model.config.text_config, rows=2, capacity=16, dtype=np.float32)
    counts = np.array([4, 2])
    run.append(model.params, np.zeros((2, 4, 48), np.float32), cache, counts=counts, cfg=model.config, window=16)
    assert all(buffer.is_deleted() for buffer in (*cache.keys, *cache.values))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_new_tokens": 1000}, ValueError, r"1000 new ones make .*, but the model has 1024 positions"),
        ({"num_beams": 4}, ValueError, "num_beams"),
        ({"temprature": 1.0}, TypeError, "temperature"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature"),
        ({"max_length": 10, "max_new_tokens": None}, ValueError, "max_length=10 counts the prompt"),
        ({"seed": [1, 2, 3], "do_sample": True}, ValueError, r"shape \(3,\) for 4 rows"),
        ({"seed": -1, "do_sample": True}, ValueError, "seed=-1"),
        ({"eos_token_id": 5000}, ValueError, "eos_token_id 5000"),
        ({"input_features": None}, ValueError, "feature_attention_mask came without input_features"),
        ({"feature_attention_mask": None}, ValueError, "without feature_attention_mask"),
        ({"input_features": None, "feature_attention_mask": None}, ValueError, "audio positions, but the 0 clips"),
        ({"attention_mask": np.ones((2, 2))}, ValueError, r"attention_mask has shape \(2, 2\)"),
        ({"attention_mask": np.zeros((4, 102), int)}, ValueError, "row 0 has no tokens"),
        ({"input_ids": np.full((4, 102), 321)}, ValueError, r"is 321, but the vocabulary has ids 0 to 320"),
        ({"input_ids": np.zeros((4, 102))}, ValueError, "dtype float64"),
        ({"input_features": np.zeros((6, 80, 300), np.float32)}, ValueError, r"takes \(clips, 128 mels, 300 frames\)"),
        ({"input_features": np.full((6, 128, 300), np.nan)}, ValueError, "clip 0 holds NaN or Inf"),
    ],
)
def test_bad_input_is_an_error_before_any_compute(load, monkeypatch, change, error, message):
    model = load("gqa")
    for module, name in ((encoding, "encode_audio"), (run, "prefill"), (decoding, "next_step")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(error, match=message):
        model.generate(**(random_inputs("gqa") | {"max_new_tokens": 4} | change))


def test_holes_in_the_mask(reference, load):
    """The reference's `generate` counts positions over what is kept, and so do we; its bare call does not."""
    inputs = random_inputs("gqa")
    inputs["attention_mask"][3, -3] = 0
    ours = load("gqa").generate(**inputs, **SETTINGS, max_new_tokens=12)
    theirs = reference("gqa").generate(**as_torch(inputs), **SETTINGS, max_new_tokens=12).numpy()
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="attention_mask of row 3 has a 0 between tokens"):
        load("gqa")(**inputs)


def test_clips_split_wrongly_between_rows_are_an_error(load):
    inputs = random_inputs("gqa", rows=(["40", 2], ["80", 3]))
    for key in ("input_features", "feature_attention_mask"):
        inputs[key] = inputs[key][::-1]
    with pytest.raises(ValueError, match="row 0 has 10 audio positions, which does not end where a clip ends"):
        load("gqa").generate(**inputs)


def test_masks_that_lie_about_clips_are_errors(load):
    inputs = random_inputs("gqa", rows=(["40", 2],))
    holes = inputs["feature_attention_mask"].copy()
    holes[0, 3] = 0
    with pytest.raises(ValueError, match="ones up to the clip's end"):
        load("gqa").generate(**(inputs | {"feature_attention_mask": holes}))
    short = np.zeros_like(holes)
    short[0, :2] = 1
    with pytest.raises(ValueError, match="clip 0 has 2 valid frames; at least 3"):
        load("gqa").generate(**(inputs | {"feature_attention_mask": short}))
