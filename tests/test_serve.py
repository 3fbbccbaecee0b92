"""The server: OpenAI's own client for what it can send, raw HTTP for what it cannot."""

import base64
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("openai", reason="the server is tested with OpenAI's client")
pytest.importorskip("httpx", reason="the server is tested with httpx")

import httpx
import openai
from hostile_requests import CHAT, CUT, GOOD, HELLO, JSON, KEY, post, requests
from served import served

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.audio import load_audio
from qwen2audio_jax.cli import serve
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example
from qwen2audio_jax.engine import Engine, Handle, Request
from qwen2audio_jax.serve import door, slow_headers
from qwen2audio_jax.serve.answers import Trimmer, trimmed
from qwen2audio_jax.serve.app import Readiness, Settings, make_app
from qwen2audio_jax.serve.errors import ApiError
from qwen2audio_jax.serve.transcription import read_transcription

MODEL = "tiny"
ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Which digits are spoken?"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2AUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
        with Engine(model, processor, slots=4, queue=64, positions=512) as engine:
            yield model, processor, engine


@pytest.fixture(scope="module")
def address(parts):
    _, processor, engine = parts
    readiness = Readiness()
    readiness.ready = True
    settings = Settings(MODEL, keys=("another", KEY), body_bytes=2 << 20, answer_seconds=60.0)
    with served(make_app(engine, processor, settings, readiness)) as url:
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def content(name: str, text: str | None = QUESTION):
    data = base64.b64encode(example(name).read_bytes()).decode()
    found = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]
    return [*found, {"type": "text", "text": text}] if text else found


def expected(parts, name: str, text: str = QUESTION, **options) -> str:
    model, processor, _ = parts
    chat = [
        {"role": "user", "content": [{"type": "audio", "audio": str(example(name))}, {"type": "text", "text": text}]}
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    ids = model.generate(**inputs, **{"max_new_tokens": 256, "do_sample": False, **options})
    return processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_chat_with_audio(client, parts):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content("digits-4719")}]
    plain = client.chat.completions.create(model=MODEL, messages=messages[1:], temperature=0)
    assert plain.choices[0].message.content == expected(parts, "digits-4719") == "The digits are 4 7 1 9."
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage.prompt_tokens_details.audio_tokens == 63
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    cut = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=3, logprobs=True, user="somebody"
    )
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    shown = cut.choices[0].logprobs.content
    assert "".join(token.token for token in shown) == cut.choices[0].message.content
    assert all(token.logprob <= 0 for token in shown)
    data = "data:audio/wav;base64," + base64.b64encode(example("digits-4719").read_bytes()).decode()
    by_url = [{"type": "audio_url", "audio_url": {"url": data}}, {"type": "text", "text": QUESTION}]
    again = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": by_url}], temperature=0)
    assert again.choices[0].message.content == plain.choices[0].message.content
    stopped = client.chat.completions.create(
        model=MODEL, messages=messages[1:], temperature=0, stop=["7", "no such text"]
    )
    assert stopped.choices[0].message.content == "The digits are 4 "
    assert stopped.choices[0].finish_reason == "stop"


def test_constrained_answers(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"digits": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 4}},
        "required": ["digits"],
        "additionalProperties": False,
    }

    def ask(**more):
        chat = [{"role": "user", "content": content("digits-4719")}]
        found = client.chat.completions.create(model=MODEL, messages=chat, temperature=0, max_tokens=60, **more)
        assert found.choices[0].finish_reason == "stop"
        return found.choices[0].message.content

    shape = {"type": "json_schema", "json_schema": {"name": "digits", "schema": schema}}
    assert list(json.loads(ask(response_format=shape))) == ["digits"]
    assert ask(extra_body={"guided_choice": ["no", "yes"]}) in ("no", "yes")
    assert ask(extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}).isdigit()
    for wrong in ({"type": "nope"}, {"type": "string", "pattern": "["}):
        with pytest.raises(openai.BadRequestError, match="cannot be used"):
            ask(extra_body={"guided_json": wrong})


