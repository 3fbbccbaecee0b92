"""Keys of settings files that nothing here reads: refused where they could change the answer, else left alone.

Trainers and converters (transformers, its Trainer, PEFT, TRL, unsloth, ms-swift, LLaMA-Factory) leave notes of their
own in the files that they save. A key is refused if it looks like a misspelt one, or if its name is made of the words
of what the file is about: `attention_scale` could mean something to a model that this package does not know.
"""

import difflib
import logging
import re
from collections.abc import Collection
from typing import Any

logger = logging.getLogger("qwen2audio_jax")

_ALIKE = 0.87
"""From here on two names are taken for one and its misspelling."""


def asks_for_nothing(value: Any) -> bool:
    """Return True for null, and for an empty text, list or object."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that `key` seems to be a misspelling of."""
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=_ALIKE)), None)


def could_matter(key: str, value: Any, *, known: Collection[str], words: re.Pattern[str]) -> bool:
    """Return True if an unknown key could change the answer; one that could not is told to the log's debug level.

    Args:
        key: its name, without the section's.
        value: as the file has it.
        known: keys that change the answer, of which it may be a misspelling.
        words: found in the names of keys that could change it.
    """
    if not asks_for_nothing(value) and (nearest(key, known) or words.search(key.lower())):
        return True
    logger.debug("settings key %s is not read", key)
    return False
