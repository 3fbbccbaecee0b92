"""Arguments of transformers' processors and tokenizers: grouped ones, and those that say nothing at some values."""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from qwen2audio_jax.torch_style.extractor_options import PADDED, check_value
from qwen2audio_jax.torch_style.extractor_options import WORDS as OF_CLIPS

_NEVER_CUT = "texts are never cut: shorten them before"
_NOT_GIVEN = "only input_ids and attention_mask are given"
_NO_SIGHT = "this model hears, and sees nothing"
_BOTH = (True, False)
WORDS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": (_BOTH, "the tokenizer adds none"),
    **{name: OF_CLIPS[name] for name in ("device", "dither", "do_normalize")},
    "images": (([],), _NO_SIGHT),
    "is_split_into_words": ((False,), "join the words to a text"),
    "load_audio_from_video": ((False,), "pass the video's path as a clip: its sound is heard"),
    "return_attention_mask": ((True,), "attention_mask is always there: leave it"),
    "return_length": ((False,), "attention_mask.sum(1) has the lengths"),
    "return_mm_token_type_ids": ((False,), "input_ids == processor.audio_token_id says where clips are"),
    "return_offsets_mapping": ((False,), _NOT_GIVEN),
    "return_overflowing_tokens": ((False,), _NEVER_CUT),
    "return_special_tokens_mask": ((False,), _NOT_GIVEN),
    "return_token_type_ids": ((False,), _NOT_GIVEN),
    "stride": ((0,), _NEVER_CUT),
    "truncation": ((False, "do_not_truncate"), _NEVER_CUT),
    "verbose": (_BOTH, ""),
    "videos": (([],), _NO_SIGHT),
}
"""Arguments of the reference: (values that change nothing here, what to say of others)."""

WITHOUT_MEANING = ("tools", "documents")
"""Arguments of the reference that say nothing where they are None."""
OTHER_NAMES = {"sr": "sampling_rate", "raw_speech": "audio", "speech": "audio", "sound": "audio", "prompt": "text"}

_TEXT, _AUDIO = "text_kwargs", "audio_kwargs"
GROUPS = (_TEXT, _AUDIO, "common_kwargs", "processor_kwargs")
P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Judge arguments that a call does not have.

    Raises:
        TypeError: an unknown one; the nearest known one is named.
        ValueError: one of the reference, with a value that would change something.
    """
    for name, value in given.items():
        if name in WORDS:
            check_value(name, value, WORDS)
        elif name.endswith("_kwargs") and value is not None:
            raise TypeError(f"{name}= is not taken here; pass what it holds as arguments: {', '.join(known)}")
        elif value is not None or not (name in WITHOUT_MEANING or name.endswith("_kwargs")):
            near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
            hint = f"did you mean {near}=?" if near in known else "it has no meaning here."
            raise TypeError(f"unknown argument {name}=; {hint} Known are {', '.join(known)}")


def takes_groups(function: Callable[P, R]) -> Callable[P, R]:
    """A method whose arguments may come in the reference's groups too, as text_kwargs={"padding": True}."""

    @functools.wraps(function)
    def call(*args: P.args, **words: P.kwargs) -> R:
        return function(*args, **ungrouped(words))

    return call


def ungrouped(words: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with those in groups among them.

    Raises:
        ValueError: an argument is given twice, or a group holds one that is not followed.
    """
    flat = {name: value for name, value in words.items() if name not in GROUPS or not isinstance(value, Mapping)}
    for group in (name for name in words if name not in flat):
        for name, value in ungrouped(words[group]).items():
            if (group, name) == (_TEXT, "truncation"):
                check_value(name, value, WORDS)
            elif group == _AUDIO and name in ("max_length", "pad_to_multiple_of"):
                if value is not None:
                    raise ValueError(f"{group}: {name}={value!r} is not supported: {PADDED}: leave it out")
            elif (group, name) == (_AUDIO, "padding"):
                continue  # the reference's processor pads clips in one way too
            elif name in flat:
                raise ValueError(f"{name}= is given twice, in {group} and beside it: give one of them")
            else:
                flat[name] = value
    return flat