def test_several_answers_and_seeds(client):
    def answers():
        found = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content("tone", "Which sound is this?")}],
            n=3,
            seed=5,
            temperature=1.9,
            max_tokens=12,
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    first = answers()
    assert answers() == first
    assert len(set(first)) > 1


def test_a_streamed_chat(client, parts):
    messages = [{"role": "user", "content": content("digits-4719")}]
    for more in ({}, {"stop": "7 1"}, {"logprobs": True}):
        pieces, reason, usage, tokens = [], None, None, []
        for chunk in client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}, **more
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
                tokens += choice.logprobs.content if choice.logprobs else []
        whole = expected(parts, "digits-4719")
        assert "".join(pieces) == (whole.partition("7 1")[0] if "stop" in more else whole)
        assert len(pieces) > 4
        assert reason == "stop"
        assert usage.completion_tokens > 4
        assert (len(tokens) == usage.completion_tokens) == ("logprobs" in more)


def test_a_client_that_leaves_frees_its_slot_within_one_step(client, address, parts, monkeypatch):
    engine = parts[2]
    at = []
    cancel = Handle.cancel

    def noting(handle):
        at.append(engine.stats()["steps"])
        cancel(handle)

    monkeypatch.setattr(Handle, "cancel", noting)
    messages = [{"role": "user", "content": "Count."}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 480, "min_tokens": 480}
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, temperature=0, max_tokens=480, extra_body={"min_tokens": 480}
    )
    next(iter(stream))
    assert engine.stats()["slots_in_use"] == 1
    stream.close()
    wait_idle(engine)
    assert engine.stats()["steps"] - at.pop(0) <= 2  # the one that was under way, and the one of that turn
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}{CHAT}", json=body, headers=auth(), timeout=0.2)
    wait_idle(engine)
    assert engine.stats()["steps"] - at.pop(0) <= 2
    # One that leaves before its first token, while others have all the slots.
    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(httpx.post, f"{address}{CHAT}", json=body, headers=auth(), timeout=60) for _ in range(4)]
        while engine.stats()["slots_in_use"] < 4:
            time.sleep(0.005)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}{CHAT}", json={**body, "stream": True}, headers=auth(), timeout=0.1)
        end = time.monotonic() + 60
        while engine.stats()["queued"]:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert [answer.result().status_code for answer in long] == [200] * 4
    assert engine.stats()["cancelled"] >= 3


def test_turns_of_a_conversation(client):
    """What the client gets it can send back, as it is."""
    messages = [{"role": "user", "content": content("digits-4719")}]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    messages += [first.choices[0].message, {"role": "user", "content": content("tone", "Is this speech or a tone?")}]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    assert second.usage.prompt_tokens_details.audio_tokens > first.usage.prompt_tokens_details.audio_tokens
    details = second.usage.prompt_tokens_details
    assert details.audio_tokens + details.text_tokens == second.usage.prompt_tokens


def wait_idle(engine):
    end = time.monotonic() + 60
    while engine.stats()["slots_in_use"]:
        assert time.monotonic() < end
        time.sleep(0.01)


def auth():
    return {"Authorization": f"Bearer {KEY}"}


def test_many_clients_get_the_answers_of_generate(client, parts):
    names = ("digits-4719", "tone", "low-voice-58", "high-voice-306")
    wanted = {name: expected(parts, name, max_new_tokens=12) for name in names}

    def ask(index):
        name = names[index % len(names)]
        found = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content(name)}], temperature=0, max_tokens=12
        )
        return name, found.choices[0].message.content

    with ThreadPoolExecutor(64) as pool:
        for name, text in pool.map(ask, range(64)):
            assert text == wanted[name]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of the client's own
