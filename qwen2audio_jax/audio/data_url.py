"""base64 sound, bare and in data: URLs (RFC 2397), as chat APIs and common tools write it."""

import base64
import binascii
import re
import urllib.parse

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import LIMITS, Limits

URL_SAFE = str.maketrans("-_", "+/")
BLANK = " \t\r\n\ufeff"
"""What may stand around a URL in a line of text."""
_LONG = 64
"""Characters from which on a text without blanks and points is rather base64 than a name."""


def decode_data_url(url: str, *, limits: Limits = LIMITS) -> bytes:
    """The bytes in a data: URL, base64 or percent-encoded; the media type is ignored, as the content decides.

    Raises:
        AudioError: malformed ("url"), or more than `limits.file_bytes` ("too_large").
    """
    head, comma, body = url.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise AudioError("a data: URL has no comma before its data: write data:audio/wav;base64,...", kind="url")
    if head.lower().rstrip().endswith(";base64"):
        return decode_base64(
            urllib.parse.unquote(body) if "%" in body else body, name="a data: URL", kind="url", limits=limits
        )
    # Counted before anything is decoded: percent signs take three characters for a byte.
    _check_size("a data: URL", len(body) - 2 * body.count("%"), limits)
    return urllib.parse.unquote_to_bytes(body)


def looks_like_base64(text: str | bytes) -> bool:
    """Return True for a text that is rather base64 than a path or words: to say so in a message."""
    head = text[:4096].decode("ascii", "replace") if isinstance(text, bytes) else text[:4096]
    bare = "".join(head.split()).translate(URL_SAFE).rstrip("=")
    return len(bare) >= _LONG and head.count(" ") < 2 and re.fullmatch("[A-Za-z0-9+/]+", bare) is not None


def decode_base64(text: str, *, name: str, kind: str, limits: Limits = LIMITS) -> bytes:
    """The bytes of base64 text as any writer leaves it: with line breaks, without padding, in the URL-safe alphabet.

    Args:
        text: base64.
        name: what holds it, for messages.
        kind: of the AudioError where it is malformed.
        limits: bounds on its bytes.

    Raises:
        AudioError: other characters, or a length that no bytes have; more than `limits.file_bytes` ("too_large").
    """
    text = "".join(text.split()).translate(URL_SAFE)
    # Counted before anything is decoded: four characters for three bytes.
    _check_size(name, len(text) * 3 // 4 - 2, limits)
    bare = text.rstrip("=")
    try:
        if len(text) - len(bare) > 2:
            raise ValueError("more padding than base64 has")
        # By default the standard library skips characters that are not base64, which would hide damage.
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError):
        remedy = "encode the file's bytes with base64.b64encode"
        if text.startswith(("b'", 'b"')):
            remedy = "it is what Python shows of bytes: write base64.b64encode(...).decode()"
        raise AudioError(f"{name} of {len(text)} characters is not valid base64: {remedy}", kind=kind) from None


def _check_size(name: str, size: int, limits: Limits) -> None:
    if size > limits.file_bytes:
        raise AudioError(
            f"{name} holds about {size} bytes, and {limits.file_bytes} are read at most: split the sound",
            kind="too_large",
        )
