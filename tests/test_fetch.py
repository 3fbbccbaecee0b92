"""The one function that opens URLs: what it refuses, and that nothing else opens any."""

import ast
import http.server
import ipaddress
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sounds
from stand_in import stand_in

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio import fetch as fetch_module
from qwen2audio_jax.audio.addresses import is_public, parse_url
from qwen2audio_jax.audio.fetch import fetch
from qwen2audio_jax.limits import LIMITS

ROOT = Path(__file__).resolve().parent.parent
SOUND = sounds.encode("wav", sounds.speech(8000), 16_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each path with one behaviour, good or bad."""

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path == "/sound":
            self.answer(body=SOUND)
        elif path == "/no-length":
            self.answer(body=SOUND, Content_Length=None)
        elif path == "/chunked":
            half = len(SOUND) // 2
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (SOUND[:half], SOUND[half:]))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        elif path == "/chunked-cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc")
        elif path == "/short":
            self.answer(body=SOUND[:1000], Content_Length=str(len(SOUND)))
        elif path == "/claims":
            self.answer(body=b"", Content_Length=str(1 << 40))
        elif path == "/two-lengths":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef")
        elif path == "/gzip":
            self.answer(body=b"x", Content_Encoding="gzip")
        elif path == "/endless":
            self.answer(Content_Length=None)
            while True:
                self.wfile.write(bytes(1 << 16))
        elif path == "/drip":
            self.answer(Content_Length="100000")
            for _ in range(800):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(800):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/junk":
            self.wfile.write(b"\x00\x01 not http at all\r\n\r\n")
        elif path == "/redirect":
            self.answer(302, Location="/sound")
        elif path == "/loop":
            self.answer(302, Location="/loop")
        elif path == "/nowhere":
            self.answer(302)
        elif path == "/to-file":
            self.answer(302, Location="file:///etc/passwd")
        elif path == "/to-metadata":
            self.answer(302, Location="http://169.254.169.254/latest/meta-data/")
        else:
            self.answer(404, b"missing")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # the client hung up, as it should


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Handler) as running:
        running.seen = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def base(server):
    return f"http://127.0.0.1:{server.server_port}"


def refusal(url, *, kind, limits=LIMITS, allow_private=True) -> str:
    with pytest.raises(AudioError) as caught:
        fetch(url, limits=limits, allow_private=allow_private)
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


@pytest.mark.parametrize("path", ["/sound", "/no-length", "/chunked", "/redirect", "/sound?x=%20y"])
def test_fetches(base, path):
    assert fetch(base + path, allow_private=True) == SOUND


def test_same_samples_as_bytes(base):
    assert np.array_equal(load_audio(base + "/sound", allow_private_urls=True), load_audio(SOUND))


def test_asks_plainly(base, server, monkeypatch):
    """No proxy of the environment, no encoding, no credentials."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1/")
    fetch(base + "/sound?key=1#part", allow_private=True)
    path, headers = server.seen[-1]
    assert path == "/sound?key=1"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == base.removeprefix("http://")
    assert not {"Authorization", "Cookie", "Referer"} & set(headers)


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/short", "truncated", f"1000 bytes came where {len(SOUND)} were stated"),
        ("/chunked-cut", "truncated", "truncated"),
        ("/claims", "too_large", f"{1 << 40} bytes or more, and {LIMITS.file_bytes} are read at most"),
        ("/two-lengths", "url", "no usable Content-Length"),
        ("/gzip", "url", "encoding 'gzip'"),
        ("/junk", "url", "did not answer properly"),
        ("/loop", "url", "redirects more than 5 times"),
        ("/nowhere", "url", "redirects without saying where"),
        ("/to-file", "url", "scheme 'file'"),
        ("/gone?signature=secret", "url", "status 404"),
    ],
)
def test_bad_answers(base, path, kind, words):
    message = refusal(base + path, kind=kind)
    assert words in message
    assert "secret" not in message


def test_stops_reading_at_the_limit(base):
    assert "more, and 300000 are read" in refusal(
        base + "/endless", kind="too_large", limits=replace(LIMITS, file_bytes=300_000)
    )


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_stops_at_the_time_limit(base, path):
    started = time.monotonic()
    assert "longer than 0.4 s" in refusal(base + path, kind="url", limits=replace(LIMITS, url_seconds=0.4))
    assert time.monotonic() - started < 20


def test_slow_look_up_ends_in_time(monkeypatch):
    monkeypatch.setattr(fetch_module, "socket", stand_in(socket, getaddrinfo=lambda *_, **__: time.sleep(1) or []))
    message = refusal("http://slow.example/", kind="url", limits=replace(LIMITS, url_seconds=0.2))
    assert "cannot be looked up (took too long)" in message


def test_refused_connection():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert "cannot be reached" in refusal(f"http://127.0.0.1:{taken.getsockname()[1]}/", kind="url")


def test_private_address_is_refused_and_named(base):
    message = refusal(base + "/sound", kind="url", allow_private=False)
    assert "127.0.0.1, which is not a public address" in message
    assert "allow_private_urls=True" in message
    with pytest.raises(AudioError, match="not a public address"):
        load_audio(base + "/sound")


def test_redirect_is_checked_again(base, monkeypatch):
    """A public host that redirects to a private one gets no further."""
    real = fetch_module.is_public
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address.is_loopback or real(address))
    assert "169.254.169.254, which is not" in refusal(base + "/to-metadata", kind="url", allow_private=False)