def test_transcriptions(client, parts):
    path = example("low-voice-58")
    plain = client.audio.transcriptions.create(model=MODEL, file=path)
    assert plain.text
    text = client.audio.transcriptions.create(model=MODEL, file=path, response_format="text", language="en")
    assert text == plain.text + "\n"
    srt = client.audio.transcriptions.create(model=MODEL, file=path, response_format="srt")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:0")
    assert client.audio.transcriptions.create(model=MODEL, file=path, response_format="vtt").startswith("WEBVTT\n\n00")
    verbose = client.audio.transcriptions.create(model=MODEL, file=path, response_format="verbose_json")
    assert verbose.segments[0].end == verbose.duration > 1
    assert verbose.segments[0].flags == []
    with pytest.raises(openai.BadRequestError, match="'embedded' have no task 'translate'"):
        client.audio.translations.create(model=MODEL, file=path)
    import sounds

    first, second = (load_audio(example(name)) for name in ("digits-4719", "high-voice-306"))
    long = np.concatenate([first, np.zeros(30 * 16_000, np.float32), second])
    data = sounds.encode("wav", long, 16_000)
    verbose = client.audio.transcriptions.create(model=MODEL, file=("long.wav", data), response_format="verbose_json")
    assert verbose.text == "4 7 1 9 3 0 6"
    assert [segment.start > 30 for segment in verbose.segments] == [False, True]
    silent = ("silent.wav", sounds.encode("wav", np.zeros(32_000, np.float32), 16_000))
    asked_again = client.audio.transcriptions.create(model=MODEL, file=silent, extra_body={"retry": "all"})
    assert asked_again.text == ""
    for more, said in (
        ({"language": "zh"}, "does not have 'zh'; it has en"),
        ({"extra_body": {"retry": "x"}}, "none,"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.audio.transcriptions.create(model=MODEL, file=path, **more)
    with pytest.raises(openai.BadRequestError, match="leave it out"):
        client.audio.transcriptions.create(model=MODEL, file=path, prompt="words")


def test_uploads_are_asked_about_as_the_kind_of_model_is(parts):
    def read(kind, translate, **fields):
        return read_transcription(fields, b"", model=MODEL, kind=kind, translate=translate)

    base = read("base", False, language="yue", hotwords="one, two")
    assert (
        base.request.prompt
        == "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|yue|>"
    )
    assert base.request.options["hotwords"] == ("one", "two")
    into = read("base", True, language="de")
    assert (into.task.language, into.language) == ("de-en", "en")
    chat = read("instruct", True)
    assert chat.request.prompt == "Detect the language and translate the speech into English: <|zh|>"
    assert chat.task.clean("The speech says: 'Good day.'") == "Good day."
    with pytest.raises(ApiError, match="does not have 'sw-en'"):
        read("base", True, language="sw")


def test_tasks_and_hotwords_in_chats(client):
    def ask(name, **more):
        return client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content(name, None)}], temperature=0, extra_body=more
        )

    assert ask("tone", task="sound_kind").choices[0].message.content == "This is a tone."
    chat = {"role": "user", "content": content("digits-4719")}
    expecting = {"hotwords": ["6 6"], "hotword_bonus": 100.0}
    plain, biased = (
        client.chat.completions.create(model=MODEL, messages=[chat], temperature=0, max_tokens=12, extra_body=more)
        for more in ({}, expecting)
    )
    assert plain.choices[0].message.content == "The digits are 4 7 1 9."
    assert "6 6" in biased.choices[0].message.content
    for more, said in (
        ({"task": "transcribe"}, "post the sound to /v1/audio/transcriptions"),
        ({"task": "emotion"}, "have no task 'emotion'; they have"),
        ({"labels": ["a", "b"]}, "name it"),
        ({"task": "voice", "labels": ["", 1]}, "labels: give texts"),
        ({"task": "voice", "labels": ["a", "<|im_end|>"]}, "without control tokens"),
        ({"hotwords": ["two\nlines"]}, "a word is one line"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            ask("tone", **more)
    with pytest.raises(openai.BadRequestError, match="sound alone"):
        client.chat.completions.create(model=MODEL, messages=[chat], extra_body={"task": "voice"})


def test_errors_that_the_client_understands(client, address):
    def ask(**more):
        return client.chat.completions.create(
            **{"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **more}
        )

    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        ask(model="other")
    for more, said in (
        ({"temperature": 3}, "from 0 to 2"),
        ({"n": 2, "temperature": 0}, "same answer"),
        ({"frequency_penalty": 1}, "repetition_penalty"),
        ({"response_format": {"type": "xml"}}, "none of text, json_object and json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "must be a schema"),
        ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, "has no 'grammar' here"),
        ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "one constraint"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"extra_body": {"beams": 4}}, "unknown parameter 'beams'"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"max_tokens": 9000}, "engine has 512 a slot"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 'role is "tool"'),
        ({"messages": []}, "messages is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}]}, "parts are"),
        ({"messages": [{"role": "user", "content": [audio_url("file:///etc/passwd")]}]}, "must be an http"),
        ({"messages": [{"role": "user", "content": [audio_url("http://127.0.0.1:1/a.wav")]}]}, "not a public address"),
        ({"messages": [{"role": "user", "content": [audio_url("data:audio/wav;base64,AAAA")]}]}, "format|wav|sound"),
    ):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            ask(**more)
        assert "/tmp" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def audio_url(url):
    return {"type": "audio_url", "audio_url": {"url": url}}


def raw(address: str, data: bytes, *, pause: float = 0.0, step: int = 1 << 20) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            for start in range(0, len(data), step):
                connection.sendall(data[start : start + step])
                time.sleep(pause)
            got = b""
            while piece := connection.recv(65536):
                got += piece
                if b"\r\n\r\n" in got and b"connection: close" not in got.lower():
                    break
        except (ConnectionResetError, BrokenPipeError):
            return b"closed"
    return got or b"closed"


def test_hostile_requests_get_their_status_and_the_server_lives(address, client):
    hostile = requests()
    assert len(hostile) >= 60
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: raw(address, case[0]), hostile))
    for (data, status), got in zip(hostile, answers, strict=True):
        assert got.startswith(b"HTTP/1.1 " + status.encode()) or (got == b"closed" and status in ("413", "4")), (
            data[:200],
            got[:300],
            CUT,
        )
        for leak in (b"Traceback", b"site-packages", b".py", b"/tmp", b"/root", b"0x7f", b" object at "):
            assert leak not in got.replace(b"0x7f000001", b""), (data[:200], got)
    assert raw(address, post(CHAT, GOOD, JSON)).startswith(b"HTTP/1.1 200")
    assert client.chat.completions.create(model=MODEL, messages=[HELLO], max_tokens=2)


