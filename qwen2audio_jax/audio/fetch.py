"""HTTP fetching of audio, the only module that opens a network connection for a URL.

A URL is untrusted and may point anywhere: at the machine itself, its neighbours, or a cloud's metadata. So every
address that a name resolves to is checked, and the connection goes to the checked address itself: a second look-up
could give another. Each redirect is checked again.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse

from qwen2audio_jax.audio.addresses import Address, is_public, parse_url, refuse
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import LIMITS, Limits

REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 1 << 16


class Connection(http.client.HTTPConnection):
    """A connection to an address that has been checked, under the name of the host it was found for."""

    def __init__(self, address: Address, checked: str, *, deadline: float):
        super().__init__(address.host, address.port, timeout=remaining(deadline))
        # The default port is omitted from the Host header, as servers expect.
        self.default_port = 443 if address.scheme == "https" else 80
        self.checked = checked
        self.tls = address.scheme == "https"
        self.line: socket.socket | None = None
        """The socket, also when http.client has let go of `sock` because the response is the last one."""

    def connect(self) -> None:
        """Connect to the checked address; over TLS the certificate must be the host's."""
        self.sock = self.line = socket.create_connection((self.checked, self.port), self.timeout)
        if self.tls:
            context = ssl.create_default_context()
            # The handshake is deferred: `Watch` must already have the new socket during it.
            self.sock = self.line = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()


class Watch:
    """Watchdog that shuts a connection at a deadline: per-read timeouts would let a server trickle bytes forever."""

    def __init__(self, connection: Connection, *, deadline: float):
        self.connection = connection
        self.expired = False
        self.timer = threading.Timer(remaining(deadline), self.expire)
        self.timer.daemon = True

    def expire(self) -> None:
        """Shut the socket down, which ends whatever waits on it."""
        self.expired = True
        line = self.connection.line
        if line is not None:
            with contextlib.suppress(OSError):
                # Not the TLS shutdown, which may wait for the peer.
                socket.socket.shutdown(line, socket.SHUT_RDWR)

    def __enter__(self) -> "Watch":
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def fetch(url: str, *, limits: Limits = LIMITS, allow_private: bool = False) -> bytes:
    """The body of an http(s) URL.

    No proxy, cookie or credential of the environment is used, and no encoding of the body is accepted.

    Args:
        url: the address. It must be in plain form: no user name, no backslash, no number other than a dotted IPv4 or a
            bracketed IPv6 address as host.
        limits: `file_bytes`, `url_seconds` (for everything, redirects included) and `url_redirects`.
        allow_private: also connect to addresses that are not public, such as this machine.

    Returns:
        the body.

    Raises:
        AudioError: a refused address or one that does not answer with the status 200 in time ("url"), a body that is
            too large ("too_large") or shorter than stated ("truncated").
    """
    deadline = time.monotonic() + limits.url_seconds
    address = parse_url(url)
    for _ in range(limits.url_redirects + 1):
        body, location = request(address, limits=limits, allow_private=allow_private, deadline=deadline)
        if location is None:
            return body
        following = parse_url(urllib.parse.urljoin(address.url, location))
        if (address.scheme, following.scheme) == ("https", "http"):
            raise refuse(f"{address.shown} redirects from https to {following.shown}", "pass an https address")
        address = following
    raise refuse(f"{describe_url(url)} redirects more than {limits.url_redirects} times", "pass the final address")


def describe_url(url: str) -> str:
    """A URL for messages, without its query."""
    return parse_url(url).shown


def request(address: Address, *, limits: Limits, allow_private: bool, deadline: float) -> tuple[bytes, str | None]:
    """One request: the body and None, or nothing and the address that it redirects to."""
    failure: Exception | None = None
    for checked in resolve(address, allow_private=allow_private, deadline=deadline):
        connection = Connection(address, checked, deadline=deadline)
        with Watch(connection, deadline=deadline) as watch, contextlib.closing(connection):
            try:
                try:
                    connection.connect()
                except (OSError, ssl.SSLError) as error:
                    if watch.expired:
                        raise
                    failure = error  # the next address may answer
                    continue
                result = answer(connection, address, limits=limits)
                if watch.expired:  # a body of no stated length only seems to end
                    raise late(address, limits)
                return result
            except (OSError, http.client.HTTPException, ValueError) as error:
                if watch.expired or isinstance(error, TimeoutError):
                    raise late(address, limits) from None
                if isinstance(error, AudioError):
                    raise
                raise refuse(
                    f"{address.shown} did not answer properly ({type(error).__name__})",
                    "try again, or pass the sound as bytes",
                ) from None
    if isinstance(failure, TimeoutError):
        raise late(address, limits)
    if isinstance(failure, ssl.SSLCertVerificationError):
        reason = f"its certificate is not valid: {failure.verify_message}"
    else:
        reason = getattr(failure, "strerror", None) or type(failure).__name__
    raise refuse(f"{address.shown} cannot be reached ({reason})", "check the address, or pass the sound as bytes")


