"""Arguments of transformers' feature extractor that are taken at values which change nothing here."""

from collections.abc import Mapping
from typing import Any

CALL_OPTIONS = ("sampling_rate", "truncation", "allow_truncated", "track", "return_tensors")
PADDED = "every clip is padded to the longest there may be, and its mask says what is sound"
WORDS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "padding": (("max_length", None), f"{PADDED}: leave it out"),
    "max_length": ((None,), f"{PADDED}: leave it out"),
    "pad_to_multiple_of": ((None,), f"{PADDED}: leave it out"),
    "return_attention_mask": ((True, None), "feature_attention_mask is always there: leave it"),
    "return_token_timestamps": ((False, None), "this model gives none"),
    "dither": ((0.0, None), "a model trained on other features would hear something else"),
    "do_normalize": ((False, None), "a model trained on other features would hear something else"),
    "device": ((), ""),
}
"""Arguments of the reference's extractor: (values that change nothing here, what to say of others)."""


def check_extractor_options(words: Mapping[str, Any], *, padded: bool = False) -> None:
    """Judge arguments of the reference's extractor.

    Args:
        words: by name.
        padded: whether features are of one length already, so that padding to the longest changes nothing.

    Raises:
        TypeError: one that it does not have.
        ValueError: a value that would change something.
    """
    for name, value in words.items():
        if name not in WORDS:
            raise TypeError(f"unknown argument {name}=; known here: {', '.join(CALL_OPTIONS)}")
        taken, remedy = WORDS[name]
        if padded and name == "padding" and value in (True, "longest"):
            continue
        if taken and not any(value is each or value == each for each in taken):
            raise ValueError(f"{name}={value!r} is not supported: {remedy}")