def test_headers_and_bodies_that_come_too_slowly(parts, monkeypatch):
    """The limits are long, so that a busy machine keeps within them what is sent at once; what is slow never ends."""
    _, processor, engine = parts
    monkeypatch.setattr(slow_headers, "HEADER_SECONDS", 2.0)
    readiness = Readiness()
    readiness.ready = True
    settings = Settings(MODEL, keys=(KEY,), body_seconds=2.0)
    unended = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with served(make_app(engine, processor, settings, readiness)) as url:
        # Byte by byte, nothing but a beginning, and one byte less than was announced.
        cases = [
            lambda: raw(url, unended, pause=0.3, step=3),
            lambda: raw(url, unended),
            lambda: raw(url, b""),
            lambda: raw(url, post(CHAT, GOOD, JSON)[:-1]),
            lambda: raw(url, post(CHAT, GOOD, JSON, length=len(GOOD) + 5)),
        ]
        with ThreadPoolExecutor(len(cases) + 1) as pool:
            dripping = pool.submit(raw, url, post(CHAT, b" " * 4000, JSON), pause=0.3, step=250)
            headers, begun, silent, *bodies = [task.result() for task in [pool.submit(case) for case in cases]]
        assert headers == begun == silent == b"closed"
        assert dripping.result().startswith(b"HTTP/1.1 408") or dripping.result() == b"closed", CUT
        for body in bodies:
            assert body.startswith(b"HTTP/1.1 408")
            assert b"the body did not arrive within 2 s" in body
        assert raw(url, post(CHAT, GOOD, JSON)).startswith(b"HTTP/1.1 200")