def answer(connection: Connection, address: Address, *, limits: Limits) -> tuple[bytes, str | None]:
    """Send the request over an open connection and read what comes back."""
    connection.request(
        "GET", address.target, headers={"User-Agent": "qwen2audio-jax", "Accept": "*/*", "Connection": "close"}
    )
    with connection.getresponse() as response:
        return read_response(response, address, limits=limits)


def read_response(response: http.client.HTTPResponse, address: Address, *, limits: Limits) -> tuple[bytes, str | None]:
    """The body of a response and None, or nothing and the address that it redirects to."""
    if response.status in REDIRECTS:
        location = response.getheader("Location")
        if not location:
            raise refuse(f"{address.shown} redirects without saying where to", "pass the final address")
        return b"", location
    if response.status != 200:
        raise refuse(f"{address.shown} answers with status {response.status}, not 200", "check the address")
    encoding = response.getheader("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise refuse(f"{address.shown} sends the encoding {encoding[:40]!r}, which was not asked for", "pass bytes")
    stated = stated_length(response, address)
    if stated is not None and stated > limits.file_bytes:
        raise too_large(address, stated, limits)
    body = bytearray()
    try:
        while piece := response.read1(PIECE):
            body += piece
            if len(body) > limits.file_bytes:
                raise too_large(address, len(body), limits)
    except http.client.IncompleteRead:
        raise cut(address, len(body), "more") from None
    if stated is not None and len(body) < stated:
        raise cut(address, len(body), str(stated))
    return bytes(body), None


def stated_length(response: http.client.HTTPResponse, address: Address) -> int | None:
    """The Content-Length, None where none is stated or the body comes in chunks that state their own."""
    values = {value.strip() for value in response.headers.get_all("Content-Length", [])}
    if not values or response.chunked:
        return None
    value = values.pop()
    if values or not (value.isascii() and value.isdigit() and len(value) < 20):
        raise refuse(f"{address.shown} states no usable Content-Length", "pass the sound as bytes")
    return int(value)


def resolve(address: Address, *, allow_private: bool, deadline: float) -> list[str]:
    """All addresses that a host name resolves to, checked; one refused address refuses the name."""
    found: list[str] = []
    problem: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))
        except (OSError, UnicodeError) as error:
            problem.append(error)

    # In a separate thread, as the system's look-up has no timeout.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(remaining(deadline))
    if problem or not found:
        reason = "took too long" if thread.is_alive() else "no such host"
        raise refuse(f"{address.shown} cannot be looked up ({reason})", "check the address")
    if not allow_private:
        for text in found:
            if not is_public(ipaddress.ip_address(text)):
                raise refuse(
                    f"{address.shown} leads to {text}, which is not a public address",
                    "pass the sound itself, or allow_private_urls=True where the address is trusted",
                )
    return found


def remaining(deadline: float) -> float:
    """Seconds left, always above 0: a timeout of 0 would make the socket non-blocking."""
    return max(deadline - time.monotonic(), 0.001)


def late(address: Address, limits: Limits) -> AudioError:
    """The error for a fetch that took too long."""
    return refuse(f"{address.shown} took longer than {limits.url_seconds:g} s", "try again, or pass the sound as bytes")


def too_large(address: Address, size: int, limits: Limits) -> AudioError:
    """The error for a body beyond the limit."""
    return AudioError(
        f"{address.shown} sends {size} bytes or more, and {limits.file_bytes} are read at most: split the sound",
        kind="too_large",
    )


def cut(address: Address, size: int, stated: str) -> AudioError:
    """The error for a body that ends early."""
    return AudioError(
        f"{address.shown} is truncated: {size} bytes came where {stated} were stated. Try again", kind="truncated"
    )
