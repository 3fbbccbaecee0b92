"""Constrained answers: valid by another judge, beside free rows that do not change, and no program of their own."""

import json

import numpy as np
import pytest

llguidance = pytest.importorskip("llguidance")

from grammar_cases import is_valid, random_choices, random_regex, random_schema  # noqa: E402

from qwen2audio_jax import GenerationConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor  # noqa: E402
from qwen2audio_jax.embedded import example  # noqa: E402
from qwen2audio_jax.engine import Engine, Request, RequestError  # noqa: E402
from qwen2audio_jax.generation.grammars import allowed_tokens  # noqa: E402

DIGITS = {
    "type": "object",
    "properties": {"digits": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 4}},
    "required": ["digits"],
    "additionalProperties": False,
}
CASES = (
    {"choices": ["The digits are 4 7 1 9.", "The digits are 3", "yes"]},
    {"regex": "[0-9]( [0-9]){3}"},
    {"json_schema": DIGITS},
    {},
    {"regex": "[a-f]{3}", "do_sample": True, "top_k": 5},
    {"choices": ["yes", "no"], "min_new_tokens": 9},
    {"do_sample": True, "top_k": 0, "temperature": 2.0},
)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    cache = tmp_path_factory.mktemp("embedded")
    return Qwen2AudioForConditionalGeneration.from_pretrained(cache_dir=cache), Qwen2AudioProcessor.from_pretrained()


@pytest.fixture(scope="module")
def inputs(embedded):
    content = [{"type": "audio", "audio": str(example("digits-4719"))}, {"type": "text", "text": "Which digits?"}]
    message = {"role": "user", "content": content}
    return embedded[1].apply_chat_template([message], add_generation_prompt=True, tokenize=True)


def alone(embedded, inputs, options, *, seed):
    model, processor = embedded
    output = model.generate(
        **inputs, max_new_tokens=40, seed=seed, tokenizer=processor, return_dict_in_generate=True, **options
    )
    start = inputs["input_ids"].shape[1]
    ids = output.sequences[0, start : start + output.lengths[0]]
    return processor.decode(ids, skip_special_tokens=True), output.finish_reasons[0]


def test_constrained_and_free_rows_share_slots(embedded, inputs):
    wanted = [alone(embedded, inputs, case, seed=7) for case in CASES]
    for case, (text, reason) in zip(CASES, wanted, strict=True):
        assert reason == "length" or is_valid(text, case) or not {"choices", "regex", "json_schema"} & set(case)
    assert wanted[0][0] == "The digits are 4 7 1 9."
    assert wanted[2][1] == "eos"
    assert list(json.loads(wanted[2][0])) == ["digits"]
    with Engine(*embedded, slots=3) as engine:
        requests = [Request(inputs=inputs, options={**case, "max_new_tokens": 40}, seed=7) for case in CASES * 2]
        answers = list(engine.answers(requests))
    assert [(answer.text, answer.finish_reason) for answer in answers] == wanted * 2


def test_stream_session_and_several_rows(embedded, inputs):
    model, processor = embedded
    options = {"regex": "[0-9]{2}", "tokenizer": processor, "max_new_tokens": 9}
    text = "".join(model.stream(**inputs, **options))
    assert len(text) == 2
    assert text.isdigit()
    assert "".join(model.session().stream(**inputs, **options)) == text
    rows = model.generate(**inputs, **options, do_sample=True, num_return_sequences=3, temperature=3.0, top_k=0, seed=1)
    texts = processor.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(len(one) == 2 and one.isdigit() for one in texts)
    assert len(set(texts)) > 1


