"""What else shapes an answer: repeated n-grams, functions of the caller, time, and streamers that are handed tokens."""

import io
import threading
from contextlib import redirect_stdout

import jax.numpy as jnp
import numpy as np
import pytest
from prompts import as_torch, random_inputs, row_alone
from record_reference import NEW_TOKENS, SETTINGS

from qwen2audio_jax import Qwen2AudioProcessor, TextIteratorStreamer, TextStreamer
from qwen2audio_jax.engine import Engine, Request, RequestError

OPTIONS = {**SETTINGS, "max_new_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def model(load):
    return load("gqa")


@pytest.fixture(scope="module")
def processor(hf_checkpoint):
    return Qwen2AudioProcessor.from_pretrained(hf_checkpoint("gqa"))


def new(sequences, inputs):
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.slow(seconds=4)
def test_repeated_n_grams_are_the_reference_s(model, reference):
    """`test_sampling` compares the scores; here every earlier token of prompt and answer is refused."""
    inputs, options = random_inputs("gqa"), OPTIONS | {"max_new_tokens": 10, "no_repeat_ngram_size": 1}
    ours = model.generate(**inputs, **options)
    np.testing.assert_array_equal(ours, reference("gqa").generate(**as_torch(inputs), **options).numpy())
    assert not np.array_equal(ours, model.generate(**inputs, **options | {"no_repeat_ngram_size": 0}))


def test_rows_of_an_engine_have_their_own(model, processor):
    """Together, each as `generate` gives it alone."""
    alone = row_alone("gqa", 0, ([4, "9", 3],), seed=1)
    choices = [
        {"no_repeat_ngram_size": 1},
        {},
        {"do_sample": True, "min_p": 0.4, "top_k": 0},
        {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 2},
    ]
    with Engine(model, processor, slots=2, positions=128) as engine:
        requests = [Request(inputs=alone, options={**OPTIONS, **choice}, seed=7) for choice in choices]
        answers = list(engine.answers(requests))
        for name in ("logits_processor", "stopping_criteria"):
            [refused] = engine.answers([Request(inputs=alone, options={name: [len]})])
            assert isinstance(refused, RequestError)
            assert f"{name}=" in str(refused)
            assert "in the engine" in str(refused)
        [late] = engine.answers([Request(inputs=alone, options={**OPTIONS, "eos_token_id": [], "max_time": 1e-9})])
    for choice, answer in zip(choices, answers, strict=True):
        expected = new(model.generate(**alone, **OPTIONS | choice, seed=7), alone)[0]
        assert answer.token_ids.tolist() == expected[: len(answer.token_ids)].tolist()
    assert len({tuple(answer.token_ids.tolist()) for answer in answers}) == 4
    assert (late.finish_reason, len(late.token_ids)) == ("time", 1)


def only_even(ids, scores):
    return jnp.where(jnp.arange(scores.shape[-1]) % 2 == 0, scores, -jnp.inf)


def not_the_last(ids, scores):
    """No token twice in a row: what a function can do with the ids."""
    last = jnp.max(jnp.where(jnp.arange(ids.shape[1]) == (ids >= 0).sum(1, keepdims=True) - 1, ids, -1), axis=1)
    return jnp.where(jnp.arange(scores.shape[-1]) == last[:, None], -jnp.inf, scores)


def test_logits_processors(model, processor):
    inputs = random_inputs("gqa")
    options = OPTIONS | {"eos_token_id": []}
    even = new(model.generate(**inputs, **options, logits_processor=only_even), inputs)
    assert (even % 2 == 0).all()
    both = new(model.generate(**inputs, **options, logits_processor=[only_even, not_the_last]), inputs)
    assert (both % 2 == 0).all()
    assert (both[:, 1:] != both[:, :-1]).all()
    assert (both[:, 0] != inputs["input_ids"][:, -1]).all()
    alone = row_alone("gqa", 0)
    with model.session() as session:
        same = new(session.generate(**alone, **options, logits_processor=only_even), alone)
    np.testing.assert_array_equal(same[0], even[0])
    text = "".join(model.stream(alone, tokenizer=processor, **options, logits_processor=[only_even]))
    assert text == processor.decode(even[0], skip_special_tokens=True)
    drawn = model.generate(**alone, **options | {"do_sample": True}, seed=3, logits_processor=only_even)
    assert (new(drawn, alone) % 2 == 0).all()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda ids, scores: scores[:, :5], "gives .* for scores of shape"),
        (lambda scores: scores, "cannot be compiled .*write a pure function"),
        (lambda ids, scores: scores.clone(), "cannot be compiled .AttributeError"),
        (lambda ids, scores: scores if ids[0, 0] > 0 else -scores, "cannot be compiled"),
        ("even", "holds 'e', a str"),
    ],
)
def test_functions_that_are_none_for_logits(function, words, model):
    with pytest.raises(ValueError, match=words):
        model.generate(**row_alone("gqa", 0), logits_processor=function)


