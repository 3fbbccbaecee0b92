"""A prompt whose logits are not numbers ends by itself: what runs beside it or after it in its place goes on."""

import json
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_processor import write_processor_files

from qwen2audio_jax import TextIteratorStreamer
from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.batch.across_hosts import MeshAnswerer
from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.engine import Engine, Request, RequestError
from qwen2audio_jax.generation.decoding import LogitsError
from qwen2audio_jax.generation.scoring import score_continuations
from qwen2audio_jax.model.qwen2_audio import init_params
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.tasks.embeddings import embed
from qwen2audio_jax.tasks.labels import classify
from qwen2audio_jax.tasks.task import find_task

SPOILT = "~"
"""The text whose token has a vector of NaN."""
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("files"), max_frames=300))


@pytest.fixture(scope="module")
def token(processor):
    [found] = processor.tokenizer.encode(SPOILT)
    return found


def changed(params, **edits):
    """The parameters with some of them changed, each by a part of its path."""

    def edit(path, value):
        for name, change in edits.items():
            if name in jax.tree_util.keystr(path):
                return change(value)
        return value

    return jax.tree_util.tree_map_with_path(edit, params)


@pytest.fixture(scope="module")
def small():
    """A configuration of one layer, and its parameters."""
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    text, audio = replace(config.text_config, num_hidden_layers=1), replace(config.audio_config, encoder_layers=1)
    config = replace(config, text_config=text, audio_config=audio)
    return config, jax.jit(lambda: init_params(config, seed=0))()


@pytest.fixture(scope="module")
def model(token, small):
    config, params = small
    spoilt = changed(
        params,
        embed_tokens=lambda table: table.at[token].set(jnp.nan),
        lm_head=lambda head: head.at[:, token].set(0),  # so that it is not drawn
    )
    return Qwen2AudioForConditionalGeneration(config, spoilt)