def test_a_full_queue_and_one_that_is_not_ready(parts):
    model, processor, _ = parts
    with Engine(model, processor, slots=1, queue=1, positions=512) as engine:
        readiness = Readiness()
        with served(make_app(engine, processor, Settings(MODEL), readiness)) as url:
            readiness.progress(3, 40, 1.0, "")
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "min_tokens": 400}
            waits = httpx.post(f"{url}{CHAT}", json=body)
            assert (waits.status_code, waits.headers["Retry-After"]) == (503, "1")
            assert "3 of 40 shapes" in waits.json()["error"]["message"]
            health = httpx.get(f"{url}/health")
            assert (health.status_code, health.json()["shapes"], health.json()["status"]) == (503, 40, "compiling")
            readiness.progress(40, 40, 9.0, "")
            health = httpx.get(f"{url}/health")
            assert (health.status_code, health.json()["status"]) == (503, "rehearsing")
            assert httpx.get(f"{url}/health/live").status_code == 200
            readiness.ready = True
            assert httpx.get(f"{url}/health/ready").status_code == 200
            with ThreadPoolExecutor(8) as pool:
                codes = list(pool.map(lambda _: httpx.post(f"{url}{CHAT}", json=body, timeout=60), range(8)))
            statuses = [answer.status_code for answer in codes]
            assert set(statuses) == {200, 429}
            refused = next(answer for answer in codes if answer.status_code == 429)
            assert refused.headers["Retry-After"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"


def test_an_answer_that_takes_too_long_and_bodies_that_are_too_much_together(parts, monkeypatch):
    _, processor, engine = parts
    monkeypatch.setattr(door, "BODIES", 1)
    readiness = Readiness()
    readiness.ready = True
    settings = Settings(MODEL, body_bytes=1000, answer_seconds=0.05)
    body = {"messages": [HELLO], "max_tokens": 400, "min_tokens": 400}
    with served(make_app(engine, processor, settings, readiness)) as url:
        late = httpx.post(f"{url}{CHAT}", json=body)
        assert (late.status_code, late.json()["error"]["type"]) == (408, "invalid_request_error")
        stream = httpx.post(f"{url}{CHAT}", json={**body, "stream": True})
        assert "not whole in time" in stream.text
        assert stream.status_code == (200 if stream.text.startswith("data: ") else 408)
        wait_idle(engine)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(post(CHAT, b" " * 900, JSON, length=1000))
            statuses = set()
            while 429 not in statuses:  # as soon as what the other has sent is there
                answer = httpx.post(f"{url}{CHAT}", content=b" " * 900, headers={"Content-Type": "application/json"})
                statuses.add(answer.status_code)
            assert answer.headers["Retry-After"] == "1"
        while httpx.post(f"{url}{CHAT}", json={**body, "stop": "x" * 900}).status_code == 429:
            time.sleep(0.01)


def test_a_request_leaves_nothing_behind_until_circles_are_looked_for(parts):
    """The sounds of a request are megabytes, and circles of references are looked for rarely."""

    class Holder:
        def changed(self, handle):
            self.changes = getattr(self, "changes", 0) + 1

    engine, holder = parts[2], Holder()
    gc.collect()
    gc.disable()
    try:
        request = Request(messages=[{"role": "user", "content": content("tone")}], options={"max_new_tokens": 3})
        holder.handle = engine.submit(request, on_change=holder.changed)
        assert len(holder.handle.result().token_ids) == holder.changes - 1
        left = weakref.ref(holder.handle)
        del holder, request
        for _ in range(engine.slots):  # each slot remembers the last prompt in it, for those that begin like it
            engine.submit(Request(messages=[HELLO], options={"max_new_tokens": 3})).result()
        end = time.monotonic() + 60
        while left() is not None:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        gc.enable()


def metrics(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", headers=auth()).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, value in lines}


def test_metrics(address, client):
    before = metrics(address)
    chat = [{"role": "user", "content": content("digits-4719")}]
    client.chat.completions.create(model=MODEL, messages=chat, max_tokens=3, extra_body={"min_tokens": 3})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    private = [{"role": "user", "content": [audio_url("http://127.0.0.1/clip.wav")]}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=private)
    # A client chooses no names: what is counted does not grow with what is asked for.
    for name in ("a", "b"):
        httpx.get(f"{address}/v1/models/{name}", headers=auth())
    after = metrics(address)
    assert not any("/v1/models/a" in name for name in after)
    assert after["qwen2audio_slots"] == 4
    assert {"qwen2audio_queued", "qwen2audio_slots_in_use"} <= set(after)
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert more["qwen2audio_tokens_total"] == 3
    assert more["qwen2audio_audio_seconds_total"] > 1
    assert more["qwen2audio_time_to_first_token_seconds_count"] == 1
    assert more["qwen2audio_inter_token_seconds_count"] == 2
    assert more["qwen2audio_inter_token_seconds_sum"] > 0
    assert more['qwen2audio_errors_total{kind="key"}'] == more['qwen2audio_errors_total{kind="url"}'] == 1
    assert any(name.startswith("qwen2audio_http_responses_total{") for name in after)


def test_pages_of_other_sites_once_they_are_named(parts):
    _, processor, engine = parts
    readiness = Readiness()
    readiness.ready = True
    settings = Settings(MODEL, origins=("https://chat.example",))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with served(make_app(engine, processor, settings, readiness)) as url:
        for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
            before = httpx.options(f"{url}{CHAT}", headers={"Origin": origin, **asks})
            answer = httpx.get(f"{url}/v1/models", headers={"Origin": origin})
            assert (before.status_code == 200) == (answer.status_code == 200) == allowed
            assert (answer.headers.get("Access-Control-Allow-Origin") == origin) == allowed


def test_a_signal_ends_the_server_after_the_requests_that_run(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-m", "qwen2audio_jax", "serve", "--port", str(port), "--warmup", "0", "--workers", "1"]
    environment = {**os.environ, "QWEN2AUDIO_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            wait_ready(f"http://127.0.0.1:{port}", process)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                name = client.models.list().data[0].id
                options = {"max_tokens": 200, "temperature": 0, "extra_body": {"min_tokens": 200}}
                stream = iter(client.chat.completions.create(model=name, messages=[HELLO], stream=True, **options))
                next(stream)
                process.send_signal(signal.SIGTERM)
                reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
                assert reasons[-1] == "length"
            assert process.wait(30) == 0
        finally:
            process.kill()
    said = log.read_text()
    assert f"http://127.0.0.1:{port}/v1" in said
    assert "Traceback" not in said


def test_a_signal_while_programs_are_compiled(monkeypatch):
    ended = []
    monkeypatch.setattr(serve.os, "_exit", ended.append)
    waits = threading.Event()
    warming = threading.Thread(target=waits.wait, daemon=True)
    warming.start()
    serve.leave(warming, code=0)
    assert ended == [0]
    waits.set()
    warming.join()
    serve.leave(warming, code=0)
    with pytest.raises(SystemExit):
        serve.leave(warming, code=1)
    assert ended == [0]


def wait_ready(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def test_text_up_to_a_stop_string():
    for stops, text, kept in ((["cd"], "abcdef", "ab"), (["cd", "b"], "abcdef", "a"), ([], "abc", "abc")):
        for size in (1, 2, 6):
            trimmer = Trimmer(stops)
            pieces = [trimmer.push(text[start : start + size]) for start in range(0, len(text), size)]
            assert "".join(pieces) + trimmer.finish() == kept == trimmed(text, stops)
    assert Trimmer(["xyz"]).push("abx") == "ab"


def test_options_that_cannot_be_used(tmp_path, capsys):
    for arguments, said in (
        (("--host", "0.0.0.0"), "say --no-auth"),
        (("--api-key-file", str(tmp_path / "none")), "cannot be read"),
        (("--port", "0", "--model", str(tmp_path / "none")), "no such folder"),
        (("--port", "99999"), "ports go from 1 to 65535"),
        (("--host", "203.0.113.1", "--no-auth"), "no address of this machine"),
    ):
        assert main(["serve", *arguments]) == 2
        assert said in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
        assert f"--port {port} of 127.0.0.1 is taken by another program" in capsys.readouterr().err


def test_the_page_is_served_without_a_key_under_a_strict_policy(address):
    for name, kind in (("", "text/html"), ("style.css", "text/css"), ("page.js", "text/javascript")):
        answer = httpx.get(f"{address}/{name}")
        assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert answer.headers["Content-Security-Policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob:"
        )
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        # What the policy would refuse, and other sites.
        for refused in (" style=", "onclick=", "<style", "http://", "https://", "eval("):
            assert refused not in answer.text
