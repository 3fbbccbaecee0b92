"""The server: OpenAI's own client for what it can send, raw HTTP for what it cannot."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("openai", reason="the server is tested with OpenAI's client")
pytest.importorskip("httpx", reason="the server is tested with httpx")

import httpx
import openai
import uvicorn

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example
from qwen2audio_jax.engine import Engine
from qwen2audio_jax.serve import slow_headers
from qwen2audio_jax.serve.answers import Trimmer, trimmed
from qwen2audio_jax.serve.app import Readiness, Settings, make_app

KEY = "a key"
MODEL = "tiny"
QUESTION = "Which digits are spoken?"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2AUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
        with Engine(model, processor, slots=4, queue=64, positions=512) as engine:
            yield model, processor, engine


def serve(app):
    """A server on a free port of this machine, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=slow_headers.TimedProtocol, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def address(parts):
    _, processor, engine = parts
    readiness = Readiness()
    readiness.ready = True
    settings = Settings(MODEL, keys=("another", KEY), body_bytes=2 << 20, body_seconds=1.0, answer_seconds=60.0)
    server, thread, url = serve(make_app(engine, processor, settings, readiness))
    yield url
    server.should_exit = True
    thread.join()


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


def test_a_client_that_leaves_frees_its_slot(client, address, parts):
    engine = parts[2]
    options = {"temperature": 0, "max_tokens": 400, "extra_body": {"min_tokens": 400}}
    messages = [{"role": "user", "content": "Count."}]
    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True, **options)
    next(iter(stream))
    assert engine.stats()["slots_in_use"] == 1
    stream.close()
    wait_idle(engine)
    body = {"model": MODEL, "messages": messages, "max_tokens": 400, "min_tokens": 400}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json=body, headers=auth(), timeout=0.2)
    wait_idle(engine)
    assert engine.stats()["cancelled"] >= 2


def wait_idle(engine):
    end = time.monotonic() + 5
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
    assert client.audio.translations.create(model=MODEL, file=path).text is not None
    long = np.zeros(31 * 16_000, np.int16)
    import sounds

    data = sounds.encode("wav", long.astype(np.float32), 16_000)
    with pytest.raises(openai.BadRequestError, match="30 s"):
        client.audio.transcriptions.create(model=MODEL, file=("long.wav", data))
    with pytest.raises(openai.BadRequestError, match="leave it out"):
        client.audio.transcriptions.create(model=MODEL, file=path, prompt="words")


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
        ({"response_format": {"type": "json_object"}}, "not built yet"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"extra_body": {"beams": 4}}, "unknown parameter 'beams'"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"max_tokens": 9000}, "engine has 512 a slot"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "unknown key"),
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


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


JSON = "Content-Type: application/json"
CHAT = "/v1/chat/completions"
GOOD = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}).encode()