def test_stopping_criteria(model, processor):
    inputs = random_inputs("gqa")
    width, options = inputs["input_ids"].shape[1], OPTIONS | {"eos_token_id": []}
    free = new(model.generate(**inputs, **options), inputs)
    seen = []

    def long_enough(ids, scores):
        seen.append(ids)
        return ids.shape[1] >= width + 4

    found = model.generate(**inputs, **options, stopping_criteria=long_enough, return_dict_in_generate=True)
    np.testing.assert_array_equal(new(found.sequences, inputs), free[:, :4])
    np.testing.assert_array_equal(seen[-1], found.sequences)
    assert set(found.finish_reasons) == {"stopping_criteria"}
    wanted = int(free[0, 2])
    found = model.generate(
        **inputs,
        **options,
        stopping_criteria=[lambda ids, scores: ids[:, -1] == wanted],
        return_dict_in_generate=True,
    )
    for row, reason in enumerate(found.finish_reasons):
        length = int(found.lengths[row])
        np.testing.assert_array_equal(new(found.sequences, inputs)[row, :length], free[row, :length])
        assert (wanted in free[row]) == (reason == "stopping_criteria") == (free[row, length - 1] == wanted)
    pieces = model.stream(row_alone("gqa", 0), tokenizer=processor, **options, stopping_criteria=lambda ids, _: True)
    assert "".join(pieces) == processor.decode(free[0, :1], skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"gives int64 of shape \[\]: return a bool"):
        model.generate(**inputs, **options, stopping_criteria=lambda ids, scores: 3)


def test_the_reference_s_own_criterion(model):
    transformers = pytest.importorskip("transformers")
    inputs = random_inputs("gqa")
    width = inputs["input_ids"].shape[1]
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=width + 2)])
    sequences = model.generate(**inputs, **OPTIONS | {"eos_token_id": []}, stopping_criteria=list(criteria))
    assert sequences.shape[1] == width + 2


def test_time_ends_rows(model):
    inputs = random_inputs("gqa")
    options = OPTIONS | {"eos_token_id": []}
    found = model.generate(**inputs, **options, max_time=1e-9, return_dict_in_generate=True)
    assert set(found.finish_reasons) == {"time"}
    assert found.lengths.tolist() == [1] * len(found.lengths)
    whole = model.generate(**inputs, **options, max_time=1e6, return_dict_in_generate=True)
    assert set(whole.finish_reasons) == {"length"}
    for seconds in (0, -1, float("inf"), True):
        with pytest.raises(ValueError, match=r"max_time=.*above 0"):
            model.generate(**inputs, max_time=seconds)


def test_streamers(model, processor):
    alone = row_alone("gqa", 0)
    ids = new(model.generate(**alone, **OPTIONS), alone)[0]
    prompt, answer = processor.decode(alone["input_ids"][0]), processor.decode(ids)
    with redirect_stdout(io.StringIO()) as said:
        model.generate(alone, **OPTIONS, streamer=TextStreamer(processor))
    assert said.getvalue() == prompt + answer + "\n"
    streamer = TextIteratorStreamer(processor, skip_prompt=True, timeout=60)
    with model.session() as session:
        thread = threading.Thread(target=session.generate, args=(alone,), kwargs={**OPTIONS, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == answer
        thread.join()


def test_a_streamer_ends_where_generate_fails(model, processor):
    streamer = TextIteratorStreamer(processor, timeout=60)
    with pytest.raises(ValueError, match="num_beams=4"):
        model.generate(row_alone("gqa", 0), num_beams=4, streamer=streamer)
    assert list(streamer) == []
