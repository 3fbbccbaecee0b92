"""Hostile requests for the server, as bytes, with the beginnings of the statuses that they may get."""

import base64
import json

KEY = "a key"
CHAT, SPEECH = "/v1/chat/completions", "/v1/audio/transcriptions"
JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=x"
HELLO = {"role": "user", "content": "Hello"}
GOOD = json.dumps({"messages": [HELLO], "max_tokens": 1}).encode()
CUT = "a server that refuses while more is being sent may have closed before its answer was read"


def post(path: str, body: bytes, *headers: str, length: int | None = None, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def get(path: str, *headers: str) -> bytes:
    return post(path, b"", *headers, method="GET")


def chat(**fields) -> bytes:
    return post(CHAT, json.dumps({"messages": [HELLO], "max_tokens": 1, **fields}).encode(), JSON)


def said(content, **fields) -> bytes:
    return chat(messages=[{"role": "user", "content": content, **fields}])


def sound(data: bytes) -> bytes:
    return said([{"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}])


def url(address: str) -> bytes:
    return said([{"type": "audio_url", "audio_url": {"url": address}}])


def part(name: str, content: bytes, file: str | None = "../../etc/a.wav") -> bytes:
    named = f'; filename="{file}"' if file else ""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"


def form(*parts: bytes, path: str = SPEECH) -> bytes:
    return post(path, b"".join(parts) + b"--x--\r\n", FORM)


def wav(rate: int, samples: int, *, stated: int | None = None) -> bytes:
    """A header of 16-bit mono, and silence."""
    data = bytes(2 * samples)
    size = (2 * samples if stated is None else stated).to_bytes(4, "little")
    numbers = ((16, 4), (1, 2), (1, 2), (rate, 4), (2 * rate, 4), (2, 2), (16, 2))
    head = b"".join(number.to_bytes(width, "little") for number, width in numbers)
    return b"RIFF" + size + b"WAVEfmt " + head + b"data" + size + data


def requests() -> list[tuple[bytes, str]]:
    """(request, what its status begins with)."""
    large = b'{"messages": [' + b'{"role":"user","content":"a"},' * 9000 + b"{}]}"
    with_key = f"Bearer {KEY}".encode()
    return [
        # What a body may be
        (post(CHAT, b"[" * 200_000, JSON), "400"),
        (post(CHAT, b'{"a":' * 100_000, JSON), "400"),
        (post(CHAT, b'{"metadata":' * 40 + b"1" + b"}" * 40, JSON), "400"),
        (post(CHAT, b'{"metadata": [' + b"[]," * 500_000 + b"0]}", JSON), "400"),
        (post(CHAT, b'{"seed": ' + b"9" * 100_000 + b"}", JSON), "400"),
        (post(CHAT, b"\xff\xfe{", JSON), "400"),
        (post(CHAT, b'{"messages": "\x80"}', JSON), "400"),
        (post(CHAT, b"[]", JSON), "400"),
        (post(CHAT, b"null", JSON), "400"),
        (post(CHAT, b"", JSON), "400"),
        (post(CHAT, large, JSON), "400"),
        (post(CHAT, b'{"messages": 1e999}', JSON), "400"),
        # Values of the wrong kind or size
        (chat(temperature=float("nan")), "400"),
        (chat(temperature=float("inf")), "400"),
        (chat(top_p=0), "400"),
        (chat(n=True), "400"),
        (chat(n=10**9, temperature=1), "400"),
        (chat(seed=-1), "400"),
        (chat(stop=[1]), "400"),
        (chat(stop=["a"] * 1000), "400"),
        (chat(stop="\ud800"), "400"),
        (chat(max_tokens=1e9), "400"),
        (chat(max_tokens=-1), "400"),
        (chat(max_tokens=1 << 40), "400"),
        (chat(top_k=1 << 70), "400"),
        (chat(repetition_penalty=0), "400"),
        (chat(model=["tiny"]), "400"),
        (chat(model="\ud800"), "404"),
        (chat(stream="yes"), "400"),
        (chat(**{"\ud800": 1}), "400"),
        (chat(messages={}), "400"),
        (chat(messages=[[]]), "400"),
        (chat(messages=[{"role": "\0", "content": "a"}]), "400"),
        (said({"a": 1}), "400"),
        (said("half of a pair: \udfff"), "400"),
        (said("a" * 1_000_000), "400"),
        (said([{"type": "text", "text": "<|AUDIO|>" * 1000}] * 100), "400"),
        (said("a", tool_calls=[{"id": "x"}]), "400"),
        # Sounds
        (sound(b"RIFF" + bytes(200)), "400"),
        (sound(wav(1, 16_000)), "400"),
        (sound(wav(16_000, 16_000, stated=40_000_000)), "400"),
        (sound(b"MATLAB 5.0 MAT-file" + bytes(500)), "400"),
        (said([{"type": "input_audio", "input_audio": {"data": "no base64!", "format": "wav"}}]), "400"),
        (said([{"type": "input_audio", "input_audio": {"data": [1], "format": "wav"}}]), "400"),
        (said([{"type": "input_audio", "input_audio": {"data": "AAAA", "path": "/etc/passwd"}}]), "400"),
        (url("file:///etc/passwd"), "400"),
        (url("/etc/passwd"), "400"),
        (url("gs://bucket/a.wav"), "400"),
        (url("http://127.0.0.1\\@example.com/"), "400"),
        (url("http://[::1]:22/"), "400"),
        (url("http://0x7f000001/"), "400"),
        (url("http://[64:ff9b::a9fe:a9fe]/latest/meta-data"), "400"),
        # Uploads
        (form(part("file", b"RIFF" + bytes(200))), "400"),
        (form(part("file", b"")), "400"),
        (form(part("sound", b"x")), "400"),
        (form(part("file", b"x"), part("file", b"y")), "400"),
        (form(part("file", b"x"), part("language", b"en", None), part("language", b"zh", None)), "400"),
        (form(*(part(f"a{index}", b"x", None) for index in range(500))), "400"),
        (form(part("file", b"x", None)), "400"),
        (form(part("file", b"x"), part("temperature", b"nan", None)), "400"),
        (form(part("file", b"x"), part("response_format", b"../../etc/passwd", None)), "400"),
        (form(part("file", b"x"), part("\0", b"\xff", None)), "400"),
        (form(), "400"),
        (post(SPEECH, b"--x\r\nnonsense", FORM), "400"),
        (post(SPEECH, b"--x", "Content-Type: multipart/form-data"), "400"),
        (post(SPEECH, GOOD, JSON), "415"),
        (post(CHAT, GOOD, "Content-Type: text/plain"), "415"),
        (post(CHAT, GOOD), "415"),
        # Strangers
        (post(CHAT, GOOD, JSON, "Origin: https://evil.example"), "403"),
        (post(CHAT, GOOD, JSON, "Origin: null"), "403"),
        (post(CHAT, GOOD, JSON, "Origin: http://localhost.evil.example"), "403"),
        (post(CHAT, GOOD, JSON).replace(b"Host: localhost", b"Host: evil.example"), "403"),
        (get("/").replace(b"Host: localhost", b"Host: evil.example"), "403"),
        (post(CHAT, GOOD, JSON).replace(with_key, b"Bearer guess"), "401"),
        (post(CHAT, GOOD, JSON).replace(with_key, b"Basic " + KEY.encode()), "401"),
        (post(CHAT, GOOD, JSON).replace(with_key, b"Bearer \xff\xfe"), "401"),
        (post(CHAT, GOOD, JSON).replace(with_key, b""), "401"),
        (get("/metrics").replace(with_key, b"Bearer"), "401"),
        # Sizes
        (post(CHAT, b"", JSON, length=1 << 40), "413"),
        (post(CHAT, b" " * (3 << 20), JSON), "413"),
        (post(CHAT, b"ffffff\r\n" + b" " * 0xFFFFFF, JSON, "Transfer-Encoding: chunked"), "413"),
        # Addresses and headers
        (post("/v1/../../etc/passwd", GOOD, JSON), "404"),
        (get("/page/../../../etc/passwd"), "404"),
        (get("/%2e%2e/%2e%2e/etc/passwd"), "404"),
        (get("//etc/passwd"), "404"),
        (get("/__init__.py"), "404"),
        (get("/v1/models/%2e%2e%2fetc"), "404"),
        (get("/v1/models/%ff"), "404"),
        (post("/v1/models", GOOD, JSON), "405"),
        (post("/", GOOD, JSON, method="DELETE"), "405"),
        (get("/", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: a").replace(b"/ ", b"/ws "), "404"),
        (get("/" + "a" * (100 << 10)), "4"),
        (get("/health", *["A: b"] * 40_000), "4"),
        (get("/health", "A: " + "b" * (1 << 20)), "4"),
        (get("/health").replace(b"HTTP/1.1", b"HTTP/one"), "4"),
        (post(CHAT, GOOD, JSON, "Content-Length: 1"), "400"),
        (post(CHAT, b"zz\r\n", JSON, "Transfer-Encoding: chunked"), "400"),
        (b"nonsense\r\n\r\n", "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "400"),
        (b"GET / HTTP/1.1\r\n\r\n", "400"),
    ]
