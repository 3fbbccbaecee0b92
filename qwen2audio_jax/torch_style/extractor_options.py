"""Arguments of transformers' feature extractor that are taken at values which change nothing here."""

import reprlib
from collections.abc import Mapping
from typing import Any

CALL_OPTIONS = ("sampling_rate", "truncation", "allow_truncated", "track", "return_tensors")
PADDED = "every clip is padded to the longest there may be, and its mask says what is sound"
WORDS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "padding": (("max_length",), f"{PADDED}: leave it out"),
    "max_length": ((), f"{PADDED}: leave it out"),
    "pad_to_multiple_of": ((), f"{PADDED}: leave it out"),
    "return_attention_mask": ((True,), "feature_attention_mask is always there: leave it"),
    "return_token_timestamps": ((False,), "this model gives none"),
    "dither": ((0.0,), "a model trained on other features would hear something else"),
    "do_normalize": ((False,), "a model trained on other features would hear something else"),
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
        if padded and name == "padding" and value in (True, "longest"):
            continue
        check_value(name, value, WORDS)


def check_value(name: str, value: Any, words: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Judge the value of an argument in a table such as `WORDS`; None and what has no remedy is taken.

    Raises:
        ValueError: it would change something.
    """
    taken, remedy = words[name]
    if value is None or not remedy:
        return
    if hasattr(value, "shape") or value not in taken:
        raise ValueError(f"{name}={reprlib.repr(value)} is not supported: {remedy}")
