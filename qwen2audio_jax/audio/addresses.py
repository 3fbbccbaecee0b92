"""Address checks for fetching audio: strict URL parsing, and the public IP addresses that may be contacted."""

import ipaddress
import re
import urllib.parse
from dataclasses import dataclass

from qwen2audio_jax.audio.errors import AudioError

MAX_URL_CHARS = 8192
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Listed explicitly, as `is_private` and `is_global` differ between Python versions and miss several of these.
REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # a cloud's platform address, which every virtual machine there reaches
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and other protocols, documentation, 6to4
    )
)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Address:
    """The parts of a URL that may be fetched."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query as they are sent."""

    @property
    def url(self) -> str:
        """The address as a URL string."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target}"

    @property
    def shown(self) -> str:
        """The address for messages, without its query, which may hold a signature or a key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == {"http": 80, "https": 443}[self.scheme] else f":{self.port}"
        path, query, _ = self.target.partition("?")
        path = path if len(path) <= 150 else path[:100] + "..." + path[-40:]
        return f"{self.scheme}://{host}{port}{path}{'?...' if query else ''}"


def refuse(what: str, remedy: str) -> AudioError:
    """The error for a refused address."""
    return AudioError(f"{what}: {remedy}", kind="url")


def parse_url(url: str) -> Address:
    """The parts of an http(s) URL; AudioError "url" for one that parsers may read differently."""
    if len(url) > MAX_URL_CHARS:
        raise refuse(f"a URL of {len(url)} characters", f"at most {MAX_URL_CHARS} are taken; pass the sound as bytes")
    if any(ord(char) <= 0x20 or ord(char) >= 0x7F for char in url) or "\\" in url:
        raise refuse(
            f"the URL {url[:100]!r} holds a backslash, a space, a control character or one beyond ASCII",
            "write those percent-encoded, and the host in its ASCII form",
        )
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise refuse(f"the URL {url[:100]!r} cannot be read", "write http(s)://host[:port]/path") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https"):
        raise refuse(
            f"the scheme {scheme[:20]!r} is not fetched", "http, https and data are; pass a local file by its path"
        )
    if "@" in parts.netloc:
        raise refuse(
            f"a URL on host {(parts.hostname or '')[:100]!r} holds a user name or password",
            "fetch it yourself and pass the bytes",
        )
    host = check_host(parts.hostname or "", bracketed=parts.netloc.startswith("["))
    if port is None:
        port = 443 if scheme == "https" else 80
    if port == 0 or parts.netloc.endswith(":"):
        raise refuse(f"the URL {url[:100]!r} names no port behind its colon", "write http(s)://host[:port]/path")
    return Address(scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def check_host(host: str, *, bracketed: bool) -> str:
    """A host name, dotted IPv4 address or IPv6 address; AudioError "url" for other forms of a number."""
    remedy = "write a host name, an IPv4 address as four decimal numbers, or an IPv6 address in brackets"
    if bracketed:
        try:
            address = ipaddress.IPv6Address(host)
            if address.scope_id is not None:
                raise ValueError("a zone is meaningful on one machine only")
            return str(address)
        except ValueError:
            raise refuse(f"the host [{host[:100]}] is no IPv6 address", remedy) from None
    labels = host.split(".")
    if NUMERIC.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            # 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1 to some resolvers.
            raise refuse(f"the host {host[:100]!r} is a number in an unusual form", remedy) from None
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise refuse(f"the host {host[:100]!r} is no host name", remedy)
    return host


def is_public(address: IPAddress) -> bool:
    """Return True for a public internet address: not a private, local, shared, reserved or translated one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in GLOBAL_UNICAST:
            return False
    refused = any(address.version == network.version and address in network for network in REFUSED)
    return not refused and address.is_global and not address.is_multicast
