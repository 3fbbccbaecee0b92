"""data: URLs (RFC 2397), as sent by chat APIs."""

import base64
import binascii
import urllib.parse

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import LIMITS, Limits


def decode_data_url(url: str, *, limits: Limits = LIMITS) -> bytes:
    """The bytes in a data: URL, base64 or percent-encoded; the media type is ignored, as the content decides.

    Raises:
        AudioError: malformed ("url"), or more than `limits.file_bytes` ("too_large").
    """
    head, comma, body = url.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise AudioError("a data: URL has no comma before its data: write data:audio/wav;base64,...", kind="url")
    encoded = head.lower().endswith(";base64")
    # Counted before anything is decoded: base64 takes four characters for three bytes, percent signs three for one.
    size = len(body) * 3 // 4 - 2 if encoded else len(body) - 2 * body.count("%")
    if size > limits.file_bytes:
        raise AudioError(
            f"a data: URL holds about {size} bytes, and {limits.file_bytes} are read at most: split the sound",
            kind="too_large",
        )
    if not encoded:
        return urllib.parse.unquote_to_bytes(body)
    if "%" in body:
        body = urllib.parse.unquote(body)
    try:
        # By default the standard library skips characters that are not base64, which would hide damage.
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise AudioError(
            f"a data: URL of {len(body)} characters is not valid base64: encode the file's bytes with base64.b64encode",
            kind="url",
        ) from None