def ids_of(length, token, *, bad, seed=0):
    ids = np.random.default_rng(seed).integers(0, 300, (1, length))
    ids[ids == token] = token + 1
    if bad:
        ids[0, length // 3 :] = token
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture
def long_bad(token):
    return ids_of(150, token, bad=True)


@pytest.fixture
def goods(token):
    return [ids_of(length, token, bad=False, seed=length) for length in (5, 14)]


def alone(model, inputs):
    return model.generate(**inputs, **NEW)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("cache_dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow(seconds=6))])
def test_the_engine_s_other_requests(model, processor, long_bad, goods, cache_dtype):
    model = (
        model
        if cache_dtype == "float32"
        else Qwen2AudioForConditionalGeneration(model.config, model.params, cache_dtype=cache_dtype)
    )
    asked = [goods[1], long_bad, *goods, long_bad, *goods]
    with Engine(model, processor, slots=2, positions=256) as engine:
        outcomes = list(engine.answers(Request(inputs=inputs, options=NEW) for inputs in asked))
        assert engine.stats()["failed"] == 2
    for inputs, outcome in zip(asked, outcomes, strict=True):
        if inputs is long_bad:
            assert isinstance(outcome, RequestError)
            assert (outcome.kind, "computed in float32; token 1" in str(outcome)) == ("logits", True)
        else:
            assert outcome.token_ids.tolist() == alone(model, inputs)


def test_a_session_after_it(model, long_bad, goods):
    session = model.session()
    for good in goods:
        begun = {name: value.copy() for name, value in long_bad.items()}
        begun["input_ids"][0, : good["input_ids"].shape[1] - 2] = good["input_ids"][0, :-2]  # in part the same
        with pytest.raises(LogitsError):
            session.generate(**begun, **NEW)
        assert session.generate(**good, **NEW)[0, good["input_ids"].shape[1] :].tolist() == alone(model, good)
        assert session.reused[0] > 0


def test_a_padded_batch_names_the_row(model, token, goods):
    rows = [ids["input_ids"][0] for ids in goods]
    ids = np.full((3, 14), tiny.END_OF_TEXT)
    mask = np.zeros_like(ids)
    for place, row in enumerate([*rows, np.full(9, token)]):
        ids[place, 14 - len(row) :], mask[place, 14 - len(row) :] = row, 1
    with pytest.raises(LogitsError, match="token 1 of row 2"):
        model.generate(input_ids=ids, attention_mask=mask, **NEW)


@pytest.mark.parametrize("kind", [Answerer, MeshAnswerer])
def test_records_of_a_batch_job(model, processor, kind):
    def record(name, prompt):
        return Record(name, f"m.jsonl:{name}", prompt=prompt, options={"max_new_tokens": 4})

    answerer = kind(slots=4, positions=256)
    answerer._loaded = model, processor
    records = [record("0", "hello"), record("1", f"say {SPOILT} now"), record("2", "what?"), record("3", "hello")]
    rows = answerer(records)
    answerer.close()
    assert [row.get("error", {}).get("kind") for row in rows] == [None, "logits", None, None]
    assert "computed in float32" in rows[1]["error"]["message"]
    assert rows[0]["text"] == rows[3]["text"]
    others = kind(slots=4, positions=256)
    others._loaded = model, processor
    assert [row["text"] for row in others([records[2]])] == [rows[2]["text"]]
    others.close()


def test_streamers_end(model, processor, token):
    streamer, raised = TextIteratorStreamer(processor, skip_prompt=True, timeout=60), []

    def generate():
        try:
            model.generate(**ids_of(9, token, bad=True), streamer=streamer, **NEW)
        except ValueError as error:
            raised.append(error)

    thread = Thread(target=generate)
    thread.start()
    assert "".join(streamer) == ""
    thread.join()
    assert isinstance(raised[0], LogitsError)


def test_scores_and_labels(model, processor, long_bad, goods, token):
    found = score_continuations(model.runtime, goods[0], [[3, 4], [5]])
    assert all(np.isfinite(each).all() for each in found)
    with pytest.raises(LogitsError, match="token 1 of continuation 0"):
        score_continuations(model.runtime, long_bad, [[3, 4]])
    with pytest.raises(LogitsError, match="token 3 of continuation 1"):
        score_continuations(model.runtime, goods[0], [[3, 4], [5, token, 6]])
    clip = np.zeros(8000, np.float32)
    task = find_task("choose", kind="instruct", labels={"yes": "yes", "no": "no"})
    assert classify(model, processor, clip, task=task).probabilities.sum() == pytest.approx(1)
    with pytest.raises(LogitsError, match="of continuation 1"):
        classify(model, processor, clip, task=replace(task, labels={"yes": "yes", "no": f"no {SPOILT} no"}))


def test_audio_features(processor, small):
    config, params = small
    spoilt = changed(params, conv1=lambda value: value * jnp.nan)
    with pytest.raises(LogitsError, match=r"audio features are not numbers \(computed in float32; the piece at 0 s\)"):
        embed(Qwen2AudioForConditionalGeneration(config, spoilt), processor, np.zeros(8000, np.float32))


def test_float16_that_overflows_and_the_remedy(processor, small):
    """Weights whose activations exceed 65504, as the published model's do."""
    config, params = small
    large = changed(params, gate_proj=lambda value: value * 3000, up_proj=lambda value: value * 3000)
    inputs = processor(text="hello the user")
    half, whole = (
        Qwen2AudioForConditionalGeneration(replace(config, dtype=dtype), large) for dtype in ("float16", "float32")
    )
    with pytest.raises(LogitsError, match=r"computed in float16.*dtype='bfloat16' or 'float32'"):
        half.generate(**inputs, **NEW)
    assert np.isfinite(whole.generate(**inputs, **NEW, return_dict_in_generate=True).log_probs).all()


def test_the_server_says_so(model, processor, small):
    httpx = pytest.importorskip("httpx", reason="the server needs the extra `serve`")
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    from served import served

    from qwen2audio_jax.serve.app import Settings, make_app

    ready = SimpleNamespace(ready=True, error=None, done=0, total=0)

    def ask(url, text, **more):
        chat = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{url}/v1/chat/completions", json={**chat, **more})

    def events(answer):
        return [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]

    with (
        Engine(model, processor, slots=2, positions=256) as engine,
        served(make_app(engine, processor, Settings("tiny"), ready)) as url,
    ):
        for stream in (False, True):
            answer = ask(url, SPOILT, stream=stream)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "logits")
            assert "computed in float32" in error["message"]
        whole = ask(url, "hello", stream=True)
        assert events(whole)[-1] == "[DONE]"
        assert 'kind="logits"' in httpx.get(f"{url}/metrics").text
    # The first token is sound, and what comes after it is not.
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=True
    )
    first = int(model.generate(**inputs, max_new_tokens=1)[0, -1])
    late = changed(model.params, embed_tokens=lambda table: table.at[first].set(jnp.nan))
    with (
        Engine(Qwen2AudioForConditionalGeneration(model.config, late), processor, slots=2, positions=256) as engine,
        served(make_app(engine, processor, Settings("tiny"), ready)) as url,
    ):
        answer = ask(url, "hello", stream=True)
        error = json.loads(events(answer)[-1])["error"]
        assert (answer.status_code, error["code"]) == (200, "logits")
        assert "token 2" in error["message"]