def test_a_grammar_that_cannot_be_used(embedded, inputs):
    model, processor = embedded
    for options, message in (
        ({"regex": "[a-z"}, "the grammar of the answer cannot be used"),
        ({"json_schema": {"type": "nope"}}, "cannot be used"),
        ({"json_schema": "["}, "json_schema cannot be read"),
        ({"json_schema": [1]}, "it is no object"),
        ({"choices": []}, "give a list of texts"),
        ({"choices": ["a", "a"]}, "twice"),
        ({"choices": ["a"], "regex": "a"}, "give one of them"),
        ({"regex": "a" * 70_000}, "at most 65536: shorten it"),
        ({"regex": "a", "eos_token_id": []}, "need a stop id"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **options, max_new_tokens=3, tokenizer=processor)
    with pytest.raises(ValueError, match="pass the processor"):
        model.generate(**inputs, regex="a", max_new_tokens=3)
    with Engine(model, processor, slots=1) as engine:
        handle = engine.submit(Request(inputs=inputs, options={"regex": "("}))
        with pytest.raises(RequestError, match="cannot be used") as caught:
            handle.result()
    assert caught.value.kind == "input"


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setattr("qwen2audio_jax.generation.grammars.available", lambda: False)
    with pytest.raises(ValueError, match="llguidance"):
        _ = GenerationConfig(regex="a").grammar


def test_other_rules_give_way_to_the_grammar():
    """Where a rule forbids all that the grammar allows, the grammar holds; elsewhere both do."""
    import jax.numpy as jnp

    from qwen2audio_jax.generation.sampling import _allowed_scores

    logits = jnp.asarray([[0.0, 3.0, 2.0, 1.0] * 10] * 2)
    scores = logits.at[0, 1].set(-jnp.inf).at[1, 33].set(-jnp.inf)
    allowed = np.zeros((2, 2), np.uint32)
    allowed[0, 0] = 0b0110
    allowed[1, 1] = 0b10  # token 33 alone
    found = np.asarray(_allowed_scores(scores, logits, jnp.asarray(allowed)))
    assert np.flatnonzero(np.isfinite(found[0])).tolist() == [2]
    assert np.flatnonzero(np.isfinite(found[1])).tolist() == [33]
    assert allowed_tokens({}, rows=2, width=40).tolist() == [[2**32 - 1] * 2] * 2


def judge(embedded, inputs, counts, *, seed):
    """Random grammars through one engine, every fifth request free; how many answers ended by themselves."""
    rng = np.random.default_rng(seed)
    makers = (random_schema, random_regex, random_choices)
    cases = [maker(rng) for maker, count in zip(makers, counts, strict=True) for _ in range(count)]
    rng.shuffle(cases)
    cases = [case for index, grammar in enumerate(cases) for case in ([{}] if index % 5 == 0 else []) + [grammar]]
    draws = [{"do_sample": True, "top_k": 0, "temperature": 2.0} if rng.random() < 0.5 else {} for _ in cases]
    requests = [
        Request(inputs=inputs, options={**case, **draw, "max_new_tokens": 100}, seed=index)
        for index, (case, draw) in enumerate(zip(cases, draws, strict=True))
    ]
    ended, free = 0, {}
    with Engine(*embedded, slots=8) as engine:
        for case, draw, request, answer in zip(cases, draws, requests, engine.answers(requests), strict=True):
            assert not isinstance(answer, RequestError), (case, answer)
            if not case:
                key = request.seed if draw else None
                if key not in free:
                    free[key] = alone_text(embedded, request)
                assert answer.token_ids.tolist() == free[key]
            elif answer.finish_reason == "eos":
                assert is_valid(answer.text, case), (case, answer.text)
                ended += 1
            else:
                assert answer.finish_reason == "length"
                assert len(answer.token_ids) == 100
    return ended


def alone_text(embedded, request):
    model, processor = embedded
    output = model.generate(
        **request.inputs, **request.options, seed=request.seed, tokenizer=processor, return_dict_in_generate=True
    )
    start = request.inputs["input_ids"].shape[1]
    return output.sequences[0, start : start + output.lengths[0]].tolist()


def test_some_random_grammars(embedded, inputs):
    assert judge(embedded, inputs, (12, 8, 10), seed=0) > 25


@pytest.mark.slow(seconds=90)
def test_many_random_grammars(embedded, inputs):
    assert judge(embedded, inputs, (200, 100, 200), seed=1) > 450


def test_on_the_command_line(tmp_path, capsys, embedded):
    from qwen2audio_jax.cli.main import main

    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(DIGITS))
    words = ["generate", "--audio", "example:digits-4719", "Which digits?"]
    assert main([*words, "--json-schema", str(schema), "--max-new-tokens", "60"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["digits"]
    assert main([*words, "--choice", "yes", "--choice", "no"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    for wrong, said in ((["--regex", "[a"], "cannot be used"), (["--json-schema", "/none"], "give a file")):
        assert main([*words, *wrong]) == 2
        assert said in capsys.readouterr().err