def test_connects_to_the_address_that_was_checked(base, server, monkeypatch):
    """A name is looked up once: a second answer (rebinding) would never be asked for."""
    answers = []

    def look_up(host, port, *_, **__):
        answers.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    connected = []

    def connect(where, *rest):
        connected.append(where)
        return socket.create_connection(where, *rest)

    monkeypatch.setattr(fetch_module, "socket", stand_in(socket, getaddrinfo=look_up, create_connection=connect))
    assert fetch(f"http://rebind.example:{server.server_port}/sound", allow_private=True) == SOUND
    assert connected == [("127.0.0.1", server.server_port)]
    assert answers == ["rebind.example"]
    assert server.seen[-1][1]["Host"] == f"rebind.example:{server.server_port}"


def test_one_private_answer_refuses_the_name(monkeypatch):
    def look_up(host, port, **_):
        return [(2, 1, 6, "", ("93.184.216.34", port)), (2, 1, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(fetch_module, "socket", stand_in(socket, getaddrinfo=look_up))
    assert "10.0.0.1" in refusal("http://both.example/", kind="url", allow_private=False)


def test_https_keeps_the_name(base, monkeypatch):
    """Over TLS the certificate is asked for by name, though the connection goes to a number."""
    names = []

    class Context:
        def wrap_socket(self, sock, *, server_hostname, **_):
            names.append(server_hostname)
            raise OSError("stop here")

    monkeypatch.setattr(fetch_module.ssl, "create_default_context", Context)
    port = base.rpartition(":")[2]
    refusal(f"https://localhost:{port}/", kind="url")
    assert set(names) == {"localhost"}


def test_https_to_a_server_without_tls(base):
    assert "cannot be reached" in refusal(base.replace("http", "https") + "/sound", kind="url")


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
        *("198.51.100.7", "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1"),
        *("64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1", "2001:0:53aa:64c::1", "2001:db8::1", "fc00::1"),
        *("fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "100::1", "3fff::1", "2001:10::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"],
)
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1\\@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://user:pass@example.com/",
        "http://example.com@127.0.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://1.2.3.4.5/",
        "http://0/",
        "http:///path",
        "http://",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://[127.0.0.1]/",
        "http://exa mple.com/",
        "http://example.com/a\r\nHost: evil",
        "http://example.com/\x00",
        "http://ex\u00e4mple.com/",
        "http://\u2460\u2461\u2466.0.0.1/",
        "http://example.com%2f@127.0.0.1/",
        "http://%31%32%37.0.0.1/",
        "http://example..com/",
        "http://-x.com/",
        "http://example.com:0/",
        "http://example.com:/",
        "http://example.com:99999/",
        "http://example.com:8o/",
        "ftp://example.com/x.wav",
        "file:///etc/passwd",
        "gopher://example.com/",
        "http://example.com/" + "x" * 10_000,
    ],
)
def test_urls_that_are_read_in_different_ways(url):
    with pytest.raises(AudioError) as caught:
        parse_url(url)
    assert caught.value.kind == "url"
    assert len(str(caught.value)) < 500


def test_parts_of_a_url():
    address = parse_url("HTTPS://Example.COM/a/b.wav?x=1&y=/z#part")
    assert (address.scheme, address.host, address.port, address.target) == (
        "https",
        "example.com",
        443,
        "/a/b.wav?x=1&y=/z",
    )
    assert address.shown == "https://example.com/a/b.wav?..."
    assert parse_url("http://[2606:4700::1]:81").shown == "http://[2606:4700::1]:81/"


NETWORK = {
    *("socket", "socketserver", "ssl", "http.client", "http.server", "urllib.request", "urllib3", "requests", "httpx"),
    *(
        "aiohttp",
        "ftplib",
        "smtplib",
        "telnetlib",
        "imaplib",
        "poplib",
        "xmlrpc",
        "fsspec",
        "asyncio",
        "websockets",
        "pooch",
    ),
}


def opened_by(path: Path) -> set[str]:
    """The modules in NETWORK that a source file imports, at its top or inside functions, by statement or by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return {name for name in names for module in NETWORK if name == module or name.startswith(module + ".")}


def test_nothing_else_opens_urls(tmp_path):
    allowed = Path("qwen2audio_jax/audio/fetch.py")
    sources = [*ROOT.glob("qwen2audio_jax/**/*.py"), *ROOT.glob("convert/**/*.py")]
    found = {path.relative_to(ROOT): opened_by(path) for path in sources}
    assert {"socket", "ssl", "http.client"} <= found.pop(allowed)
    # Buckets are opened by fsspec when one is named; the roll call is between the processes of one run; the server
    # answers whoever opens a connection to it.
    assert {path: names for path, names in found.items() if names} == {
        Path("qwen2audio_jax/storage/bucket.py"): {"fsspec"},
        Path("qwen2audio_jax/parallel/roll_call.py"): {"socket"},
        **{
            Path(f"qwen2audio_jax/serve/{name}.py"): {"asyncio"}
            for name in ("app", "door", "events", "long_sound", "slow_headers", "waiting")
        },
        Path("qwen2audio_jax/serve/listen.py"): {"socket"},  # whether its address is free
    }
    # The scan itself sees what it is for.
    probe = tmp_path / "probe.py"
    probe.write_text(
        "def f():\n  from urllib import request\n  import importlib\n  importlib.import_module('socket')\n"
    )
    assert opened_by(probe) == {"urllib.request", "socket"}