def test_hostile_requests_get_their_status_and_the_server_lives(address, client, monkeypatch):
    monkeypatch.setattr(slow_headers, "HEADER_SECONDS", 0.5)
    form = "Content-Type: multipart/form-data; boundary=x"
    upload = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="../../a.wav"\r\n\r\n%s\r\n--x--\r\n'
    cases = [
        (post(CHAT, GOOD, JSON), b"200"),
        (post(CHAT, b"[" * 200_000, JSON), b"400"),
        (post(CHAT, b'{"a":' * 100_000, JSON), b"400"),
        (post(CHAT, b"\xff\xfe{", JSON), b"400"),
        (post(CHAT, b"[]", JSON), b"400"),
        (post(CHAT, b"null", JSON), b"400"),
        (post(CHAT, b'{"messages": 1e999}', JSON), b"400"),
        (post(CHAT, b'{"messages": [' + b'{"role":"user","content":"a"},' * 9000 + b"{}]}", JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": {"a": 1}}]}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": true}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "seed": -1}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "stop": [1]}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e9}', JSON), b"400"),
        (post(CHAT, b'{"messages": [{"role": "\\u0000", "content": "a"}]}', JSON), b"400"),
        (post(CHAT, GOOD, "Content-Type: text/plain"), b"415"),
        (post(CHAT, GOOD), b"415"),
        (post(CHAT, GOOD, JSON, "Origin: https://evil.example"), b"403"),
        (post(CHAT, GOOD, JSON, "Origin: null"), b"403"),
        (post(CHAT, GOOD, JSON).replace(b"Host: localhost", b"Host: evil.example"), b"403"),
        (post(CHAT, GOOD, JSON).replace(KEY.encode(), b"guess"), b"401"),
        (post(CHAT, GOOD, JSON).replace(b"Bearer", b"Basic"), b"401"),
        (post(CHAT, b"", JSON, length=1 << 40), b"413"),
        (post(CHAT, b" " * (3 << 20), JSON), b"413"),
        (post(CHAT, b"ffffff\r\n" + b" " * 0xFFFFFF, JSON, "Transfer-Encoding: chunked"), b"413"),
        (post(CHAT, GOOD, JSON, length=len(GOOD) + 5), b"408"),
        (post("/v1/audio/transcriptions", upload % (b"file", b"RIFF" + bytes(200)), form), b"400"),
        (post("/v1/audio/transcriptions", upload % (b"file", b""), form), b"400"),
        (post("/v1/audio/transcriptions", upload % (b"sound", b"x"), form), b"400"),
        (post("/v1/audio/transcriptions", b"--x\r\nnonsense", form), b"400"),
        (post("/v1/audio/transcriptions", b"--x--\r\n", form), b"400"),
        (post("/v1/audio/transcriptions", GOOD, JSON), b"415"),
        (post("/v1/../../etc/passwd", GOOD, JSON), b"404"),
        (post("/v1/models", GOOD, JSON), b"405"),
        (post("/v1/models/%2e%2e%2fetc", b"", JSON).replace(b"POST", b"GET"), b"404"),
        (b"GET /" + b"a" * (100 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 40_000 + b"\r\n", b"4"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"4"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    ]
    for data, status in cases:
        got = raw(address, data)
        # A server that refuses while more is being sent may have closed before its answer was read.
        assert got.startswith(b"HTTP/1.1 " + status) or (got == b"closed" and status in (b"413", b"4")), (
            data[:120],
            got[:300],
        )
        assert b"Traceback" not in got
        assert b"site-packages" not in got
    # Headers that come byte by byte, and a body that does.
    assert raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n", pause=0.1, step=3) == b"closed"
    slow = raw(address, post(CHAT, GOOD, JSON), pause=0.15, step=8)
    assert slow.startswith(b"HTTP/1.1 408") or slow == b"closed"
    assert client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=2)


def test_a_full_queue_and_one_that_is_not_ready(parts):
    model, processor, _ = parts
    with Engine(model, processor, slots=1, queue=1, positions=512) as engine:
        readiness = Readiness()
        server, thread, url = serve(make_app(engine, processor, Settings(MODEL), readiness))
        readiness.progress(3, 40, 1.0, "")
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "min_tokens": 400}
        try:
            waits = httpx.post(f"{url}{CHAT}", json=body)
            assert (waits.status_code, waits.headers["Retry-After"]) == (503, "1")
            assert "3 of 40 shapes" in waits.json()["error"]["message"]
            health = httpx.get(f"{url}/health")
            assert (health.status_code, health.json()["shapes"]) == (503, 40)
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
        finally:
            server.should_exit = True
            thread.join()


def test_metrics(address):
    text = httpx.get(f"{address}/metrics", headers=auth()).text
    values = {line.split()[0]: line.split()[1] for line in text.splitlines() if line and line[0] != "#"}
    assert float(values["qwen2audio_tokens_total"]) > 0
    assert values["qwen2audio_slots"] == "4.0"
    assert any(name.startswith("qwen2audio_http_responses_total{") for name in values)
    assert float(values['qwen2audio_first_token_seconds{quantile="0.99"}']) > 0


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
        (("--model", str(tmp_path / "none")), "no such folder"),
    ):
        assert main(["serve", *arguments]) == 2
        assert said in capsys.readouterr().err
